# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How should the pools of two layers become one? A small MoE is trained, its pools joined, and training heals them.

    python train/studies/pooling.py --data path/to/gsm8k

Per seed, all after the same steps of healing on the half of the documents that the source did not see:

    source            a pool in every layer
    mean              expert i is the mean of the layers' experts i: half the experts
    alternate         expert i is that of the first layer or of the second, in turns, with its router's row: half
    concatenated      the experts of both, with the rows of both routers: all of them

Written before any run: among those of half the experts the lower mean loss becomes the default of `upcycle`, if the
two seeds agree on it. Writes model_cards/studies/pooling_gsm8k.json.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_coe import CoEConfig, CoEForCausalLM
from modeling_coe.train.arguments import parse
from modeling_coe.train.report import environment
from modeling_coe.train.runs import write_json
from modeling_coe.train.studies.healing import HealingArguments, pretrain, split


LAYERS = 2  # that share a pool
QUESTION = "How should the pools of two layers become one?"


@dataclass
class PoolingArguments(HealingArguments):
    """As healing.py, for a source of four layers."""

    output_dir: str = field(default="runs/pooling", metadata={"help": "All models."})
    results: str = field(default="model_cards/studies/pooling_gsm8k.json", metadata={"help": "Where the result goes."})
    source_steps: int = field(default=250, metadata={"help": "Steps that make the source."})
    healing_steps: int = field(default=150, metadata={"help": "Steps of every fine-tuning."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "One source for each."})


def main():
    (arguments,) = parse(PoolingArguments, description=__doc__)
    output = Path(arguments.output_dir)
    halves = split(Path(arguments.data), output / "data")
    runs = []
    for seed in arguments.seeds:
        folder = output / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        fields = {"num_hidden_layers": 4, "num_iterations": 1, "num_local_experts": arguments.num_experts}
        preset = CoEConfig.from_json_file(arguments.preset).to_dict() | fields
        CoEConfig(**preset | {"num_experts_per_tok": arguments.num_experts_per_tok}).to_json_file(
            folder / "source.json"
        )
        made = folder / "source"
        rates = arguments.source_learning_rate, arguments.healing_learning_rate
        pretrain(arguments, folder / "source.json", halves[0], made, arguments.source_steps, rates[0], seed)
        for name in ("source", "mean", "alternate", "concatenated"):
            start = made if name == "source" else join_pools(made, folder / name, name)
            run = pretrain(
                arguments, start, halves[1], folder / f"healed {name}", arguments.healing_steps, rates[1], seed
            )
            runs.append(
                {key: run[key] for key in ("seed", "validation_loss_before", "validation_loss")} | {"name": name}
            )
    means = {
        name: round(statistics.mean(run["validation_loss"] for run in runs if run["name"] == name), 4)
        for name in dict.fromkeys(run["name"] for run in runs)
    }
    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("data", "output_dir", "results")
    }
    facts = {
        "question": QUESTION,
        "settings": settings,
        "mean_validation_loss": means,
        "runs": runs,
        **environment(torch.device("cpu")),
    }
    write_json(Path(arguments.results), facts)
    print(means)


def join_pools(source: Path, output: Path, way: str) -> Path:
    """A checkpoint whose layers share pools in twos, made of one with a pool in every layer."""
    model = CoEForCausalLM.from_pretrained(source)
    weights, N = model.state_dict(), model.config.num_local_experts
    fields = model.config.to_dict() | {"layers_per_pool": LAYERS}
    fields["num_local_experts"] = LAYERS * N if way == "concatenated" else N
    joined = CoEForCausalLM(CoEConfig(**fields))
    result = {name: weights[name] for name in joined.state_dict() if ".mlp." not in name}
    turns = torch.arange(N) % LAYERS
    for first in range(0, model.config.num_hidden_layers, LAYERS):
        group = [f"model.layers.{layer}.mlp" for layer in range(first, first + LAYERS)]
        for leaf in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            tensors = torch.stack([weights[f"{layer}.{leaf}"] for layer in group])
            tensors = tensors[:, 0] if leaf == "gate.weight" else tensors
            own = {
                "mean": tensors.mean(0),
                "alternate": tensors[turns, torch.arange(N)],
                "concatenated": tensors.flatten(0, 1),
            }
            for number, layer in enumerate(group):
                if leaf == "gate.weight":
                    result[f"{layer}.{leaf}"] = (tensors[number] if way == "mean" else own[way])[None]
                elif number == 0:
                    result[f"{layer}.{leaf}"] = own[way]
    joined.load_state_dict(result)
    joined.save_pretrained(output)
    for file in source.glob("tokenizer*"):
        (output / file.name).write_bytes(file.read_bytes())
    return output


if __name__ == "__main__":
    main()

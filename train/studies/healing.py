# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Does an upcycled chain earn its compute? A small Mixtral, and chains made of it, fine-tuned side by side.

python train/studies/healing.py --config configuration/studies/healing/gsm8k.yaml --data path/to/gsm8k

`data` is a folder with train.jsonl and test.jsonl. A Mixtral is trained on the first half of the training split; it
and two chains upcycled from it then continue on the second half. Per seed:

    source               n steps
    chain                n steps: the same function at step 0, more FLOPs a step
    source, more steps   as many steps as cost the FLOPs of `chain`
    chain, fewer experts n steps of K / C experts per iteration: the source's FLOPs, not its function at step 0
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig

from modeling_coe import CoEConfig, downcycle, upcycle
from modeling_coe.budget import training_flops
from modeling_coe.train.arguments import parse
from modeling_coe.train.report import environment


@dataclass
class HealingArguments:
    """What to upcycle, how long to train it, and on which data."""

    data: str | None = field(default=None, metadata={"help": "Folder with train.jsonl and test.jsonl."})
    output_dir: str = field(default="runs/healing", metadata={"help": "All models, and results.json."})
    preset: str = field(default="configuration/models/coe_tiny.json", metadata={"help": "Sizes of the source."})
    num_experts: int = field(default=16, metadata={"help": "N."})
    num_experts_per_tok: int = field(default=4, metadata={"help": "K of the source."})
    num_iterations: int = field(default=2, metadata={"help": "C of the chains."})
    router_noise: float = field(default=0.05, metadata={"help": "Noise on the chains' later routers."})
    source_steps: int = field(default=300, metadata={"help": "Steps that make the source."})
    healing_steps: int = field(default=200, metadata={"help": "n."})
    source_learning_rate: float = field(default=3e-3, metadata={"help": "Peak rate of the source's training."})
    healing_learning_rate: float = field(default=2e-3, metadata={"help": "Peak rate of every fine-tuning."})
    batch_size: int = field(default=4, metadata={"help": "Blocks a step."})
    sequence_length: int = field(default=256, metadata={"help": "Tokens a block."})
    validation_documents: int = field(default=100, metadata={"help": "Validation documents, of test.jsonl."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One source for each."})


def main():
    (arguments,) = parse(HealingArguments, description=__doc__)
    if arguments.data is None:
        raise ValueError("Set `data` to a folder with train.jsonl and test.jsonl.")
    output = Path(arguments.output_dir)
    halves = split(Path(arguments.data), output / "data")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("data", "output_dir")}
    runs = []
    for seed in arguments.seeds:
        runs += heal(arguments, halves, output / f"seed-{seed}", seed)
        means = {
            name: statistics.mean(run["validation_loss"] for run in runs if run["name"] == name)
            for name in dict.fromkeys(run["name"] for run in runs)
        }
        facts = environment(torch.device("cpu"))
        results = {"settings": settings, "mean_validation_loss": means, "runs": runs, **facts}
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(means, indent=2))


def split(data: Path, output: Path) -> list[Path]:
    """Two data folders, each with half of the training documents and all of the test documents."""
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    halves = {"first": lines[: len(lines) // 2], "second": lines[len(lines) // 2 :]}
    for name, half in halves.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        (output / name / "train.jsonl").write_text("".join(half))
        (output / name / "test.jsonl").write_text((data / "test.jsonl").read_text())
    return [output / name for name in halves]


def heal(arguments: HealingArguments, halves: list[Path], output: Path, seed: int) -> list[dict]:
    """Train one source, upcycle it twice, fine-tune all; the facts of each run."""
    output.mkdir(parents=True, exist_ok=True)
    sizes = json.loads(Path(arguments.preset).read_text())
    sizes |= {"num_iterations": 1, "num_local_experts": arguments.num_experts}
    preset = output / "source.json"
    CoEConfig(**sizes | {"num_experts_per_tok": arguments.num_experts_per_tok}).to_json_file(preset)
    source = output / "source"
    runs = [
        pretrain(arguments, preset, halves[0], source, arguments.source_steps, arguments.source_learning_rate, seed)
    ]

    options = {"num_iterations": arguments.num_iterations, "router_noise": arguments.router_noise, "seed": seed}
    mixtral = downcycle(source, output / "mixtral", overwrite=True)
    chain = upcycle(mixtral, output / "chain", verify=True, overwrite=True, **options)
    fewer = arguments.num_experts_per_tok // arguments.num_iterations
    thin = upcycle(mixtral, output / "thin-chain", experts_per_iteration=fewer, overwrite=True, **options)

    n, rate = arguments.healing_steps, arguments.healing_learning_rate
    longer = round(n * flops(arguments, chain) / flops(arguments, source))
    for name, model, steps in (
        ("source", source, n),
        ("chain", chain, n),
        ("source, more steps", source, longer),
        ("chain, fewer experts", thin, n),
    ):
        folder = output / f"healed {name}".replace(",", "").replace(" ", "-")
        runs.append({**pretrain(arguments, model, halves[1], folder, steps, rate, seed), "name": name})
    return runs


def flops(arguments: HealingArguments, model: Path) -> float:
    """FLOPs of a step."""
    tokens = arguments.batch_size * arguments.sequence_length
    return tokens * training_flops(AutoConfig.from_pretrained(model), arguments.sequence_length)


def pretrain(
    arguments: HealingArguments, model: Path, data: Path, output: Path, steps: int, rate: float, seed: int
) -> dict:
    """Run train/pretrain.py to the end of a cosine schedule; its validation losses and its FLOPs."""
    every = max(1, steps // 3)
    options = {
        "model": model, "dataset": data, "output_dir": output, "max_steps": steps, "learning_rate": rate, "seed": seed,
        "sequence_length": arguments.sequence_length, "per_device_train_batch_size": arguments.batch_size,
        "split_long_documents": True, "max_validation_documents": arguments.validation_documents,
        "scored_problems": 0, "lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 20),
        "logging_steps": every, "eval_steps": every, "save_steps": every, "eval_on_start": True,
        "per_device_eval_batch_size": 8, "disable_tqdm": True,
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).parents[1] / "pretrain.py")]
    subprocess.run(command + [word for item in options.items() for word in (f"--{item[0]}", str(item[1]))], check=True)
    facts = json.loads((output / "facts.json").read_text())
    return {
        "name": "the source's own training",
        "seed": seed,
        "steps": steps,
        "flops": steps * flops(arguments, output),
        "train_seconds": facts["train_seconds"],
        "validation_loss_before": facts["validation_loss_before"],
        "validation_loss": facts["validation_loss"],
    }


if __name__ == "__main__":
    main()

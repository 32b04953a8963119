# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a training step whose layers share pools of experts, beside Mixtral's of equal compute.

    python train/studies/pool_memory.py --shape small
    python train/studies/pool_memory.py --shape paper
    python train/studies/pool_memory.py --shape gsm8k    # the models of configuration/studies/pools.yaml

bf16 weights, gradients and AdamW states, one sequence of 512 tokens, a second micro-batch of a step (the gradients of
the first are there). `lean` is gradient checkpointing, no full logits, and AdamW states of 8 bits. Times are those of
the processor, so that what else the machine does counts little. The paper's shape takes 7 GiB; the result goes to
model_cards/studies/pool_memory_<shape>.json.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from modeling_coe import CoEConfig, CoEForCausalLM
from modeling_coe.budget import TrainingSetup, count_parameters, training_flops, training_memory
from modeling_coe.train.report import environment, peak_bytes
from modeling_coe.train.runs import write_json


CPU = torch.device("cpu")
LENGTH = 512
SHAPES = {
    "paper": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 704, "num_attention_heads": 8},
    "gsm8k": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 2},
    "small": {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 176, "num_attention_heads": 4},
}
CHAIN = {"num_iterations": 2, "num_experts_per_tok": 4, "num_local_experts": 64}
OF_GSM8K = {
    "Mixtral MoE(8/32)": {"num_iterations": 1, "num_experts_per_tok": 8, "num_local_experts": 32},
    "CoE-2(4/32)": CHAIN | {"num_local_experts": 32},
    "CoE-2(4/128), one pool of all": CHAIN | {"num_local_experts": 128, "layers_per_pool": 4},
    "CoE-2(4/32), one pool of a quarter": CHAIN | {"num_local_experts": 32, "layers_per_pool": 4},
}
MODELS = {
    "Mixtral MoE(8/64)": {"num_iterations": 1, "num_experts_per_tok": 8, "num_local_experts": 64},
    "CoE-2(4/64)": CHAIN,
    "CoE-2(4/64), two layers a pool": CHAIN | {"layers_per_pool": 2},
    "CoE-2(4/64), four layers a pool": CHAIN | {"layers_per_pool": 4},
}
PLAIN = {"batch_size": 1, "sequence_length": LENGTH, "dtype": "bfloat16", "experts_implementation": "coe"}
LEAN = PLAIN | {"gradient_checkpointing": True, "skip_logits": True, "optimizer": "adamw_8bit"}


class Step:
    """A model in the midst of a training step, with its gradients and the states of its optimizer."""

    def __init__(self, config: CoEConfig, setup: TrainingSetup):
        torch.manual_seed(0)
        self.setup = setup
        self.model = CoEForCausalLM._from_config(config, dtype=torch.bfloat16).train()
        if setup.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if setup.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
            self.optimizer.step()
        else:
            self.optimizer, self.states = states_of_8_bits(self.model)
        self.tokens = torch.randint(config.vocab_size, (setup.batch_size, setup.sequence_length))

    def micro_batch(self):
        options = {"use_cache": False, "skip_logits": self.setup.skip_logits}
        self.model(input_ids=self.tokens, labels=self.tokens, **options).loss.backward()


def states_of_8_bits(model: CoEForCausalLM) -> tuple:
    """torchao's optimizer and the states that its first step makes; the step itself would compile its kernels."""
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(model.parameters(), block_size=256)
    return optimizer, [optimizer._new_buffer(p, signed) for p in model.parameters() for signed in (True, False)]


def measure_memory(config: CoEConfig, options: dict) -> dict:
    """The peak of torch's allocator, the prediction of modeling_coe/budget.py, and its parts."""
    setup = TrainingSetup(**options)
    predicted = training_memory(config, setup)

    def run():
        Step(config, setup).micro_batch()

    peak = peak_bytes(run, CPU)
    total = sum(predicted.values())
    return {"peak_bytes": peak, "predicted_bytes": total, "error": round(total / peak - 1, 4), "predicted": predicted}


def measure_times(configs: dict[str, CoEConfig], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of a micro-batch and an optimizer step of each model, in turns, after one to warm up."""
    steps = {name: Step(config, TrainingSetup(**PLAIN)) for name, config in configs.items()}
    seconds = {name: [] for name in configs}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            before = time.process_time()
            step.micro_batch()
            step.optimizer.step()
            seconds[name].append(round(time.process_time() - before, 4))
    return {name: values[1:] for name, values in seconds.items()}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each model; 0 measures memory alone")
    parser.add_argument("--output", type=Path, help="default: model_cards/studies/pool_memory_<shape>.json")
    options = parser.parse_args(arguments)
    shape = {"num_hidden_layers": 4, **SHAPES[options.shape]}
    configs = {
        name: CoEConfig(**shape, **fields)
        for name, fields in (OF_GSM8K if options.shape == "gsm8k" else MODELS).items()
    }
    output = options.output or Path("model_cards/studies") / f"pool_memory_{options.shape}.json"
    command = f"python train/studies/pool_memory.py --shape {options.shape} --repeats {options.repeats}"
    rows = {}
    for name, config in configs.items():
        rows[name] = {
            "parameters": sum(count_parameters(config).values()),
            "training_mflops_a_token": round(training_flops(config, LENGTH) / 1e6, 1),
        }
        for kind, setup in {"plain": PLAIN, "lean": LEAN}.items():
            rows[name][kind] = measure_memory(config, setup)
            whole = next(iter(rows.values()))["plain"]["peak_bytes"]
            rows[name][kind]["of_mixtrals_peak"] = round(rows[name][kind]["peak_bytes"] / whole, 4)
            print(name, kind, rows[name][kind], flush=True)
    if options.repeats:
        times = measure_times(configs, options.repeats)
        mixtral = next(iter(times.values()))
        for name, seconds in times.items():
            # Of each round, in which the models take turns: what slows the machine for a while slows them alike.
            ratios = [theirs / ours for theirs, ours in zip(mixtral, seconds, strict=True)]
            quartiles = [round(value, 4) for value in statistics.quantiles(ratios, n=4)]
            rows[name] |= {"processor_seconds": seconds, "speed": quartiles[1], "speed_quartiles": quartiles}
    write_json(output, {"command": command, "shape": shape, "rows": rows, **environment(CPU)})


if __name__ == "__main__":
    main()

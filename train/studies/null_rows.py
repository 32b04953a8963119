# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Does an expert that is not computed save its time? One pool's experts with a growing share of null choices:

    python train/studies/null_rows.py

A training step of the experts (forward and backward, their weights and inputs) and a decoding step (forward), in turns
in one process; the ratio of each round to the same round without null choices, median and quartiles, beside the ratio
of the FLOPs. Writes model_cards/studies/null_rows.json.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from modeling_coe import CoEConfig
from modeling_coe.modeling_coe import CoEExperts
from modeling_coe.train.report import environment
from modeling_coe.train.runs import write_json


CPU = torch.device("cpu")
SHAPE = {"hidden_size": 512, "intermediate_size": 352, "num_local_experts": 16, "num_experts_per_tok": 4}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
CASES = {"training, 2048 tokens": 2048, "training, 512 tokens": 512, "decoding, 16 tokens": 16}


def build_experts(dtype: torch.dtype) -> CoEExperts:
    config = CoEConfig(**SHAPE)
    config._experts_implementation = "coe"
    experts = CoEExperts(config).to(dtype)
    torch.manual_seed(0)
    for weight in experts.parameters():
        weight.data.normal_(0, 0.02)
    return experts


def choices(tokens: int, share: float) -> torch.Tensor:
    """`[T, K]`: different experts for each token, and the share of null choices among them, index N."""
    N, K = SHAPE["num_local_experts"], SHAPE["num_experts_per_tok"]
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, N, generator=generator).topk(K).indices
    null = torch.rand(index.numel(), generator=generator).argsort()[: round(share * index.numel())]
    return index.flatten().index_fill(0, null, N).view_as(index)


def step(experts: CoEExperts, hidden_states: torch.Tensor, index: torch.Tensor, trains: bool) -> float:
    """Processor seconds."""
    weights = torch.full(index.shape, 0.25, requires_grad=trains)
    before = time.process_time()
    with torch.set_grad_enabled(trains):
        output = experts(hidden_states, index, weights)
        if trains:
            output.sum().backward()
    return time.process_time() - before


def measure(experts: CoEExperts, tokens: int, trains: bool, repeats: int) -> list[dict]:
    hidden_states = torch.randn(tokens, SHAPE["hidden_size"], dtype=experts.down_proj.dtype, requires_grad=trains)
    indices = {share: choices(tokens, share) for share in SHARES}
    seconds = {share: [] for share in SHARES}
    for _ in range(repeats + 1):
        for share, index in indices.items():
            seconds[share].append(step(experts, hidden_states, index, trains))
    rows = []
    for share, times in seconds.items():
        ratios = [ours / full for ours, full in zip(times[1:], seconds[0.0][1:], strict=True)]
        quartiles = [round(value, 3) for value in statistics.quantiles(ratios, n=4)]
        rows.append(
            {
                "null_share": share,
                "flops_of_full": 1 - share,
                "time_of_full": quartiles[1],
                "quartiles": quartiles,
                "tokens_per_second": round(tokens / statistics.median(times[1:])),
            }
        )
    return rows


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("model_cards/studies/null_rows.json"))
    options = parser.parse_args(arguments)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        experts = build_experts(dtype)
        for name, tokens in CASES.items():
            rows = measure(experts, tokens, name.startswith("training"), options.repeats)
            results[f"{name}, {str(dtype).removeprefix('torch.')}"] = rows
            print(name, dtype, [(row["null_share"], row["time_of_full"]) for row in rows], flush=True)
    write_json(options.output, {"shape": SHAPE, "results": results, **environment(CPU)})


if __name__ == "__main__":
    main()

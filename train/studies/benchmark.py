# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a chain costs beside transformers' own Mixtral, in one process, variant after variant in every round.

    OMP_NUM_THREADS=1 python train/studies/benchmark.py --size cpu --output model_cards/studies/benchmark_cpu.json
    python train/studies/benchmark.py --size gpu --suites block train_step

Every variant has the same 64 experts per layer, and so the same total parameters, and visits 8 of them per token:
MoE(8/64), CoE-2(4/64) or CoE-4(2/64). The naive loop is CoE-2(4/64) with a Python loop over the experts, as in the
paper's code.

A ratio is the baseline's cost over the variant's in the same round: above 1 the variant wins, below it loses.
The table gives the median over the rounds and the quartiles. On CPU the clock is the CPU time of this process, which
other processes cannot take away; on GPU it is wall time between synchronisations.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_coe import CoEConfig, CoEForCausalLM
from modeling_coe.budget import TrainingSetup, training_memory
from modeling_coe.train.checkpoints import write_json
from modeling_coe.train.report import environment, peak_bytes


BASELINE = "mixtral MoE(8/64) grouped_mm"
MIXTRAL = {BASELINE: "grouped_mm", "mixtral MoE(8/64) eager": "eager"}
CHAINS = {
    "CoE-1(8/64)": (1, 8, "coe"),
    "CoE-2(4/64)": (2, 4, "coe"),
    "CoE-4(2/64)": (4, 2, "coe"),
    "CoE-2(4/64) naive loop": (2, 4, "eager"),
}
NO_LOOPS = (BASELINE, "CoE-1(8/64)", "CoE-2(4/64)", "CoE-4(2/64)")
PAPER_BLOCK = {"hidden_size": 1024, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 8}
SIZES = {
    "cpu": {
        "model": {
            "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 176, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4,
        },
        "device": "cpu", "dtype": "float32", "batch": 8, "sequence": 256, "paper_block_tokens": 2048,
        "decode_batches": (1, 16), "new_tokens": 24,
    },
    "gpu": {
        "model": {"vocab_size": 32000, "num_hidden_layers": 4, **PAPER_BLOCK},
        "device": "cuda", "dtype": "bfloat16", "batch": 64, "sequence": 512, "paper_block_tokens": 32768,
        "decode_batches": (1, 16), "new_tokens": 128,
    },
}  # fmt: skip


def build(name: str, size: dict, **overrides):
    """The variant's model in training mode, with the auxiliary loss on, all from one seed."""
    sizes = size["model"] | {"num_local_experts": 64, "router_aux_loss_coef": 0.001} | overrides
    torch.manual_seed(0)
    if name in MIXTRAL:
        config = MixtralConfig(num_experts_per_tok=8, output_router_logits=True, **sizes)
        model_class, implementation = MixtralForCausalLM, MIXTRAL[name]
    else:
        iterations, top_k, implementation = CHAINS[name]
        config = CoEConfig(num_iterations=iterations, num_experts_per_tok=top_k, **sizes)
        model_class = CoEForCausalLM
    config._experts_implementation = implementation
    return model_class(config).to(size["device"], getattr(torch, size["dtype"])).train()


def now(size: dict) -> float:
    if size["device"] == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def alternate(variants: dict, size: dict, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round; each round starts with another one, the first is warm-up."""
    names = list(variants)
    seconds = {name: [] for name in names}
    for repetition in range(repetitions + 1):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            start = now(size)
            variants[name]()
            if repetition:
                seconds[name].append(now(size) - start)
    return seconds


def compare(title: str, seconds: dict[str, list[float]], tokens: int) -> dict:
    """Medians, tokens per second and the ratios to the baseline; prints them, losses as plainly as wins."""
    rows = {}
    print(f"\n{title}\n{'':32}{'seconds':>10}{'tokens/s':>11}{'ratio':>8}   quartiles")
    for name, values in seconds.items():
        ratios = [base / own for base, own in zip(seconds[BASELINE], values, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        median = statistics.median(values)
        rows[name] = {
            "seconds": round(median, 5), "tokens_per_second": round(tokens / median, 1),
            "ratio": round(ratio, 3), "quartiles": [round(low, 3), round(high, 3)], "rounds": len(values),
        }  # fmt: skip
        verdict = "" if name == BASELINE else "wins" if low > 1 else "LOSES" if high < 1 else "level"
        print(f"{name:32}{median:10.4f}{tokens / median:11.0f}{ratio:8.2f}   {low:.2f} - {high:.2f}   {verdict}")
    return rows


def block_suite(size: dict, repetitions: int) -> dict:
    """Forward and backward of one sparse block: the model's shape, and the paper's with fewer rounds."""
    results = {}
    shapes = [({}, size["batch"] * size["sequence"], repetitions, (*MIXTRAL, *CHAINS))]
    if size["model"]["hidden_size"] != PAPER_BLOCK["hidden_size"]:
        shapes.append((PAPER_BLOCK, size["paper_block_tokens"], max(3, repetitions // 4), NO_LOOPS))
    for overrides, tokens, rounds, names in shapes:
        variants = {name: block_step(name, size, overrides, tokens) for name in names}
        hidden, width = ((size["model"] | overrides)[key] for key in ("hidden_size", "intermediate_size"))
        title = f"block, hidden {hidden}, expert width {width}, {tokens} tokens, forward + backward"
        results[title] = compare(title, alternate(variants, size, rounds), tokens)
    return results


def block_step(name: str, size: dict, overrides: dict, tokens: int):
    block = build(name, size, num_hidden_layers=1, **overrides).model.layers[0].mlp
    hidden_states = torch.randn(1, tokens, (size["model"] | overrides)["hidden_size"], dtype=block.gate.weight.dtype)
    hidden_states = hidden_states.to(size["device"])

    def step():
        block.zero_grad(set_to_none=True)
        x = hidden_states.clone().requires_grad_()
        block(x).backward(hidden_states)
        block.zero_grad(set_to_none=True)

    return step


def train_step(name: str, size: dict):
    model = build(name, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (size["batch"], size["sequence"]), device=size["device"])

    def step():
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train_step_suite(size: dict, repetitions: int) -> dict:
    """A whole optimizer step with AdamW, and the operations that take most of it."""
    tokens = size["batch"] * size["sequence"]
    variants = {name: train_step(name, size) for name in (*MIXTRAL, *CHAINS)}
    title = f"train step, {size['batch']} x {size['sequence']} tokens, AdamW"
    results = {title: compare(title, alternate(variants, size, repetitions), tokens)}
    for name in (BASELINE, "CoE-1(8/64)", "CoE-2(4/64)"):
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (size["device"] == "cuda")
        with profile(activities=activities) as profiler:
            variants[name]()
        key = "self_device_time_total" if size["device"] == "cuda" else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in events)
        shares = {event.key: round(getattr(event, key) / total, 4) for event in events[:12]}
        results[f"where the step's time goes, {name}"] = shares
        print(f"{name}: " + ", ".join(f"{operation} {share:.1%}" for operation, share in list(shares.items())[:8]))
    return results


def decode_suite(size: dict, repetitions: int) -> dict:
    """Greedy generation from a 16-token prompt with the dynamic cache."""
    models = {name: build(name, size).eval() for name in (BASELINE, *CHAINS)}
    models[BASELINE].config.output_router_logits = False  # or it would compute the auxiliary loss while decoding
    results = {}
    for batch in size["decode_batches"]:
        prompt = torch.randint(3, size["model"]["vocab_size"], (batch, 16), device=size["device"])

        length = {"max_new_tokens": size["new_tokens"], "min_new_tokens": size["new_tokens"], "pad_token_id": 0}
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, **length}
        variants = {name: functools.partial(model.generate, prompt, **options) for name, model in models.items()}
        title = f"decode, batch {batch}, {size['new_tokens']} new tokens"
        results[title] = compare(title, alternate(variants, size, repetitions), batch * size["new_tokens"])
    return results


def saved_bytes(function, given) -> int:
    """Bytes of the distinct storages that autograd keeps after `function()`, beyond those of the tensors `given`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(size for size, _ in kept.values())


def memory_suite(size: dict, repetitions: int) -> dict:
    """What a sparse block keeps for backward, and the peak of a train step beyond weights and optimizer states."""
    results = {}
    tokens = size["batch"] * size["sequence"]
    for overrides in ({}, PAPER_BLOCK):
        hidden, width = ((size["model"] | overrides)[key] for key in ("hidden_size", "intermediate_size"))
        title = (
            f"bytes a block keeps for backward, hidden {hidden}, width {width}, {tokens} tokens (saved-tensor hooks)"
        )
        rows = {}
        for name in NO_LOOPS:
            block = build(name, size, num_hidden_layers=1, **overrides).model.layers[0].mlp
            x = torch.randn(1, tokens, hidden, dtype=block.gate.weight.dtype, device=size["device"])
            x.requires_grad_()
            rows[name] = saved_bytes(lambda block=block, x=x: block(x), (*block.parameters(), x))
        results[title] = print_bytes(title, rows)
    steps = {name: train_step(name, size) for name in NO_LOOPS}
    title = "peak of a train step beyond weights and optimizer states (torch's allocator)"
    for step in steps.values():
        step()
    device = torch.device(size["device"])
    results[title] = rows = print_bytes(title, {name: peak_bytes(step, device) for name, step in steps.items()})
    config = build("CoE-1(8/64)", size).config
    predicted = {
        implementation: sum(training_memory(config, TrainingSetup(
            batch_size=size["batch"], sequence_length=size["sequence"], dtype=size["dtype"],
            experts_implementation=implementation,
        )).values()) for implementation in ("grouped_mm", "coe")
    }  # fmt: skip
    saving = {
        "measured": rows[BASELINE]["bytes"] - rows["CoE-1(8/64)"]["bytes"],
        "predicted": predicted["grouped_mm"] - predicted["coe"],
    }
    results["bytes CoE-1(8/64) saves at the peak against mixtral, and budget.py's prediction"] = saving
    print(f"CoE-1 saves {saving['measured'] / 2**20:.1f} MiB at the peak; predicted {saving['predicted'] / 2**20:.1f}")
    return results


def print_bytes(title: str, rows: dict[str, int]) -> dict:
    print(f"\n{title}")
    for name, value in rows.items():
        verdict = "" if name == BASELINE else "less" if value < rows[BASELINE] else "MORE"
        print(f"{name:32}{value / 2**20:10.1f} MiB{value / rows[BASELINE]:8.2f}   {verdict}")
    return {name: {"bytes": value, "ratio": round(value / rows[BASELINE], 3)} for name, value in rows.items()}


def load_suite(size: dict, repetitions: int) -> dict:
    """`from_pretrained` of a local safetensors checkpoint; Mixtral's holds one tensor per expert, ours fused ones."""
    with tempfile.TemporaryDirectory() as folder:
        variants = {}
        for name in (BASELINE, "CoE-1(8/64)", "CoE-2(4/64)"):
            model = build(name, size)
            path = str(Path(folder) / name.replace("/", "_"))
            model.save_pretrained(path)
            variants[name] = functools.partial(type(model).from_pretrained, path)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        title = f"load, {parameters / 1e6:.1f} M parameters (the column tokens/s counts loads)"
        return {title: compare(title, alternate(variants, size, repetitions), 1)}


SUITES = {
    "block": block_suite,
    "train_step": train_step_suite,
    "decode": decode_suite,
    "memory": memory_suite,
    "load": load_suite,
}


def machine(size: dict) -> dict:
    clock = "CPU time of the process" if size["device"] == "cpu" else "wall time"
    return environment(torch.device(size["device"])) | {"clock": clock, "load_average": os.getloadavg()}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--repetitions", type=int, default=12, help="rounds of every suite after the warm-up")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, for the CPU size")
    parser.add_argument("--output", type=Path, help="JSON file; suites already in it that do not run now are kept")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    if size["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--size gpu needs a CUDA device; use --size cpu")
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: at least 1")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    where = machine(size)
    for suite in options.suites:
        measured = SUITES[suite](size, options.repetitions)
        results[suite] = {"machine": where, "size": size, "results": measured}
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.output, results)


if __name__ == "__main__":
    main()

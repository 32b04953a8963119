# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What experts of 8 and 4 bits save and how fast they decode: file, resident memory, tokens a second, all on CPU.

    OMP_NUM_THREADS=1 python train/studies/low_bits.py --output model_cards/studies/low_bits.json

A chain of the paper's shape, CoE-2(4/64), and transformers' Mixtral of the same size, MoE(8/64), both with `coe`
experts in bf16 and random weights. The chain is also decoded with half of it on disk, and trained for a few steps
through adapters on its experts. Every round decodes with each model in turn, the first round is a warm-up. Seconds
are CPU time of this process, which other processes cannot take away. A ratio is the time of the same family's bf16
over a model's own in the same round: the median, and the quartiles beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from modeling_coe import CoEConfig, CoEForCausalLM, QuantizedExpertsConfig, quantized_share
from modeling_coe.train.report import environment
from modeling_coe.train.runs import write_json


PAPER = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": 64,
}  # fmt: skip
TINY = PAPER | {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 8}
FAMILIES = {
    "CoE-2(4/64)": lambda sizes: CoEForCausalLM(CoEConfig(num_iterations=2, num_experts_per_tok=4, **sizes)),
    "Mixtral MoE(8/64)": lambda sizes: MixtralForCausalLM(MixtralConfig(num_experts_per_tok=8, **sizes)),
}
CHAIN = "chain"
FOLDERS = {"CoE-2(4/64)": CHAIN, "Mixtral MoE(8/64)": "mixtral"}
VARIANTS = {
    "bf16": None,
    "experts int8": {"bits": 8},
    "all int8": {"bits": 8, "rest_bits": 8},
    "experts int4": {"bits": 4},
    "experts int4, rest int8": {"bits": 4, "rest_bits": 8},
    "experts int4, groups of 64": {"bits": 4, "group_size": 64},
    "experts int4, groups of 64, rest int8": {"bits": 4, "group_size": 64, "rest_bits": 8},
}
STEPS = {1: 8, 8: 4, 16: 2}
# In a process of its own: what a model adds to the resident memory of Python, torch and transformers, whose modules a
# small model has loaded before. Each weight is read once, for those that transformers maps from the file are not
# resident before.
LOAD = """
import sys, tempfile, torch, transformers, modeling_coe
small = modeling_coe.CoEForCausalLM(modeling_coe.CoEConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=4,
    num_attention_heads=4
))
with tempfile.TemporaryDirectory() as folder:
    small.save_pretrained(folder)
    quantised = modeling_coe.QuantizedExpertsConfig(bits=4, rest_bits=8)
    transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised)
del small
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(fields["VmRSS"].split()[0])
before = resident()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="coe", dtype="bfloat16")
for parameter in model.parameters():
    vars(parameter).get("values", parameter.data).view(torch.uint8).max()
print(resident() - before)
"""


# Steps of LoRA on attention and experts; the highest resident memory, and the loss before and after.
ADAPT = """
import sys, torch, transformers, modeling_coe, peft
def resident(name):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(fields[name].split()[0])
torch.set_num_threads(1)
before = resident("VmRSS")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="coe", dtype="bfloat16")
model = peft.get_peft_model(model, modeling_coe.lora_config(model, experts=True, router="none", r=8)).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
tokens = torch.randint(3, model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
losses = []
for _ in range(4):
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(resident("VmHWM") - before, losses[0], losses[-1])
"""
# Decoding with so many bytes of weights in memory and the others on disk, by Accelerate.
OFFLOAD = """
import sys, tempfile, time, torch, transformers, modeling_coe
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    options = {"max_memory": {"cpu": int(sys.argv[2])}, "offload_folder": folder} if int(sys.argv[2]) else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype="bfloat16", experts_implementation="coe", device_map="auto", **options
    )
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())
    tokens = torch.randint(3, model.config.vocab_size, (1, 16))
    model.generate(tokens, max_new_tokens=2, do_sample=False)
    start = time.perf_counter()
    model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    print(8 / (time.perf_counter() - start), places.count("disk"), len(places))
"""


def write_models(folder: Path, sizes: dict) -> dict:
    """Every family's full and quantised checkpoints; the bytes of their files and their shares by component."""
    files = {}
    for family, build in FAMILIES.items():
        torch.manual_seed(0)
        full = folder / FOLDERS[family] / "bf16"
        torch.set_default_dtype(torch.bfloat16)
        build(sizes).save_pretrained(full)
        torch.set_default_dtype(torch.float32)
        for variant, options in VARIANTS.items():
            path = full.parent / variant
            model = load(full, quantization_config=options and QuantizedExpertsConfig(**options))
            if options is not None:
                model.save_pretrained(path)
            share = {
                f"{name} in {bits} bits": round(share, 4) for (name, bits), share in quantized_share(model).items()
            }
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            files.setdefault(family, {})[variant] = {"bytes": size, "share": share}
            files[family][variant]["of bf16"] = round(size / files[family]["bf16"]["bytes"], 4)
    return files


def load(path: Path, **options):
    options = {name: value for name, value in options.items() if value is not None}
    return AutoModelForCausalLM.from_pretrained(path, experts_implementation="coe", dtype="bfloat16", **options).eval()


def resident_memory(folder: Path) -> dict:
    """Bytes that loading each saved model adds to a fresh process."""
    memory = {}
    for family in FAMILIES:
        memory[family] = {}
        for variant in VARIANTS:
            path = folder / FOLDERS[family] / variant
            size = int(run_apart(LOAD, path)[-1])
            memory[family][variant] = {"bytes": size}
            memory[family][variant]["of bf16"] = round(size / memory[family]["bf16"]["bytes"], 4)
    return memory


def run_apart(script: str, *arguments: object) -> list[str]:
    """The words of the last line that a script prints in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def adapters(folder: Path) -> dict:
    """LoRA on experts in bf16 and in 4 bits: what training adds to a fresh process, and whether the loss falls."""
    rows = {}
    for variant in ("bf16", "experts int4", "experts int4, rest int8"):
        size, first, last = run_apart(ADAPT, folder / CHAIN / variant)
        rows[variant] = {"peak_bytes": int(size), "loss": [round(float(first), 3), round(float(last), 3)]}
        rows[variant]["of bf16"] = round(int(size) / rows["bf16"]["peak_bytes"], 4)
    return rows


def offloading(folder: Path) -> dict:
    """Tokens a second of the bf16 chain, all in memory and with a budget that leaves layers on disk."""
    rows = {}
    for name, budget in {"in memory": 0, "700 MB in memory": 700_000_000}.items():
        speed, on_disk, modules = run_apart(OFFLOAD, folder / CHAIN / "bf16", budget)
        rows[name] = {"tokens_per_second": round(float(speed), 2), "modules_on_disk": f"{on_disk} of {modules}"}
    return rows


@torch.inference_mode()
def decode(model, batch: int, steps: int) -> float:
    """CPU seconds of `steps` greedy steps after a prompt of 16 tokens."""
    prompt = torch.randint(3, model.config.vocab_size, (batch, 16), generator=torch.Generator().manual_seed(0))
    output = model(prompt, use_cache=True, logits_to_keep=1)
    start = time.process_time()
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return time.process_time() - start


def decoding(folder: Path, rounds: int) -> dict:
    """Tokens a second of every model at every batch, and the ratios to bf16 and of the chain to Mixtral."""
    names = [(family, variant) for family in FAMILIES for variant in VARIANTS]
    models = {name: load(folder / FOLDERS[name[0]] / name[1]) for name in names}
    results = {}
    for batch, steps in STEPS.items():
        seconds = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                measured = decode(models[name], batch, steps)
                if number:
                    seconds[name].append(measured)
        rows = results[f"batch {batch}"] = {}
        for (family, variant), own in seconds.items():
            rows.setdefault(family, {})[variant] = {
                "tokens_per_second": round(batch * steps / statistics.median(own), 2),
                "ratio to bf16": ratio(seconds[family, "bf16"], own),
            }
            if ("Mixtral MoE(8/64)", variant) in seconds:
                rows[family][variant]["ratio to Mixtral"] = ratio(seconds["Mixtral MoE(8/64)", variant], own)
        print(json.dumps({f"batch {batch}": rows}, indent=1), flush=True)
    return results


def ratio(baseline: list[float], own: list[float]) -> list[float]:
    """Median and quartiles."""
    ratios = [a / b for a, b in zip(baseline, own, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [round(middle, 3), round(low, 3), round(high, 3)]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="after the warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = TINY if options.tiny else PAPER
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        results = {
            "machine": environment(torch.device("cpu")) | {"threads": options.threads, "clock": "CPU time"},
            "sizes": sizes,
            "files": write_models(folder, sizes),
        }
        sections = {
            "resident memory": partial(resident_memory, folder),
            "adapters": partial(adapters, folder),
            "offloading": partial(offloading, folder),
            "decoding": partial(decoding, folder, options.rounds),
        }
        for name, measure in sections.items():
            results[name] = measure()
            if options.output:
                # What other scripts measured stays.
                before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
                write_json(options.output, before | results)


if __name__ == "__main__":
    main()

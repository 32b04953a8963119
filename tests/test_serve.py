# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The server, asked by the real `openai` client: answers, streams, crowds and bad requests; and the pipelines."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import build, whitespace_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import modeling_coe


openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

SERVER = Path(__file__).parents[1] / "train" / "serve.py"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
QUESTIONS = [f"w{30 + i} w8 w{60 + i}" for i in range(32)]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint that answers without end: its generation has no end token."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = whitespace_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    build(eos_token_id=None).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def refusal_of(url: str, content: bytes) -> urllib.error.HTTPError:
    """The answer to a request that is refused."""
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=60)
    return refusal.value


def serve(checkpoint: Path, *options: str):
    """Starts the server as a user does; yields a client when it answers, and ends it afterwards."""
    port = free_port()
    command = [sys.executable, SERVER, checkpoint, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = checkpoint.parent / f"server-{port}.log"
    with log.open("w") as file, subprocess.Popen([*command, *options], stdout=file, stderr=file) as process:
        try:
            while not is_up(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def client(checkpoint):
    yield from serve(checkpoint)


@pytest.fixture(scope="module")
def batching_client(checkpoint):
    yield from serve(checkpoint, "--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256")


def ask(client, checkpoint: Path, question: str, **options):
    return client.chat.completions.create(
        model=str(checkpoint), messages=[{"role": "user", "content": question}], max_tokens=NEW_TOKENS, **options
    )


def answer(client, checkpoint: Path, question: str) -> str:
    return ask(client, checkpoint, question).choices[0].message.content


def expected(checkpoint: Path, question: str) -> str:
    """The greedy answer of the model itself."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    inputs = tokenizer(question + " ", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_server_gives_the_models_own_answer_whole_and_streamed(client, checkpoint):
    question = QUESTIONS[0]
    whole = answer(client, checkpoint, question)
    assert whole.split() == expected(checkpoint, question).split() and len(whole.split()) == NEW_TOKENS
    chunks = [
        chunk.choices[0].delta.content or ""
        for chunk in ask(client, checkpoint, question, stream=True)
        if chunk.choices
    ]
    assert "".join(chunks).split() == whole.split()
    assert sum(bool(chunk) for chunk in chunks) > 1  # it came in pieces


def test_transformers_chat_talks_to_the_server(client, checkpoint):
    command = [Path(sys.executable).with_name("transformers"), "chat", checkpoint, str(client.base_url).rstrip("/")]
    chat = subprocess.run(
        [*command, "do_sample=False", f"max_new_tokens={NEW_TOKENS}"], input=f"{QUESTIONS[0]}\n!exit\n",
        env={**os.environ, "HF_HUB_OFFLINE": "0"}, cwd=checkpoint.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert expected(checkpoint, QUESTIONS[0]) in " ".join(chat.stdout.split()), chat.stderr[-3000:]


BAD_VALUES = [
    {"messages": None},
    {"messages": []},
    {"messages": "w5 w6"},
    {"messages": ["w5 w6"]},
    {"messages": [{"content": "w5 w6"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"max_completion_tokens": 0},
    {"temperature": -1},
    {"top_p": 7},
    {"frequency_penalty": -3},
    {"seed": "w5"},
    {"stop": 5},
    {"stream": True, "stop": 5},
    {"logit_bias": {"w5": 1}},
    {"generation_config": "{"},
    {"chat_template_kwargs": 5},
    {"tools": "w5"},
    {"no_such_field": 1},
]


def test_wrong_values_are_refused_by_name_and_the_server_lives_on(client, checkpoint):
    url = f"{client.base_url}chat/completions"
    good = {"model": str(checkpoint), "messages": [{"role": "user", "content": "w5 w6"}]}
    for bad in BAD_VALUES:
        refusal = refusal_of(url, json.dumps(good | bad).encode())
        assert refusal.code == 422 and list(bad)[-1] in refusal.read().decode(), bad
    assert refusal_of(url, json.dumps({"model": str(checkpoint)}).encode()).code == 422
    assert answer(client, checkpoint, QUESTIONS[1])


def test_bad_requests_are_refused_and_the_server_lives_on(client, checkpoint):
    for call, content in [
        ("chat/completions", b"{"),
        ("chat/completions", b"[1, 2]"),
        ("completions", b'{"prompt": 5}'),
        ("completions", b'{"prompt": "w5", "max_tokens": -1}'),
        ("responses", b"{}"),
        ("responses", b'{"input": []}'),
        ("no-such-call", b"{}"),
    ]:
        assert 400 <= refusal_of(str(client.base_url) + call, content).code < 500, (call, content)
    assert answer(client, checkpoint, QUESTIONS[1])


def test_openai_client_sees_a_refusal_as_one(client, checkpoint):
    with pytest.raises(openai.BadRequestError):
        ask(client, Path("no-such/model"), QUESTIONS[0])
    with pytest.raises(openai.UnprocessableEntityError) as refusal:
        ask(client, checkpoint, QUESTIONS[0], temperature=-1)
    assert refusal.value.response.json()["detail"][0]["loc"] == ["temperature"]


@pytest.mark.slow
def test_32_at_once_get_the_answers_they_would_get_alone(client, checkpoint):
    crowd_gets_its_own_answers(client, checkpoint)


@pytest.mark.slow
def test_32_at_once_with_continuous_batching_get_the_answers_they_would_get_alone(batching_client, checkpoint):
    crowd_gets_its_own_answers(batching_client, checkpoint)


def crowd_gets_its_own_answers(client, checkpoint: Path):
    with ThreadPoolExecutor(32) as crowd:
        together = list(crowd.map(lambda question: answer(client, checkpoint, question), QUESTIONS))
    assert len(set(together)) > 16  # the questions have different answers
    for question in QUESTIONS[::8]:
        assert together[QUESTIONS.index(question)].split() == expected(checkpoint, question).split()


def test_pipelines_generate_and_classify(checkpoint, tmp_path):
    speak = pipeline("text-generation", model=str(checkpoint))
    batch = speak(QUESTIONS[:3], batch_size=3, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False)
    for question, (result,) in zip(QUESTIONS, batch, strict=False):
        assert result["generated_text"].split() == expected(checkpoint, question).split()

    classifier = build(modeling_coe.CoEForSequenceClassification, num_labels=3)
    classifier.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(tmp_path)
    (scores,) = pipeline("text-classification", model=str(tmp_path), top_k=None)([QUESTIONS[0]])
    logits = classifier(**tokenizer(QUESTIONS[0], return_tensors="pt")).logits
    assert {s["label"]: s["score"] for s in scores} == pytest.approx(
        {f"LABEL_{i}": p for i, p in enumerate(torch.softmax(logits[0], -1).tolist())}, abs=1e-5
    )


def test_what_vllm_and_sglang_read_of_a_checkpoint_is_there(checkpoint):
    """Read in vLLM 0.33 and SGLang 0.5.23; neither was run."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.is_backend_compatible() and model.config.base_model_tp_plan
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (7, 2)
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_coe.CoEModel"
    ids = torch.tensor([[5, 6, 7]])
    options = {"position_ids": torch.arange(3)[None], "use_cache": False, "return_dict": False}
    assert torch.equal(model.model(input_ids=ids, **options)[0], model.model(ids).last_hidden_state)
    block, calls = model.model.layers[0].mlp, []
    assert {name: parameter.dim() for name, parameter in block.experts.named_parameters()} == {
        "gate_up_proj": 3,
        "down_proj": 3,
    }
    assert [name for name, _ in block.named_modules() if "gate" in name] == ["gate"]
    block.experts.register_forward_pre_hook(
        lambda module, inputs, keywords: calls.append((len(inputs), keywords)), with_kwargs=True
    )
    model(ids)
    assert calls == [(3, {})] * model.config.num_iterations  # x, index, weights; by position

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The server, asked by the real `openai` client: answers, streams, long and bad requests; and the pipelines."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import build, whitespace_tokenizer
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

import modeling_coe


openai = pytest.importorskip("openai")
serve = pytest.importorskip("modeling_coe.train.serve")


SERVER = Path(__file__).parents[1] / "train" / "serve.py"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
QUESTIONS = [f"w{30 + i} w8 w{60 + i}" for i in range(32)]
NEW_TOKENS = 6
CONTEXT = 100_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint that answers without end: its generation has no end token."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = whitespace_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    build(eos_token_id=None, max_position_embeddings=CONTEXT).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(checkpoint):
    """The server as a user starts it, its address, and its log."""
    port = free_port()
    log = checkpoint.parent / f"server-{port}.log"
    command = [sys.executable, SERVER, checkpoint, "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(checkpoint / "no-cache")}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        try:
            while not is_up(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            yield process, f"http://127.0.0.1:{port}", log
        finally:
            process.kill()


@pytest.fixture
def engine(checkpoint):
    return serve.Engine(str(checkpoint), "cpu")


def is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)


def refusal_of(url: str, content: bytes, **headers) -> urllib.error.HTTPError:
    """The answer to a request that is refused."""
    request = urllib.request.Request(url, content, {"Content-Type": "application/json", **headers})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=300)
    return refusal.value


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


def test_completions_count_their_tokens_and_stop_at_a_stop(client, checkpoint):
    complete = client.completions.create
    whole = complete(model=str(checkpoint), prompt=QUESTIONS[2], max_tokens=NEW_TOKENS)
    words = whole.choices[0].text.split()
    assert words == expected(checkpoint, QUESTIONS[2]).split() and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, NEW_TOKENS)
    stop = [f"{words[3]} {words[4]}", "nowhere"]
    options = {"model": str(checkpoint), "prompt": QUESTIONS[2], "max_tokens": NEW_TOKENS, "stop": stop}
    stopped = complete(**options).choices[0]
    assert stopped.text.split() == words[:3] and stopped.finish_reason == "stop"
    *pieces, last = [chunk.choices[0] for chunk in complete(**options, stream=True)]
    assert "".join(piece.text for piece in pieces) == stopped.text and last.finish_reason == "stop"


def test_a_seed_repeats_a_drawn_answer_and_temperature_zero_draws_nothing(client, checkpoint):
    def draw(**options):
        return ask(client, checkpoint, QUESTIONS[3], **options).choices[0].message.content

    assert draw(temperature=2.0, seed=5) == draw(temperature=2.0, seed=5) != draw(temperature=2.0, seed=6)
    greedy = expected(checkpoint, QUESTIONS[3]).split()
    for temperature in (0, 1e-300, 1e-30):
        assert draw(temperature=temperature, seed=5).split() == greedy
    assert draw(temperature=1, top_p=1e-9).split() == greedy


def test_the_one_model_is_listed_without_a_cache_and_nothing_else_is_served(server, client, checkpoint):
    assert [model.id for model in client.models.list()] == [str(checkpoint)]
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        ask(client, Path("no-such/model"), QUESTIONS[0])
    for route in ("load_model", "reset", "v1/responses", "v1/audio/transcriptions", "docs"):
        assert refusal_of(f"{server[1]}/{route}", b'{"model": "/etc"}').code == 404
    assert refusal_of(f"{server[1]}/health", None, Host="evil.example").code == 400


BAD_VALUES = [
    {"messages": None},
    {"messages": []},
    {"messages": "w5 w6"},
    {"messages": ["w5 w6"]},
    {"messages": [{"content": "w5 w6"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "tool", "content": "w5"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {"messages": [{"role": "user", "content": "w5 \ud800"}]},
    {"messages": [{"role": "user", "content": ""}]},
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"max_tokens": True},
    {"max_tokens": 2.5},
    {"max_completion_tokens": 0},
    {"temperature": -1},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"top_p": 7},
    {"top_p": 0},
    {"frequency_penalty": -3},
    {"seed": "w5"},
    {"seed": 2**63},
    {"seed": -1},
    {"stop": 5},
    {"stop": ""},
    {"stop": ["w5", ""]},
    {"stream": "yes"},
    {"n": 2},
    {"logprobs": True},
    {"top_logprobs": 3},
    {"response_format": {"type": "json_object"}},
    {"logit_bias": {"w5": 1}},
    {"generation_config": "{}"},
    {"chat_template": "{{ 1 }}"},
    {"chat_template_kwargs": {"n": 10**9}},
    {"tools": []},
    {"no_such_field": 1},
]


def test_wrong_values_and_what_it_does_not_do_are_refused_by_name_and_the_server_lives_on(client, checkpoint):
    url = f"{client.base_url}chat/completions"
    good = {"model": str(checkpoint), "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 1}
    for bad in BAD_VALUES:
        refusal = refusal_of(url, json.dumps(good | bad).encode())
        error = json.loads(refusal.read())["error"]
        assert refusal.code == 422 and error["param"].startswith(list(bad)[-1]), (bad, error)
    assert answer(client, checkpoint, QUESTIONS[1])


def test_bodies_that_are_no_requests_are_refused_and_the_server_lives_on(client, checkpoint):
    model = json.dumps(str(checkpoint)).encode()
    for call, content in [
        ("chat/completions", b"{"),
        ("chat/completions", b"[1, 2]"),
        ("chat/completions", b"\xff\xfe"),
        ("chat/completions", b'{"\\ud800": 1}'),
        ("chat/completions", b"[" * 100_000),
        ("chat/completions", b'{"model": ' + model + b"}"),
        ("completions", b'{"model": ' + model + b', "prompt": 5}'),
        ("completions", b'{"model": ' + model + b', "prompt": ["w5", "w6"]}'),
        ("completions", b'{"model": ' + model + b', "prompt": ""}'),
        ("completions", b'{"model": ' + model + b', "prompt": "w5", "echo": true}'),
        ("completions", b'{"model": ' + model + b', "prompt": "w5", "max_tokens": ' + b"9" * 5000 + b"}"),
    ]:
        assert 400 <= refusal_of(str(client.base_url) + call, content).code < 500, (call, content[:99])
    with pytest.raises(openai.UnprocessableEntityError) as refusal:
        ask(client, checkpoint, QUESTIONS[0], temperature=-1)
    assert refusal.value.param == "temperature" and "greater than or equal to 0" in refusal.value.message
    assert answer(client, checkpoint, QUESTIONS[1])


def test_the_context_bounds_prompt_and_answer(client, checkpoint, engine):
    with pytest.raises(openai.UnprocessableEntityError, match=rf"{CONTEXT} tokens; the model reads"):
        ask(client, checkpoint, "w9 " * CONTEXT)
    with pytest.raises(openai.APIStatusError, match="413"):
        ask(client, checkpoint, "w9 " * 2**20)
    engine.model.config.max_position_embeddings = 20
    request = serve.CompletionRequest(model="it", prompt="w9 " * 15, max_tokens=1_000_000)
    ids = engine.encode(request)
    assert engine.generate(ids, request, TextStreamer(engine.tokenizer), serve.Halt()) == (5, "length")
    with pytest.raises(serve.RequestValidationError, match="20 tokens; the model reads from 1 to 19"):
        engine.encode(serve.CompletionRequest(model="it", prompt="w9 " * 20))


def test_what_a_request_leaves_out_is_that_of_the_checkpoint(engine, monkeypatch):
    engine.model.config.max_position_embeddings = 10
    settings, generate, passed = engine.model.generation_config, engine.model.generate, {}
    monkeypatch.setattr(
        engine.model, "generate", lambda *ids, **options: passed.update(options) or generate(*ids, **options)
    )

    def used(**fields) -> tuple:
        """The number of new tokens, and how they were drawn."""
        passed.clear()
        request = serve.CompletionRequest(model="it", prompt="w9 w8", **fields)
        count, _ = engine.generate(engine.encode(request), request, TextStreamer(engine.tokenizer), serve.Halt())
        return count, *(passed.get(name) for name in ("do_sample", "temperature", "top_p", "top_k"))

    assert used(top_p=0.5) == (8, True, 1.0, 0.5, 0)
    settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k = 4, 0.7, 0.9, 20
    assert used() == (4, None, None, None, None)
    assert used(top_p=0.5) == (4, True, 0.7, 0.5, 20)
    assert used(temperature=1.5) == (4, True, 1.5, 0.9, 20)
    assert used(max_tokens=6, temperature=0) == (6, False, None, None, None)
    engine.model.config.max_position_embeddings = 5
    assert used()[0] == 3


def answer_without_end(client, checkpoint, **options):
    """100,000 tokens, which take longer than a test may."""
    return client.completions.create(model=str(checkpoint), prompt=QUESTIONS[4], max_tokens=1_000_000, **options)


def test_a_running_request_ends_with_its_client_and_holds_up_neither_health_nor_models(server, client, checkpoint):
    with answer_without_end(client, checkpoint, stream=True) as stream:
        for _, chunk in zip(range(5), stream, strict=False):
            assert chunk.choices[0].finish_reason is None
            assert is_up(f"{server[1]}/health") and list(client.models.list())
    assert answer(client, checkpoint, QUESTIONS[1])
    with pytest.raises(openai.APITimeoutError):
        answer_without_end(client, checkpoint, timeout=0.5)
    assert answer(client, checkpoint, QUESTIONS[1])


@pytest.mark.slow
def test_32_at_once_get_the_answers_they_would_get_alone(client, checkpoint):
    with ThreadPoolExecutor(32) as crowd:
        together = list(crowd.map(lambda question: answer(client, checkpoint, question), QUESTIONS))
    assert len(set(together)) > 16  # the questions have different answers
    for question in QUESTIONS[::8]:
        assert together[QUESTIONS.index(question)].split() == expected(checkpoint, question).split()


@pytest.mark.slow
def test_no_request_that_its_own_description_suggests_is_answered_with_500(server, checkpoint):
    """Needs `pip install schemathesis`. The model's name is filled in, or nearly all requests would stop at it."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schema, statuses = schemathesis.openapi.from_url(f"{server[1]}/openapi.json"), Counter()

    @hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(data=hypothesis.strategies.data())
    def fuzz(data, operation):
        case = data.draw(operation.as_strategy(generation_mode=data.draw(modes)))
        if isinstance(case.body, dict) and "model" in case.body:
            case.body |= {"model": str(checkpoint), "max_tokens": 3}
        statuses[case.call().status_code] += 1

    modes = hypothesis.strategies.sampled_from(schemathesis.GenerationMode)
    for operation in schema.get_all_operations():
        fuzz(operation=operation.ok())
    print(statuses)
    assert not any(status >= 500 for status in statuses) and {200, 422} <= set(statuses)


def test_terminated_it_ends_although_requests_run_and_wait(server, client, checkpoint):
    """The last test that needs the server."""
    process = server[0]
    with ThreadPoolExecutor(2) as crowd, answer_without_end(client, checkpoint, stream=True) as stream:
        next(iter(stream))  # this one runs, the other two wait
        waiting = [crowd.submit(answer_without_end, client, checkpoint) for _ in range(2)]
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
        for request in waiting:
            with pytest.raises(openai.APIError, match=r"shutting down|Connection error"):
                request.result()


def test_no_code_of_a_checkpoint_runs(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    whitespace_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        serve.Engine(str(tmp_path), "cpu")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_a_chat_template_names_the_other_call(engine):
    message = serve.Message(role="user", content=[{"type": "text", "text": "w5"}, {"type": "text", "text": " w6"}])
    assert engine.render([message]) == "w5 w6 "
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(serve.RequestValidationError, match="roles must alternate"):
        engine.render([message])
    engine.tokenizer.chat_template = None
    with pytest.raises(serve.RequestValidationError, match="/v1/completions"):
        engine.render([message])


def test_an_answer_in_a_chat_begins_without_the_space_that_the_layout_puts_before_it(engine, monkeypatch):
    async def answer(*args):
        for piece in ("", " 4", " apples"):
            yield piece
        yield 3, "stop"

    monkeypatch.setattr(engine, "answer", answer)
    client = TestClient(serve.build_app(engine, ["*"]))
    asked = {"model": engine.name, "messages": [{"role": "user", "content": "w5"}]}
    whole = client.post("/v1/chat/completions", json=asked).json()
    assert whole["choices"][0]["message"]["content"] == "4 apples"
    stream = client.post("/v1/chat/completions", json=asked | {"stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "4 apples"
    text = client.post("/v1/completions", json={"model": engine.name, "prompt": "w5"}).json()
    assert text["choices"][0]["text"] == " 4 apples"


def test_a_mistyped_folder_is_named_at_once():
    with pytest.raises(ValueError, match="no such folder"):
        serve.main(["/no/such/model"])


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

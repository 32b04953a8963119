# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A chain of one iteration in llama.cpp: the same tokens, log-probabilities and greedy text.

The conversion needs llama.cpp's source (`LLAMA_CPP=path/to/llama.cpp`), running it `pip install llama-cpp-python`.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import build, whitespace_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_coe.train import to_gguf
from modeling_coe.train.arguments import DataArguments
from modeling_coe.train.data import load_documents, load_tokenizer


TEXTS = [
    "Question: Mia has 47 apples. Mia buys 5 more. How many apples does Mia have now?\nAnswer:",
    "1234 + 56 = 1290\n\n####  1290  ",
    "It's Zoë's 3rd café; they'll pay 9.50 €, won't they?\t(日本語 and 🚀)",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    documents = load_documents(DataArguments(train_problems=300, validation_problems=5))
    tokenizer = load_tokenizer(None, documents["train"], 400)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # Rows of 64 and 32: llama.cpp's matrices come in blocks.
    sizes = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    build(num_iterations=1, **sizes, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def source():
    """llama.cpp's source folder, as far as the options look at it."""
    folder = os.environ.get("LLAMA_CPP")
    if folder is None:
        pytest.skip("LLAMA_CPP names no source folder of llama.cpp")
    return folder


def test_the_trained_tokenizer_is_one_that_llama_cpp_can_split_like(checkpoint, tmp_path):
    assert to_gguf.splits_digits_and_words(checkpoint / "tokenizer.json")
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"].pop(0)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not to_gguf.splits_digits_and_words(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "option, message",
    [
        ("type=q2", "q8_0"),
        ("llama_cpp=.", "conversion"),
        ("output=.", "is a folder"),
        ("output=no/x.gguf", "not there"),
    ],
)
def test_wrong_options_are_refused_by_name(option, message, tmp_path):
    (tmp_path / "conversion").mkdir()
    options = {"model": "x", "llama_cpp": tmp_path, "output": tmp_path / "x.gguf"}
    name, value = option.split("=")
    with pytest.raises(ValueError, match=message):
        to_gguf.GgufArguments(**{**options, name: value if name == "type" else Path(value)})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, None),
        ({"hidden_act": "swish"}, None),
        ({"sliding_window": 128}, None),
        ({"hidden_act": "gelu"}, "`hidden_act='gelu'`.* SiLU"),
        ({"sliding_window": 127}, "`sliding_window=127`.*`max_position_embeddings=128`.*null"),
    ],
)
def test_what_llama_cpps_mixtral_lacks_is_refused_by_name(overrides, message, tmp_path, monkeypatch):
    model, output = tmp_path / "chain", tmp_path / "chain.gguf"
    build(num_iterations=1, **overrides).save_pretrained(model)
    (tmp_path / "conversion").mkdir()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        to_gguf.main(["--model", str(model), "--llama_cpp", str(tmp_path), "--output", str(output)])
    whitespace_tokenizer().save_pretrained(model)
    monkeypatch.setattr(to_gguf, "convert", lambda mixtral, llama_cpp, output, file_type: output.write_text("GGUF"))
    if message:  # before a large model is read and written for nothing
        monkeypatch.setattr(to_gguf, "downcycle", lambda *_: pytest.fail("downcycle was called"))
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        to_gguf.main(["--model", str(model), "--llama_cpp", str(tmp_path), "--output", str(output)])
    assert output.exists() == (message is None)


def test_llama_cpp_gives_the_same_tokens_log_probabilities_and_text(checkpoint, source, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    output = tmp_path / "chain.gguf"
    to_gguf.main(["--model", str(checkpoint), "--llama_cpp", source, "--output", str(output)])
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    # The default cache is in fp16, and a thousandth away.
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(str(output), n_ctx=128, n_threads=1, logits_all=True, verbose=False, **cache)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert llama.tokenize(text.encode()) == ids
        llama.reset()
        llama.eval(ids)
        logprobs = torch.tensor(llama.scores[: len(ids)]).log_softmax(-1)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        print(f"largest difference of a log-probability {(logprobs - expected).abs().max():.2g}")
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        written = []
        for token in llama.generate(ids, temp=0.0):
            written.append(token)
            if token == tokenizer.eos_token_id or len(written) == 12:
                break
        assert written == greedy

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: one small model with uneven sizes, in which a swapped or transposed matrix cannot pass."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import naive_coe
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from modeling_coe import CoEConfig, CoEForCausalLM


logging.disable_progress_bar()
torch.set_num_threads(1)

SMALL = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_local_experts": 7,
    "num_experts_per_tok": 2,
    "num_iterations": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


def build(model_class=CoEForCausalLM, seed=0, **overrides):
    """A randomly initialised model in evaluation mode; the initial range is wide so that every expert matters."""
    torch.manual_seed(seed)
    model = model_class(CoEConfig(**{**SMALL, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "iteration_scale")):
                parameter.uniform_(0.5, 1.5)
    return model


def tokens(*shape, seed=1, low=3):
    """Random token ids; 0, 1 and 2 (padding, begin, end) do not occur."""
    return torch.randint(low, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def assert_equals_the_naive_decoder(model, ids):
    """Logits and all gradients of one row, `[1, S]`, within 1e-6 of the naive loops; both gradients, by name."""
    parameters = dict(model.named_parameters())

    def run(logits):
        loss = F.cross_entropy(logits[:-1], ids[0, 1:])
        return logits, torch.autograd.grad(loss, list(parameters.values()))

    logits, gradients = run(model(ids).logits[0])
    expected, expected_gradients = run(naive_coe.decoder(ids[0], model, model.config))
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    largest = max(gradient.abs().max() for gradient in expected_gradients)
    for name, gradient, naive in zip(parameters, gradients, expected_gradients, strict=True):
        assert (gradient - naive).abs().max() <= 1e-6 * largest, name
    return dict(zip(parameters, zip(gradients, expected_gradients, strict=True), strict=True))


def assert_compiled_and_exported_equal_eager(model, ids):
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, expected)
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(input_ids=ids, use_cache=False).logits, expected)


def whitespace_tokenizer():
    """Word `w7` is token 7."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SMALL["vocab_size"])}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")


@pytest.fixture
def model():
    return build()

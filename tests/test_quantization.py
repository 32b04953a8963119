# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Weights of few bits reach the experts, in files, in memory and in every product, and say how many they are."""

import pytest
import torch
from conftest import build, tokens


def visit(experts, num_tokens, seed=1):
    """One visit of an expert pool by tokens that choose two experts each; the last choice is another rank's expert."""
    generator = torch.Generator().manual_seed(seed)
    dtype, hidden = experts.down_proj.dtype, experts.down_proj.shape[1]
    hidden_states = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    index = torch.rand(num_tokens, experts.num_experts, generator=generator).topk(2).indices
    weights = torch.rand(num_tokens, 2, generator=generator)
    index[-1, 1], weights[-1, 1] = experts.num_experts, 0
    return experts(hidden_states.requires_grad_(torch.is_grad_enabled()), index, weights)


def difference(got, expected):
    return ((got - expected).double().norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_packed_by_torchao_are_read_one_at_a_time(dtype):
    """In every mode, decoding and on whole sequences, equal to the eager experts on the same values."""
    torchao = pytest.importorskip("torchao.quantization")
    packed, plain = (build().to(dtype).model.layers[0].mlp.experts for _ in range(2))
    plain.config._experts_implementation = "eager"
    names = {name: torchao.Int8WeightOnlyConfig() for name in ("gate_up_proj", "down_proj")}
    torchao.quantize_(packed, torchao.FqnToConfig(names), filter_fn=None)
    for name in names:
        weight = getattr(packed, name)
        assert type(weight).__name__ == "Int8Tensor"
        getattr(plain, name).data = torch.stack([weight[i].dequantize() for i in range(len(weight))]).to(dtype)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for num_tokens in (1, 3, 40):
            with context():
                got, expected = visit(packed, num_tokens), visit(plain, num_tokens)
            assert difference(got, expected) <= {torch.float32: 1e-6, torch.float16: 2e-3}.get(dtype, 2e-2)
            assert got.requires_grad == (context is torch.enable_grad) and got.dtype == dtype


def test_a_model_whose_experts_torchao_packed_generates(model):
    torchao = pytest.importorskip("torchao.quantization")
    names = {f"re:.*experts.{name}": torchao.Int8WeightOnlyConfig() for name in ("gate_up_proj", "down_proj")}
    torchao.quantize_(model, torchao.FqnToConfig(names), filter_fn=None)
    assert model.generate(tokens(2, 5), max_new_tokens=3).shape == (2, 8)

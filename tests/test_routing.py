# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The record of which experts fire in which iteration, against loops over the router's own choices."""

import math

import pytest
import torch
from conftest import build, tokens

from modeling_coe.routing import Routing, plot_routing, record_routing


def watched_choices(model, input_ids):
    """What every router call returned as expert index, in the order of the calls: layer by layer, by iteration."""
    calls = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: calls.append(output[2]))
        for layer in model.model.layers
    ]
    model(input_ids)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("overrides", [{}, {"independent_gating": False}, {"num_iterations": 1}])
def test_record_holds_the_experts_that_the_routers_chose(overrides):
    model = build(**overrides)
    routing = record_routing(model, tokens(2, 9))
    assert routing.experts.shape == (2, model.config.num_iterations, 18, 2)
    for recorded, chosen in zip(routing.experts.flatten(0, 1), watched_choices(model, tokens(2, 9)), strict=True):
        assert torch.equal(recorded, chosen)


def test_padding_is_left_out():
    model, ids = build(), tokens(1, 6)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    assert torch.equal(record_routing(model, padded, mask).experts, record_routing(model, ids).experts)
    assert record_routing(model, padded).experts.shape[2] == 11


def test_summaries_equal_counting_by_hand():
    routing = record_routing(build(), tokens(3, 7))
    L, C, T, K = routing.experts.shape
    for layer in range(L):
        for iteration in range(C):
            visits = routing.experts[layer, iteration].flatten().tolist()
            shares = [visits.count(expert) / len(visits) for expert in range(7)]
            assert routing.load[layer, iteration].tolist() == pytest.approx(shares)
            entropy = -sum(share * math.log(share) for share in shares if share) / math.log(7)
            assert routing.entropy[layer, iteration].item() == pytest.approx(entropy, rel=1e-5)
        for iteration in range(C - 1):
            now, then = routing.experts[layer, iteration].tolist(), routing.experts[layer, iteration + 1].tolist()
            again = sum(len(set(a) & set(b)) for a, b in zip(now, then, strict=True)) / (T * K)
            assert routing.revisits[layer, iteration].item() == pytest.approx(again)
            for i in range(7):
                following = [expert for a, b in zip(now, then, strict=True) if i in a for expert in b]
                visitors = sum(i in a for a in now)
                expected = [following.count(j) / max(visitors, 1) for j in range(7)]
                assert routing.transitions[layer, iteration, i].tolist() == pytest.approx(expected)


def test_entropy_is_one_for_an_even_load_and_zero_for_one_expert():
    even = Routing(torch.arange(6).reshape(1, 1, 3, 2), num_experts=6)
    assert even.entropy.item() == pytest.approx(1)
    one = Routing(torch.zeros(1, 1, 5, 1, dtype=torch.long), num_experts=6)
    assert one.entropy.item() == 0


def test_figure_has_a_panel_for_each_iteration(tmp_path):
    routing = record_routing(build(), tokens(2, 9))
    figure = plot_routing(routing)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert [title.partition(":")[0] for title in titles] == ["iteration 1", "iteration 2", "iteration 3"]
    shown = figure.axes[1].images[0].get_array()
    assert torch.allclose(torch.tensor(shown), routing.load[:, 1] * 7)
    figure.savefig(tmp_path / "routing.png")


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        record_routing(build().train(), tokens(1, 4))

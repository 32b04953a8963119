# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The record of which experts fire in which iteration, against loops over the router's own choices."""

import math

import pytest
import torch
from conftest import build, tokens

from modeling_coe.routing import Routing, plot_routing, plot_transitions, record_routing


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
    even = Routing(torch.arange(6).reshape(1, 1, 3, 2), 6, torch.zeros(1, 1))
    assert even.entropy.item() == pytest.approx(1)
    one = Routing(torch.zeros(1, 1, 5, 1, dtype=torch.long), 6, torch.zeros(1, 1))
    assert one.entropy.item() == 0


@pytest.mark.parametrize("residual", ["nested", "inner", "outer"])
def test_change_is_how_far_an_iteration_moves_its_input(residual):
    model = build(residual=residual)
    block = model.model.layers[0].mlp
    seen = []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    change = record_routing(model, tokens(2, 9)).change
    hook.remove()
    assert change.shape == (2, 3)
    state = seen[0]
    for iteration in range(3):
        update = block.iterate(state, iteration, block.experts)
        after = update if residual == "outer" else state + update
        expected = ((after - state).norm(dim=-1) / state.norm(dim=-1)).mean()
        assert change[0, iteration].item() == pytest.approx(expected.item(), rel=1e-4)
        state = after


def test_recording_leaves_the_model_as_it_was():
    model = build()
    before = model(tokens(2, 9)).logits
    record_routing(model, tokens(2, 9))
    assert not any(layer.mlp._forward_hooks or layer.mlp.gate._forward_pre_hooks for layer in model.model.layers)
    assert torch.equal(model(tokens(2, 9)).logits, before)


def test_specialisation_is_one_where_the_expert_tells_the_kind_and_zero_where_all_kinds_visit_alike():
    kinds = torch.tensor([0, 0, 1, 1])
    by_kind = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    alike = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    routing = Routing(torch.stack([by_kind, alike])[None], 4, torch.zeros(1, 2))
    assert routing.specialisation(kinds)[0].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert routing.visits_by_kind(kinds)[0, 0].tolist() == [[0.25, 0.25, 0, 0], [0, 0, 0.25, 0.25]]
    with pytest.raises(ValueError, match="one kind for each of 4 tokens"):
        routing.specialisation(kinds[:3])


def test_transitions_are_drawn_for_every_layer_and_pair_of_iterations(tmp_path):
    routing = record_routing(build(), tokens(2, 9))
    figure = plot_transitions(routing)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == 2 * 2
    shown = torch.tensor(panels[1].images[0].get_array())
    assert torch.allclose(shown, routing.transitions[1, 0] * 7 / 2)
    figure.savefig(tmp_path / "transitions.png")
    with pytest.raises(ValueError, match="num_iterations"):
        plot_transitions(record_routing(build(num_iterations=1), tokens(2, 9)))


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

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The record of which experts fire in which iteration, against loops over the router's own choices."""

import math

import pytest
import torch
from conftest import build, tokens

from modeling_coe.routing import Routing, plot_cost, plot_routing, plot_transitions, record_routing


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
    for num_experts in (6, 1):
        one = Routing(torch.zeros(1, 1, 5, 1, dtype=torch.long), num_experts, torch.zeros(1, 1))
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


def test_specialisation_is_zero_for_one_kind_of_token_and_exact_for_a_rare_one():
    generator = torch.Generator().manual_seed(0)
    for num_tokens in range(1, 60):
        experts = torch.rand(1, 2, num_tokens, 7, generator=generator).topk(3).indices
        routing = Routing(experts, 7, torch.zeros(1, 2))
        assert routing.specialisation(torch.zeros(num_tokens, dtype=torch.long)).eq(0).all()
    # One token in a million is of the other kind, and only it visits the other expert.
    rare = (torch.arange(10**6) == 5).long()
    routing = Routing(rare[None, None, :, None], 2, torch.zeros(1, 1))
    assert routing.specialisation(rare).item() == 1
    nowhere = Routing(torch.full((1, 1, 4, 1), 7), 7, torch.zeros(1, 1))  # null experts only
    assert nowhere.specialisation(torch.arange(4)).item() == 0


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
    ids = tokens(1, 4)
    with pytest.raises(ValueError, match=r"shape \(4,\) must be `\[batch, length\]`"):
        record_routing(build(), ids[0])
    with pytest.raises(ValueError, match="all of `input_ids` is padding"):
        record_routing(build(), ids, torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        record_routing(build().train(), tokens(1, 4))


def test_null_experts_are_no_visits_and_a_token_s_cost_is_counted_by_kind_and_by_loss():
    model = build(router_bias=True, num_null_experts=3)
    model._routers()[0].e_score_correction_bias.uniform_(-1, 1)
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[2, 4:] = 0
    routing = record_routing(model, ids, mask)
    for recorded, chosen in zip(routing.experts.flatten(0, 1), watched_choices(model, ids), strict=True):
        assert torch.equal(recorded, chosen[mask.flatten().bool()])
    visits = [[[e for e in token if e < 7] for token in row] for row in routing.experts.flatten(0, 1).tolist()]
    counts = torch.tensor([[len(token) for token in row] for row in visits]).float().view(2, 3, 18)
    assert counts.min() < counts.max() and torch.equal(routing.experts_per_token, counts)
    flat = [expert for token in visits[4] for expert in token]
    assert routing.load[1, 1].tolist() == pytest.approx([flat.count(expert) / len(flat) for expert in range(7)])
    again = sum(len(set(a) & set(b)) for a, b in zip(visits[3], visits[4], strict=True))
    assert routing.revisits[1, 0].item() == pytest.approx(again / len(flat))

    kinds = torch.arange(18) % 3
    assert routing.experts_by_kind(kinds)[1, 2, 1].item() == pytest.approx(counts[1, 2, 1::3].mean().item())
    logits = model(ids, attention_mask=mask).logits
    losses = [
        torch.nn.functional.cross_entropy(logits[row, place], ids[row, place + 1]).item()
        if place + 1 < mask[row].sum()
        else None
        for row in range(3)
        for place in range(int(mask[row].sum()))
    ]
    assert [loss is None for loss in losses] == routing.loss.isnan().tolist()
    known = sorted((loss, token) for token, loss in enumerate(losses) if loss is not None)
    mean_loss, experts = routing.experts_by_loss(5)
    assert mean_loss[0].item() == pytest.approx(sum(loss for loss, _ in known[:3]) / 3, rel=1e-4)
    hardest = [token for _, token in known[-3:]]
    assert experts[0, 2, 4].item() == pytest.approx(counts[0, 2, hardest].mean().item())


def test_a_record_without_losses_or_with_one_kind_of_token_says_so():
    routing = record_routing(build(), tokens(1, 6))
    assert routing.specialisation(torch.zeros(6, dtype=torch.long)).eq(0).all()
    with pytest.raises(ValueError, match="This record has no losses"):
        Routing(routing.experts, 7, routing.change).experts_by_loss()


def test_the_cost_of_a_text_is_drawn_token_by_token(tmp_path):
    model = build(router_bias=True, num_null_experts=3)
    routing = record_routing(model, tokens(1, 6), expert_budget=2)
    assert (routing.experts < 7).all()
    routing = record_routing(model, tokens(1, 6))
    figure = plot_cost(routing, ["ab", " cd", "\n", "$e$f", "ghijk", "l"], columns=8)
    axis = figure.axes[0]
    shown = [(text.get_text(), text.get_position()) for text in axis.texts]
    assert shown == [
        ("ab", (0, 0.46)), (" cd", (2, 0.46)), ("¶", (5, 0.46)), (r"\$e\$f", (0, 1.46)), ("ghijk", (0, 2.46)),
        ("l", (5, 2.46)),
    ]  # fmt: skip
    cost = routing.experts_per_token.mean(dim=(0, 1))
    colors = [patch.get_facecolor() for patch in axis.patches]
    assert len(set(colors)) == len(set(cost.tolist()))
    figure.savefig(tmp_path / "cost.png")

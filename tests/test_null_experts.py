# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Null experts: what they compute, what they save, and the budget that says how often they are chosen."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_compiled_and_exported_equal_eager, assert_equals_the_naive_decoder, build, tokens
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_coe
from modeling_coe import CoEConfig, CoEForCausalLM, QuantizedExpertsConfig, downcycle, experts_coe, lora_config
from modeling_coe.balancing import RouterBalance, calibrate_expert_budget


NULL = {"router_bias": True, "num_null_experts": 3, "router_aux_loss_coef": 0.0}
IMPLEMENTATIONS = ["coe", "grouped_mm", "batched_mm", "eager"]


def with_null_experts(bias=0.5, **overrides):
    """A model whose biases differ from expert to expert."""
    model = build(**{**NULL, **overrides})
    for router in model._routers():
        router.e_score_correction_bias.uniform_(-bias, bias)
    return model


def loss_and_gradients(model, ids, **inputs):
    model.zero_grad()
    model.train()
    output = model(ids, labels=ids, **inputs)
    output.loss.backward()
    model.eval()
    return output.logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def experts_per_token(model, ids, **inputs):
    """`[L * C, T]`, how many experts each token really computes."""
    counts = []
    hooks = [
        router.register_forward_hook(lambda gate, args, output: counts.append((output[2] < gate.num_experts).sum(-1)))
        for router in model._routers()
    ]
    with torch.no_grad():
        model(ids, **inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(counts)


@pytest.mark.parametrize("residual", ["nested", "inner", "outer"])
@pytest.mark.parametrize("independent_gating", [True, False])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_model_equals_the_naive_one_in_outputs_and_all_gradients(residual, independent_gating, norm_topk_prob):
    model = with_null_experts(
        residual=residual, independent_gating=independent_gating, norm_topk_prob=norm_topk_prob, num_shared_experts=1
    ).double()
    ids = tokens(1, 6)
    gradients = assert_equals_the_naive_decoder(model, ids)
    routers = [gradient for name, (gradient, _) in gradients.items() if name.endswith("gate.weight")]
    assert all(gradient[:, 7:].abs().max() > 0 for gradient in routers)  # null experts are learned
    counts = experts_per_token(model, ids)
    assert counts.min() < counts.max()  # some tokens chose null experts, and not all the same number


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_null_experts_that_are_never_chosen_change_nothing(norm_topk_prob):
    plain = build(norm_topk_prob=norm_topk_prob)
    model = build(norm_topk_prob=norm_topk_prob, **NULL)
    weights = model.state_dict()
    for name, tensor in plain.state_dict().items():
        target = weights[name]
        target[:, : tensor.shape[1]].copy_(tensor) if name.endswith("gate.weight") else target.copy_(tensor)
    ids = tokens(2, 9)
    assert (model(ids).logits - plain(ids).logits).abs().max() > 0.01
    model.set_expert_budget(2)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_token_that_chooses_null_experts_alone_leaves_the_chain():
    model = with_null_experts(num_iterations=2, num_hidden_layers=1)
    block = model.model.layers[0].mlp
    block.gate.e_score_correction_bias[1, 7:] = 100.0
    x = torch.randn(1, 5, 48)
    once = block.iterate(x, 0, block.experts)
    torch.testing.assert_close(block(x), once, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_all_experts_implementations_skip_null_experts(implementation):
    model = with_null_experts()
    ids = tokens(2, 9)
    logits, gradients = loss_and_gradients(model, ids)
    model.set_experts_implementation(implementation)
    other, other_gradients = loss_and_gradients(model, ids)
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    model.set_experts_implementation("coe")
    with torch.no_grad():
        decoded = torch.cat([model(ids[:, : n + 1]).logits[:, -1:] for n in range(9)], dim=1)
    torch.testing.assert_close(decoded, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [0, 2])
def test_rows_of_null_experts_are_not_computed(budget, monkeypatch):
    model = build(**NULL)
    model.set_expert_budget(budget)
    rows = []
    plain_mm = experts_coe._Groups.mm

    def counting_mm(self, left, weight):
        rows.append(left.shape[0])
        return plain_mm(self, left, weight)

    monkeypatch.setattr(experts_coe._Groups, "mm", counting_mm)
    loss_and_gradients(model, tokens(2, 9))
    assert set(rows) == {budget * 18}


def test_compiled_and_exported_models_equal_the_eager_one():
    assert_compiled_and_exported_equal_eager(with_null_experts(), tokens(2, 7))


def test_gradient_checkpointing_changes_nothing():
    model, ids = with_null_experts(layers_per_pool=2), tokens(2, 7)
    _, gradients = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable()
    _, checkpointed = loss_and_gradients(model, ids)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_the_balancing_loss_counts_the_experts_that_were_chosen_and_no_null_experts():
    model = with_null_experts(router_aux_loss_coef=0.1)
    ids = tokens(2, 7)
    output = model(ids, output_router_logits=True)
    chosen, probability = torch.zeros(7), torch.zeros(7)
    routers = [(router, t) for router in model._routers() for t in range(3)]
    for logits, (router, t) in zip(output.router_logits, routers, strict=True):
        index = (logits + router.e_score_correction_bias[t]).topk(2).indices
        chosen += F.one_hot(index, 10).sum((0, 1))[:7] / 14
        probability += logits[:, :7].softmax(-1).mean(0)
    expected = 7 * (chosen / 6) @ (probability / 6)
    torch.testing.assert_close(output.aux_loss, expected)


def test_a_calibrated_budget_is_kept_on_other_text_and_differs_between_calls():
    model = with_null_experts(num_iterations=2, vocab_size=99)
    calibrate_expert_budget(model, [{"input_ids": tokens(8, 64, seed=seed)} for seed in (1, 2)])
    held_out = tokens(8, 64, seed=3)
    for budget in (0, 0.5, 1.0, 1.6, 2):
        counts = experts_per_token(model, held_out, expert_budget=budget).float()
        assert abs(counts.mean() - budget) <= 0.05, budget
    before = model(held_out).logits
    model.generate(held_out[:1, :4], max_new_tokens=3, expert_budget=0.5)
    torch.testing.assert_close(model(held_out).logits, before, rtol=0, atol=0)


def test_a_budget_that_was_set_is_saved_and_is_that_of_a_call(tmp_path):
    model = with_null_experts()
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    ids = tokens(2, 9)
    expected = model(ids, expert_budget=1.25, output_router_logits=True)
    model.set_expert_budget(1.25)
    output = model(ids, output_router_logits=True)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded = CoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.expert_budget == 1.25
    torch.testing.assert_close(loaded(ids).logits, expected.logits)
    torch.testing.assert_close(loaded(ids, expert_budget=0.5).logits, model(ids, expert_budget=0.5).logits)
    model.set_expert_budget(0.5)
    asked = CoEForCausalLM.from_pretrained(tmp_path, expert_budget=0.5)
    assert asked.config.expert_budget == 0.5
    torch.testing.assert_close(asked(ids).logits, model(ids).logits)


LOADERS = {
    "the class": lambda path, **changed: CoEForCausalLM.from_pretrained(path, **changed),
    "the Auto class": lambda path, **changed: AutoModelForCausalLM.from_pretrained(path, **changed),
    "a configuration": lambda path, **changed: CoEForCausalLM.from_pretrained(
        path, config=AutoConfig.from_pretrained(path, **changed)
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_budget_that_is_asked_for_when_loading_is_computed(loader, tmp_path, caplog):
    model = with_null_experts(expert_budget=1.0)
    model.save_pretrained(tmp_path / "uncalibrated")
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    model.save_pretrained(tmp_path / "calibrated")
    ids = tokens(2, 9)
    for budget in (0, 0.5, 2):
        loaded = LOADERS[loader](tmp_path / "calibrated", expert_budget=budget)
        assert loaded.config.expert_budget == budget
        torch.testing.assert_close(loaded(ids).logits, model(ids, expert_budget=budget).logits)
    loaded = LOADERS[loader](tmp_path / "uncalibrated", expert_budget=2)
    torch.testing.assert_close(loaded(ids).logits, model(ids, expert_budget=2).logits)
    assert not caplog.records
    loaded = LOADERS[loader](tmp_path / "uncalibrated", expert_budget=0.5)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert "`expert_budget=0.5` is not calibrated in" in caplog.text


def test_budgets_calibrated_for_another_number_of_experts_are_forgotten(tmp_path, caplog):
    model = with_null_experts(expert_budget=1.0)
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=1)
    assert (
        "budgets of `" in caplog.text
        and "are those of `num_experts_per_tok=2` and do not hold for 1: call" in caplog.text
    )
    assert (
        experts_per_token(loaded, tokens(2, 9)).float().mean() == 1
    )  # the budget of 1.0 is now that of no null expert
    with pytest.raises(ValueError, match=r"`expert_budget=0\.5` is not calibrated"):
        loaded(tokens(1, 4), expert_budget=0.5)
    caplog.clear()
    AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=3)
    assert [record.getMessage().split("`")[2:4] for record in caplog.records] == [
        [" are those of ", "num_experts_per_tok=2"]
    ]


def test_a_budget_that_nobody_asks_for_is_the_stored_one(tmp_path):
    model, ids = with_null_experts(expert_budget=1.0), tokens(2, 9)
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    model.set_expert_budget(1.0)
    model.save_pretrained(tmp_path / "model")
    peft.get_peft_model(CoEForCausalLM.from_pretrained(tmp_path / "model"), lora_config(model)).save_pretrained(
        tmp_path / "adapter"
    )
    for load in LOADERS.values():
        loaded = load(tmp_path / "model", expert_budget=None)
        assert loaded.config.expert_budget == 1.0
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    for loaded, budget in (
        (CoEForCausalLM.from_pretrained(tmp_path / "adapter"), None),
        (CoEForCausalLM.from_pretrained(tmp_path / "adapter", expert_budget=0.5), 0.5),
    ):
        assert loaded._is_calibrated()
        torch.testing.assert_close(loaded(ids).logits, model(ids, expert_budget=budget).logits)


def test_training_leads_back_from_an_extreme_budget():
    model = with_null_experts(expert_budget=1.0)
    model.set_expert_budget(2)
    model.config.expert_budget = 1.0
    balance, ids = RouterBalance(model.train(), rate=0.05), tokens(4, 32)
    for _ in range(40):
        model(ids, labels=ids)
        balance.step()
    assert abs(experts_per_token(model.eval(), ids).float().mean() - 1) < 0.3


def test_budgets_of_a_call_that_would_go_astray_are_refused():
    model, ids = with_null_experts(), tokens(1, 4)
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    with pytest.raises(
        ValueError, match=r"reach the `assistant_model` as well; call `model.set_expert_budget\(0.5\)`"
    ):
        model.generate(ids, assistant_model=build(), expert_budget=0.5, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"a continuous batch; call `model.set_expert_budget\(0.5\)`"):
        model.generate_batch(ids.tolist(), expert_budget=0.5)


def test_padding_does_not_count_in_the_calibration():
    ids, mask = tokens(4, 32), torch.ones(4, 64, dtype=torch.long)
    mask[:, 32:] = 0
    padded = torch.cat([ids, tokens(4, 32, seed=9)], dim=1)
    tables = []
    for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}, {"input_ids": padded}):
        model = with_null_experts()
        calibrate_expert_budget(model, [batch])
        tables.append(model._routers()[1].null_bias_of_budget)
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-4, atol=1e-4)
    assert (tables[2] - tables[0]).abs().max() > 0.01


def test_the_documents_of_a_packed_row_do_not_see_each_other_in_the_calibration():
    ids = tokens(4, 32)
    packed = {"input_ids": ids.view(2, 64), "position_ids": torch.arange(32).repeat(2)[None].expand(2, -1)}
    tables = []
    for batch in ({"input_ids": ids}, packed):
        model = with_null_experts()
        calibrate_expert_budget(model, [batch])
        tables.append(model._routers()[1].null_bias_of_budget)
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-4, atol=1e-4)


def test_biases_of_a_new_model_are_in_full_precision():
    config = with_null_experts().config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert {buffer.dtype for gate in model._routers() for buffer in gate.buffers()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_stay_in_full_precision(dtype, tmp_path):
    model = with_null_experts()
    biases = [router.e_score_correction_bias.clone() for router in model._routers()]
    model.save_pretrained(tmp_path)
    for moved in (model.to(dtype), CoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        for router, bias in zip(moved._routers(), biases, strict=True):
            assert router.weight.dtype == dtype
            torch.testing.assert_close(router.e_score_correction_bias, bias, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_null_experts": 2}, "`num_null_experts=2` must be 0 without `router_bias=True`"),
        ({"num_null_experts": -1, "router_bias": True}, "`num_null_experts=-1`"),
        ({"expert_budget": 1.5}, "`expert_budget=1.5` must be None without null experts"),
        (
            {"num_null_experts": 3, "router_bias": True, "expert_budget": 2.5},
            r"`expert_budget=2.5` must be a number in \[0, 2\]",
        ),
        ({"num_null_experts": 1, "router_bias": True, "expert_budget": 0.5}, r"must be a number in \[1, 2\]"),
        ({"num_null_experts": 1, "router_bias": True, "expert_budget": float("nan")}, "`expert_budget=nan`"),
    ],
)
def test_impossible_values_are_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        CoEConfig(num_local_experts=7, num_experts_per_tok=2, **fields)


def test_impossible_budgets_of_a_model_are_refused_by_name():
    with pytest.raises(ValueError, match="`expert_budget=1` must be None without null experts"):
        build().set_expert_budget(1)
    with pytest.raises(ValueError, match="`expert_budget=1` must be None without null experts"):
        build()(tokens(1, 3), expert_budget=1)
    model = build(**NULL)
    with pytest.raises(ValueError, match=r"`expert_budget=3` must be a number in \[0, 2\]"):
        model.set_expert_budget(3)
    with pytest.raises(ValueError, match=r"`expert_budget=1\.5` is not calibrated"):
        model.set_expert_budget(1.5)
    with pytest.raises(ValueError, match="no null experts"):
        calibrate_expert_budget(build(), [{"input_ids": tokens(1, 3)}])
    row = {"input_ids": tokens(1, 3)}
    for batches, kinds in (([], "nothing"), (None, "nothing"), (row, "str"), ([tokens(1, 3)], "Tensor")):
        with pytest.raises(ValueError, match=f"`batches` has .*{kinds}.* in it; pass a list"):
            calibrate_expert_budget(model, batches)
    with pytest.raises(ValueError, match="padding alone"):
        calibrate_expert_budget(model, [row | {"attention_mask": torch.zeros(1, 3, dtype=torch.long)}])
    assert model.config.expert_budget == 2 * 7 / 10
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": list(range(1, 9))}] * 4)).with_format("torch")
    calibrate_expert_budget(model, DataLoader(stream, batch_size=2))  # has no length
    with pytest.raises(ValueError, match="router_bias=True"):
        downcycle(build(num_iterations=1, **NULL))


@pytest.mark.parametrize("budget", [True, "1.5", torch.tensor(1.5), None])
def test_a_budget_that_is_no_number_is_refused_and_any_number_is_saved(budget):
    model = with_null_experts()
    calibrate_expert_budget(model, [{"input_ids": tokens(2, 32)}])
    with pytest.raises(ValueError, match=f"`expert_budget={re.escape(repr(budget))}` must be a number in"):
        model.set_expert_budget(budget)
    if budget is not None:
        with pytest.raises(ValueError, match="must be a number in"):
            model(tokens(1, 3), expert_budget=budget)
    for number in (np.float32(1.5), Fraction(3, 2)):
        model.set_expert_budget(number)
        assert '"expert_budget": 1.5' in model.config.to_json_string()
        assert torch.equal(model(tokens(1, 3), expert_budget=number).logits, model(tokens(1, 3)).logits)


def test_a_calibration_that_fails_leaves_the_table_as_it_was():
    model, good = with_null_experts(), {"input_ids": tokens(2, 32)}
    bad = {"input_ids": torch.full((1, 4), 1000)}
    for is_calibrated in (False, True):
        if is_calibrated:
            calibrate_expert_budget(model, [good])
        before = [gate.null_bias_of_budget.clone() for gate in model._routers()]
        with pytest.raises(ValueError, match="token id 1000"):
            calibrate_expert_budget(model, [good, bad])
        assert all(
            torch.equal(gate.null_bias_of_budget, old) for gate, old in zip(model._routers(), before, strict=True)
        )
    with pytest.raises(ValueError, match="offload_buffers"):
        model.to("meta").set_expert_budget(1.5)


@pytest.mark.parametrize("router, is_kept", [("full", True), ("lora", False), ("none", False)])
def test_biases_that_an_adapter_would_lose_are_warned_of(router, is_kept, tmp_path, monkeypatch):
    base, ids = with_null_experts(), tokens(2, 9)
    calibrate_expert_budget(base, [{"input_ids": tokens(4, 32)}])
    base.save_pretrained(tmp_path / "base")
    warnings = []
    monkeypatch.setattr(modeling_coe.modeling_coe.logger, "warning", warnings.append)
    model = peft.get_peft_model(base, lora_config(base, router=router, r=2)).eval()
    RouterBalance(model).remove()
    model.set_expert_budget(0.5)
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    assert len(warnings) == (0 if is_kept else 3)
    assert all("does not hold its routers" in message for message in warnings)
    model.save_pretrained(tmp_path / "adapter")
    again = CoEForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.allclose(again(ids).logits, model(ids).logits) == is_kept


def test_threads_with_budgets_of_their_own_do_not_disturb_each_other():
    model, ids = with_null_experts(), tokens(2, 9)
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    budgets = [0, 0.5, 1, 1.5, 2] * 4
    with torch.no_grad():
        expected = {budget: model(ids, expert_budget=budget).logits for budget in budgets}
    with ThreadPoolExecutor(8) as pool:
        logits = pool.map(lambda budget: model(ids, expert_budget=budget).logits.detach(), budgets)
    for budget, found in zip(budgets, logits, strict=True):
        torch.testing.assert_close(found, expected[budget])


def test_a_process_without_the_package_turns_the_dial(tmp_path):
    model, ids = with_null_experts(), tokens(2, 9)
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    model.save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["modeling_coe"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
model.set_expert_budget(1.25)
torch.save(model(torch.tensor({ids.tolist()})).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "m")}
    )
    expected = model(ids, expert_budget=1.25).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


def test_quantised_experts_have_the_same_dial(tmp_path):
    model, ids = with_null_experts(intermediate_size=32, head_dim=8), tokens(2, 9)
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    model.save_pretrained(tmp_path)
    quantised = CoEForCausalLM.from_pretrained(tmp_path, quantization_config=QuantizedExpertsConfig(bits=8))
    torch.testing.assert_close(quantised(ids, expert_budget=0).logits, model(ids, expert_budget=0).logits)
    for budget in (0.5, 1.25, 2):
        counts = experts_per_token(quantised, ids, expert_budget=budget).float()
        assert abs(counts.mean() - experts_per_token(model, ids, expert_budget=budget).float().mean()) < 0.2


def test_null_experts_given_beside_a_path_get_their_budget(tmp_path):
    CoEConfig(num_local_experts=6, num_experts_per_tok=3).save_pretrained(tmp_path)
    config = CoEConfig.from_pretrained(tmp_path, num_null_experts=3, router_bias=True)
    assert config.expert_budget == 2


def test_training_holds_the_budget():
    model = build(**NULL, expert_budget=0.75).train()
    balance = RouterBalance(model, rate=0.05)
    ids = tokens(8, 32)
    for _ in range(60):
        model(ids)
        balance.step()
    counts = experts_per_token(model, ids).float().mean(-1)
    assert (counts - 0.75).abs().max() < 0.1

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The balancing bias: what is counted, where it moves, and that any transformers model with such a bias takes part."""

import pytest
import torch
import transformers
from conftest import build, tokens
from datasets import Dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_coe import CoEForCausalLM, CoEForSequenceClassification
from modeling_coe.balancing import BIAS, RouterBalance, RouterBiasCallback, calibrate_expert_budget


BIASED = {"router_bias": True, "router_aux_loss_coef": 0.0}
# `num_experts_per_tok` of `num_local_experts`, under each family's own names.
TINY = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "DeepseekV3": {**TINY, **LATENT, "n_routed_experts": 8, "n_shared_experts": 1, "num_key_value_heads": 4},
    "Glm4Moe": {**TINY, "n_routed_experts": 8, "n_shared_experts": 1},
    "Dots1": {**TINY, "n_routed_experts": 8, "n_shared_experts": 1},
    "Ernie4_5_Moe": {**TINY, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1,
                     "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "HYV3": {**TINY, "num_local_experts": 8, "num_experts": 8, "num_shared_experts": 1},
    "LongcatFlash": {**TINY, **LATENT, "num_layers": 2, "n_routed_experts": 8, "zero_expert_num": 2, "moe_topk": 2,
                     "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32, "num_key_value_heads": 4},
}  # fmt: skip


def counts_of(balance):
    return torch.cat([counts.reshape(-1, counts.shape[-1]) for counts in balance.counts.values()])


def test_a_bias_moves_by_the_rate_towards_experts_that_are_chosen_too_rarely():
    model = build(**BIASED).train()
    balance = RouterBalance(model, rate=0.01)
    ids = tokens(4, 16)
    routers = [(router, t) for router in model._routers() for t in range(3)]
    logits = model(ids, output_router_logits=True).router_logits
    balance.step()
    for (router, t), scores in zip(routers, logits, strict=True):
        load = scores.topk(2).indices.flatten().bincount(minlength=7)
        expected = 0.01 * torch.sign(load.float().mean() - load)
        torch.testing.assert_close(router.e_score_correction_bias[t], expected)
    assert counts_of(balance).sum() == 0


def test_the_bias_decides_the_choice_and_not_the_weights():
    model = build(**BIASED)
    gate = model.model.layers[0].mlp.gate
    x = torch.randn(5, 48)
    logits, _, index = gate(x, 1)
    gate.e_score_correction_bias[1, 3] = 50.0
    _, weights, biased = gate(x, 1)
    assert (biased == 3).any(-1).all() and not (index == 3).any(-1).all()
    expected = logits.softmax(-1).gather(-1, biased)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))


def test_balancing_evens_the_load_out():
    model = build(**BIASED, num_iterations=2).train()
    ids = tokens(8, 64)

    def imbalance():
        model(ids)
        counts = counts_of(balance).float()
        return (counts.amax(-1) / counts.mean(-1)).max().item()

    balance = RouterBalance(model, rate=0.02)
    before = imbalance()
    for _ in range(100):
        balance.step()
        after = imbalance()
    assert before > 1.5 and after < 1.15


def test_micro_batches_add_up_and_padding_and_evaluation_do_not_count():
    model = build(**BIASED).train()
    ids, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.long)
    mask[0, 5:] = 0
    mask[3, 2:] = 0
    balance = RouterBalance(model)
    model(ids, attention_mask=mask)
    whole = counts_of(balance).clone()
    assert whole.sum() == mask.sum() * 2 * 3 * 2
    for counts in balance.counts.values():
        counts.zero_()
    for row in range(4):
        model(ids[row : row + 1], attention_mask=mask[row : row + 1])
    assert torch.equal(counts_of(balance), whole)
    with torch.no_grad():
        model(ids)
    model.eval()(ids)
    assert torch.equal(counts_of(balance), whole)
    balance.remove()
    model.train()(ids)
    assert torch.equal(counts_of(balance), whole)


def test_a_loss_of_one_s_own_on_the_model_below_the_head_counts_once():
    model = build(**BIASED).train()
    balance, ids = RouterBalance(model, rate=1e-12), tokens(2, 8)
    model(ids, labels=ids)
    expected = counts_of(balance)
    for call in (model.model, model, model.model):
        balance.step()
        call(ids)
        assert torch.equal(counts_of(balance), expected)
    balance.step()
    with pytest.raises(ValueError, match="holds no token"):  # leaves no count open
        model(ids[:, :0])
    with torch.no_grad():
        model.model(ids)
    assert not counts_of(balance).any()
    model.model(ids)
    assert torch.equal(counts_of(balance), expected)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):  # closes nothing, but the step does
        model(ids)
    hook.remove()
    balance.step()
    with torch.no_grad():
        model.model(ids)
    assert not counts_of(balance).any()


def test_labels_of_whole_texts_tell_no_padding():
    classifier = CoEForSequenceClassification(build(**BIASED).config).train()
    balance, ids = RouterBalance(classifier), tokens(2, 8)
    classifier(input_ids=ids, position_ids=torch.arange(8)[None], labels=torch.tensor([0, 1]))
    assert counts_of(balance).sum(-1).unique().tolist() == [16 * classifier.config.num_experts_per_tok]


def test_packed_rows_count_without_their_padding():
    model = build(**BIASED).train()
    ids = tokens(1, 12)
    ids[0, 9:] = 0
    labels = ids.masked_fill(ids == 0, -100)
    balance = RouterBalance(model)
    model(ids, position_ids=torch.arange(12)[None] % 5, labels=labels)
    assert counts_of(balance).sum() == 9 * 2 * 3 * 2


def test_nothing_needs_float64_which_apple_s_gpus_lack():
    class Device(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **kwargs or {})
            assert not isinstance(output, torch.Tensor) or output.dtype != torch.float64, function
            return output

    model = build(router_bias=True, num_null_experts=2, expert_budget=1.5).train()
    balance, ids = RouterBalance(model), tokens(2, 16)
    with Device():
        model(ids, labels=ids).loss.backward()
        balance.step()
        calibrate_expert_budget(model, [{"input_ids": ids}])
        model(ids, expert_budget=1.2)
    balance.remove()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("layers_per_pool", [1, 2])
def test_recomputation_does_not_count_again(use_reentrant, layers_per_pool):
    ids, counted = tokens(2, 9), []
    for checkpointed in (False, True):
        model = build(**BIASED, layers_per_pool=layers_per_pool).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        balance = RouterBalance(model)
        model(ids, labels=ids).loss.backward()
        counted.append(counts_of(balance))
    assert counted[0].sum() == 18 * 2 * 3 * 2
    assert torch.equal(*counted)


def test_a_compiled_model_counts_too():
    model, ids = build(**BIASED).train(), tokens(2, 9)
    balance = RouterBalance(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids)
    expected = counts_of(balance).clone()
    balance.step()
    compiled(ids)
    assert expected.sum() == counts_of(balance).sum() == 18 * 2 * 3 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_any_model_with_a_correction_bias_is_balanced(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    ids, mask = tokens(4, 16), torch.ones(4, 16, dtype=torch.long)
    mask[:, 12:] = 0
    balance = RouterBalance(model, rate=0.01)
    assert len(balance.routers) == (1 if family == "LongcatFlash" else 2)
    model(input_ids=ids, attention_mask=mask)
    counts = {name: counts.clone() for name, counts in balance.counts.items()}
    biases = {name: getattr(module, BIAS).clone() for name, module in balance.routers.items()}
    balance.step()
    for name, module in balance.routers.items():
        assert counts[name].sum() == 48 * 2
        moved = (getattr(module, BIAS) - biases[name]).reshape(-1)
        load = counts[name].reshape(-1).float()
        torch.testing.assert_close(moved, 0.01 * torch.sign(load.mean() - load))
        assert moved.abs().max() > 0


def test_biases_that_cannot_be_moved_are_refused_by_name():
    with pytest.raises(ValueError, match="CoEForCausalLM has no `e_score_correction_bias`"):
        RouterBalance(build())
    for rate in (0.0, -1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"`rate={rate}` must be a positive number"):
            RouterBalance(build(**BIASED), rate)
        with pytest.raises(ValueError, match=f"`rate={rate}` must be a positive number"):
            RouterBiasCallback(rate)

    for rate in (True, "0.1"):
        with pytest.raises(ValueError, match=f"`rate={rate!r}` must be a positive number"):
            RouterBalance(build(**BIASED), rate)
    model = build(**BIASED, num_null_experts=2).train()
    balance = RouterBalance(model)
    with pytest.raises(ValueError, match="CoEForCausalLM is balanced already"):
        RouterBalance(model)
    model.config.expert_budget = 5.0
    with pytest.raises(ValueError, match=r"`expert_budget=5\.0` must be a number in"):
        balance.step()
    balance.remove()
    RouterBalance(model).remove()

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.e_score_correction_bias = nn.Buffer(torch.zeros(4))

    alone = nn.Sequential(Router())
    for _ in range(2):  # the first refusal leaves nothing behind
        with pytest.raises(ValueError, match="Found no `experts` in the block of `0`"):
            RouterBalance(alone)


def train(folder, model, steps, resume=False, callbacks=(), **arguments):
    rows = Dataset.from_dict({"input_ids": tokens(16, 12).tolist(), "labels": tokens(16, 12).tolist()})
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, save_steps=3,
        learning_rate=1e-2, lr_scheduler_type="constant",
        weight_decay=0.5, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100,
        **arguments,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[RouterBiasCallback(rate=0.01), *callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_trainer_moves_saves_and_resumes_biases_bit_for_bit(tmp_path):
    fields = {**BIASED, "num_null_experts": 3}
    whole = train(tmp_path / "whole", build(**fields), 6)
    train(tmp_path / "cut", build(**fields), 3)
    resumed = train(tmp_path / "cut", build(seed=5, **fields), 6, resume=True)
    for ours, theirs in zip(whole._routers(), resumed._routers(), strict=True):
        assert ours.e_score_correction_bias.abs().max() > 0
        assert torch.equal(ours.e_score_correction_bias, theirs.e_score_correction_bias)
    saved = CoEForCausalLM.from_pretrained(tmp_path / "cut" / "checkpoint-6")
    assert torch.equal(saved._routers()[1].e_score_correction_bias, whole._routers()[1].e_score_correction_bias)
    steps = whole._routers()[0].e_score_correction_bias / 0.01
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)  # neither optimizer nor weight decay moved it


def test_a_training_after_an_interrupted_one_moves_the_biases_by_its_own_counts_alone(tmp_path):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    model, start = build(**BIASED), build(**BIASED)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "interrupted", model, 6, callbacks=[Interrupt()])
    model.load_state_dict(start.state_dict())
    train(tmp_path / "again", model, 3)
    train(tmp_path / "alone", start, 3)
    for ours, theirs in zip(model._routers(), start._routers(), strict=True):
        assert ours.e_score_correction_bias.abs().max() > 0
        assert torch.equal(ours.e_score_correction_bias, theirs.e_score_correction_bias)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    model.train()
    balance = RouterBalance(model)  # a loop's own is not taken over
    with pytest.raises(ValueError, match="is balanced already"):
        train(tmp_path / "twice", model, 1)
    balance.remove()

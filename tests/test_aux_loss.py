# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss: Switch's value, the right gradient under padding, accumulation, ranks and checkpointing."""

import copy
import socket

import naive_coe
import numpy as np
import pytest
import torch
from conftest import SMALL, build, tokens, whitespace_tokenizer
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_load_balancing_loss

from modeling_coe import (
    CoEForCausalLM,
    CoEForQuestionAnswering,
    CoEForSequenceClassification,
    CoEForTokenClassification,
    modeling_coe,
)
from modeling_coe.modeling_coe import load_balancing_loss_func


COEF = 0.7


def router_gradients(model):
    return torch.cat([p.grad.reshape(-1) for n, p in model.named_parameters() if ".mlp.gate." in n])


def aux_gradients(model, run):
    """The router's gradient with the auxiliary loss minus the one without: the auxiliary loss's own part."""
    parts = []
    for coef in (COEF, 0.0):
        twin = copy.deepcopy(model)
        twin.config.router_aux_loss_coef = coef
        run(twin)
        parts.append(router_gradients(twin))
    return parts[0] - parts[1]


def test_equals_the_naive_count_and_mixtrals_function_with_and_without_padding(model):
    mask = torch.ones(3, 7, dtype=torch.long)
    router_logits = model(tokens(3, 7), output_router_logits=True).router_logits
    for hidden in (None, (0, slice(0, 5)), (1, slice(4, 7))):
        if hidden is not None:
            mask[hidden] = 0
        ours = load_balancing_loss_func(router_logits, 7, 2, mask)
        torch.testing.assert_close(
            ours, naive_coe.load_balancing_loss(router_logits, 7, 2, mask).float(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(ours, mixtral_load_balancing_loss(router_logits, 7, 2, mask))
    unmasked = load_balancing_loss_func(router_logits, 7, 2)
    torch.testing.assert_close(unmasked, mixtral_load_balancing_loss(router_logits, 7, 2))


def test_is_k_for_balanced_routers():
    balanced = tuple(torch.eye(7).repeat(2, 1) * 1e-3 for _ in range(4))
    assert load_balancing_loss_func(balanced, 7, 1).item() == pytest.approx(1.0, abs=1e-3)


def test_is_the_mean_over_the_pools_that_layers_share_each_counted_over_all_its_visits():
    model = build(num_hidden_layers=4, layers_per_pool=2).train()
    input_ids = tokens(3, 7)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    outputs = model(input_ids, attention_mask=mask, labels=input_ids, output_router_logits=True)
    visits = 2 * SMALL["num_iterations"]
    pools = (outputs.router_logits[:visits], outputs.router_logits[visits:])
    expected = sum(naive_coe.load_balancing_loss(pool, 7, 2, mask) for pool in pools) / 2
    torch.testing.assert_close(outputs.aux_loss, expected.float(), rtol=1e-5, atol=1e-6)
    together = naive_coe.load_balancing_loss(outputs.router_logits, 7, 2, mask)
    assert (outputs.aux_loss - together).abs() > 1e-3


@pytest.mark.parametrize("layers_per_pool", [1, 4])
def test_one_pool_and_pools_of_one_layer_are_balanced_as_mixtral_does(layers_per_pool):
    model = build(num_hidden_layers=4, layers_per_pool=layers_per_pool).train()
    input_ids = tokens(3, 7)
    outputs = model(input_ids, labels=input_ids, output_router_logits=True)
    assert torch.equal(outputs.aux_loss, load_balancing_loss_func(outputs.router_logits, 7, 2))
    torch.testing.assert_close(outputs.aux_loss, mixtral_load_balancing_loss(outputs.router_logits, 7, 2))


def test_asks_of_a_pool_that_some_visit_uses_each_expert_not_that_every_visit_does():
    # Each of two visits uses two experts of four, and between them they use all.
    visits = tuple(torch.eye(4)[experts].repeat(5, 1) * 50 for experts in ([0, 1], [2, 3]))
    pooled = load_balancing_loss_func(visits, 4, 1, routers_per_pool=2)
    separate = load_balancing_loss_func(visits, 4, 1, routers_per_pool=1)
    assert (pooled.item(), separate.item()) == (pytest.approx(1), pytest.approx(2))


def test_is_on_by_default_in_training_and_reaches_every_router():
    model = build().train()
    input_ids = tokens(2, 9)
    outputs = model(input_ids, labels=input_ids)
    assert outputs.aux_loss > 1.0
    assert outputs.router_logits is None
    gradient = aux_gradients(model, lambda m: m(input_ids, labels=input_ids).loss.backward())
    per_router = gradient.view(SMALL["num_hidden_layers"] * SMALL["num_iterations"], -1)
    assert (per_router.abs().sum(-1) > 1e-4).all()


def test_evaluation_loss_is_the_language_model_loss_alone(model):
    input_ids = tokens(2, 9)
    outputs = model(input_ids, labels=input_ids)
    logits = outputs.logits[:, :-1].reshape(-1, SMALL["vocab_size"])
    assert outputs.aux_loss is None
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(logits, input_ids[:, 1:].reshape(-1)))


def test_loss_is_language_model_loss_plus_coefficient_times_aux_loss():
    input_ids = tokens(2, 9)
    plain = build()(input_ids, labels=input_ids).loss
    outputs = build(router_aux_loss_coef=COEF).train()(input_ids, labels=input_ids)
    torch.testing.assert_close(outputs.loss, plain + COEF * outputs.aux_loss)


def test_ignores_padding_and_without_the_mask_does_not(model):
    model.train()
    input_ids = tokens(2, 6)
    padded = torch.cat([input_ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    labels = padded.masked_fill(padded == 0, -100)
    expected = model(input_ids, labels=input_ids).aux_loss
    masked = model(padded, attention_mask=(padded != 0).long(), labels=labels).aux_loss
    unmasked = model(padded, labels=labels).aux_loss
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-4)
    assert (unmasked - expected).abs() > 1e-2


def test_is_finite_when_every_token_is_padding(model):
    model.train()
    input_ids = tokens(1, 4)
    outputs = model(input_ids, attention_mask=torch.zeros_like(input_ids), labels=input_ids)
    assert outputs.aux_loss == 0
    outputs.aux_loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_is_never_computed_while_decoding():
    model = build(output_router_logits=True)
    input_ids = tokens(2, 5)
    mask = torch.ones_like(input_ids)
    mask[0, :2] = 0
    for training in (False, True):
        outputs = model.train(training)(input_ids, attention_mask=mask, use_cache=True)
        step = model(
            input_ids[:, :1],
            attention_mask=torch.cat([mask, mask[:, -1:]], 1),
            past_key_values=outputs.past_key_values,
        )
        assert step.aux_loss is None
    assert model.eval().generate(input_ids, attention_mask=mask, max_new_tokens=3).shape == (2, 8)


def test_evaluation_returns_it_where_mixtral_does():
    model = build(output_router_logits=True, use_cache=False)
    input_ids = tokens(2, 7)
    outputs = model(input_ids)
    expected = mixtral_load_balancing_loss(outputs.router_logits, 7, 2)
    torch.testing.assert_close(outputs.aux_loss, expected)
    assert outputs[0] is outputs.aux_loss
    assert model(input_ids, use_cache=True).aux_loss is not None
    assert model(input_ids, output_router_logits=False).aux_loss is None


@pytest.mark.parametrize("style", ["positions of their own", "all at position 0"])
def test_padding_of_packed_rows_does_not_count(style):
    """`collate` of this project gives padding positions of its own, TRL's collator gives all of it position 0."""
    model = build().train()
    documents = tokens(1, 9)
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    expected = model(documents, position_ids=positions, labels=documents, use_cache=False).aux_loss
    documents[0, 3] = 0  # a padding token with a target is text: some tokenizers pad with their end of text
    documents[0, 4] = 0
    labels = documents.clone()
    labels[0, 4] = -100  # and so is one without, inside a row
    inside = model(documents, position_ids=positions, labels=labels, use_cache=False).aux_loss
    padded = torch.cat([documents, torch.zeros(1, 6, dtype=torch.long)], 1)
    rest = torch.arange(6)[None] if style == "positions of their own" else torch.zeros(1, 6, dtype=torch.long)
    outputs = model(
        padded, position_ids=torch.cat([positions, rest], 1), use_cache=False,
        labels=torch.cat([labels, torch.full((1, 6), -100)], 1),
    )  # fmt: skip
    torch.testing.assert_close(outputs.aux_loss, inside)
    assert (inside - expected).abs() > 1e-3


def warnings_of(monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_coe.logger, "warning_once", warnings.append)
    return warnings


def test_training_without_it_says_so(monkeypatch):
    warnings = warnings_of(monkeypatch)
    model, input_ids = build(), tokens(2, 7)
    model(input_ids)
    model.train()
    with torch.no_grad():
        model(input_ids)
    model(input_ids, labels=input_ids)
    model(input_ids, output_router_logits=True)
    build(router_aux_loss_coef=0.0).train()(input_ids)
    build(CoEForSequenceClassification).eval()
    build(CoEForSequenceClassification, router_aux_loss_coef=0.0).train()
    assert warnings == []
    model(input_ids)
    assert len(warnings) == 1 and "without `labels` has no load-balancing loss" in warnings[0]
    for head in (CoEForSequenceClassification, CoEForTokenClassification, CoEForQuestionAnswering):
        build(head).train()
        assert f"{head.__name__} has no load-balancing loss" in warnings[-1]


def test_label_smoothing_trains_without_it_and_says_so(tmp_path, monkeypatch):
    warnings = warnings_of(monkeypatch)
    rows = [{"input_ids": row, "labels": row} for row in tokens(2, 9)]
    arguments = TrainingArguments(
        tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, max_steps=1, disable_tqdm=True
    )
    Trainer(build(), arguments, train_dataset=rows).train()
    assert warnings


def test_evaluating_with_metrics_keeps_the_logits_and_no_router_logits(tmp_path):
    seen = []
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 9)]
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        build(output_router_logits=True), arguments, eval_dataset=rows,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )  # fmt: skip
    trainer.evaluate()
    assert isinstance(seen[0], np.ndarray) and seen[0].shape == (4, 9, SMALL["vocab_size"])


def accumulate(model, rows, micro_batch):
    """One optimizer step's gradient as Trainer accumulates it: `num_items_in_batch` counts the whole step."""
    model.train()
    targets = rows[:, 1:].ne(-100).sum()
    for micro in rows.split(micro_batch):
        model(micro, labels=micro, num_items_in_batch=targets).loss.backward()


@pytest.mark.parametrize("pools", [{}, {"num_hidden_layers": 4, "layers_per_pool": 2}], ids=["own", "shared"])
def test_gradient_of_8x1_equals_2x4_accumulation(pools):
    # Four copies of two rows: the statistics of a micro-batch equal those of the batch, so scaling alone is at stake.
    model = build(**pools)
    rows = tokens(2, 9).repeat(4, 1)
    whole = aux_gradients(model, lambda m: accumulate(m, rows, 8))
    parts = aux_gradients(model, lambda m: accumulate(m, rows, 2))
    assert whole.abs().max() > 1e-3
    assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()


def test_micro_batches_weigh_by_their_target_tokens():
    model = build()
    rows = tokens(4, 9)
    labels = rows.clone()
    labels[2:, :6] = -100
    targets = labels[:, 1:].ne(-100).sum()
    weights = [labels[part, 1:].ne(-100).sum() / targets for part in (slice(0, 2), slice(2, 4))]

    def run(twin):
        twin.train()
        for part in (slice(0, 2), slice(2, 4)):
            twin(rows[part], labels=labels[part], num_items_in_batch=targets).loss.backward()

    def expected(twin):
        twin.train()
        if twin.config.router_aux_loss_coef == 0:
            return run(twin)
        run_without = copy.deepcopy(twin)
        run_without.config.router_aux_loss_coef = 0.0
        run(run_without)
        for part, weight in zip((slice(0, 2), slice(2, 4)), weights, strict=True):
            (COEF * weight * twin(rows[part], labels=labels[part]).aux_loss).backward()
        for mine, other in zip(twin.parameters(), run_without.parameters(), strict=True):
            mine.grad = other.grad if mine.grad is None else mine.grad + other.grad

    got, want = aux_gradients(model, run), aux_gradients(model, expected)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


class Recorder(Trainer):
    """Trainer that keeps the router's gradient of its first optimizer step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.gradient = router_gradients(self.model)
        return loss


def test_trainer_gives_the_same_gradient_for_8x1_and_2x4(tmp_path):
    rows = tokens(2, 9).repeat(4, 1)
    data = [{"input_ids": row, "labels": row} for row in rows]

    def run(model, micro_batch):
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=8 // micro_batch,
            max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Recorder(model, arguments, train_dataset=data)
        trainer.train()
        for parameter, gradient in zip(
            [p for n, p in model.named_parameters() if ".mlp.gate." in n],
            trainer.gradient.split([p.numel() for n, p in model.named_parameters() if ".mlp.gate." in n]),
            strict=True,
        ):
            parameter.grad = gradient.view_as(parameter)

    whole = aux_gradients(build(), lambda m: run(m, 8))
    parts = aux_gradients(build(), lambda m: run(m, 2))
    assert whole.abs().max() > 1e-3
    assert (whole - parts).abs().max() <= 1e-4 * whole.abs().max()


def train_on_rank(rank, port, path):
    distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    rows = tokens(2, 9).repeat(4, 1)
    local = rows.chunk(2)[rank]

    def run(model):
        loss = DistributedDataParallel(model.train())(local, labels=local, num_items_in_batch=rows[:, 1:].numel()).loss
        (2 * loss).backward()  # as Trainer does: DDP averages, the loss already divides by the tokens of all ranks

    gradient = aux_gradients(build(), run)
    if rank == 0:
        torch.save(gradient, path)
    distributed.destroy_process_group()


def test_gradient_of_two_gloo_ranks_equals_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_on_rank, (port, tmp_path / "two.pt"), nprocs=2)
    two = torch.load(tmp_path / "two.pt")
    one = aux_gradients(build(), lambda m: accumulate(m, tokens(2, 9).repeat(4, 1), 8))
    assert one.abs().max() > 1e-3
    assert (one - two).abs().max() <= 1e-5 * one.abs().max()


def test_label_smoothing_shifts_the_labels(tmp_path):
    input_ids = tokens(2, 9)
    model = build()
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=[])
    loss = trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    logits = model(input_ids).logits[:, :-1].reshape(-1, SMALL["vocab_size"])
    expected = torch.nn.functional.cross_entropy(logits, input_ids[:, 1:].reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_equals_what_trl_computes_for_itself(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = tokens(4, 9)
    losses = {}
    for coef in (COEF, 0.0):
        model = build(CoEForCausalLM)
        arguments = trl.SFTConfig(
            str(tmp_path / str(coef)), per_device_train_batch_size=4, max_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, router_aux_loss_coef=coef, bf16=False, logging_steps=1, seed=0,
            gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}),
            processing_class=whitespace_tokenizer(),
        )
        trainer.train()
        losses[coef] = trainer.state.log_history[0]
    aux = build().train()(rows, labels=rows).aux_loss.item()
    assert losses[COEF]["aux_loss"] == pytest.approx(aux, rel=1e-4)
    assert losses[COEF]["loss"] - losses[0.0]["loss"] == pytest.approx(COEF * aux, rel=1e-3)

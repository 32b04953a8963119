# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Layers that share a pool of experts: the naive model's outputs and gradients, weights that exist once, all tools."""

import copy
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import assert_compiled_and_exported_equal_eager, assert_equals_the_naive_decoder, build, tokens
from safetensors import safe_open
from transformers import Trainer

from modeling_coe import (
    CoEForCausalLM,
    CoEForQuestionAnswering,
    CoEForSequenceClassification,
    CoEForTokenClassification,
    CoEModel,
    experts_coe,
)
from modeling_coe.budget import count_parameters
from modeling_coe.train.arguments import PretrainArguments
from modeling_coe.train.optimizer import PoolRate
from modeling_coe.train.report import peak_bytes


LAYERS = 4
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
FIELDS = ("layers_per_pool", "num_iterations", "independent_gating", "residual", "num_shared_experts")
POOLS = [
    dict(zip(FIELDS, (g, C, independent, residual, S), strict=True))
    for g, (C, independent), residual, S in itertools.product(
        (1, 2, 4), ((1, True), (2, True), (2, False)), ("nested", "inner", "outer"), (0, 1)
    )
]


def pooled(model_class=CoEForCausalLM, layers_per_pool=2, **overrides):
    return build(model_class, **{"num_hidden_layers": LAYERS, "layers_per_pool": layers_per_pool, **overrides})


def loss_and_gradients(model, ids, **options):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=1e-6):
    assert (ours[0] - theirs[0]).abs() <= tolerance
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).abs().max() <= tolerance, name


@pytest.mark.parametrize("pools", POOLS, ids=lambda p: "-".join(map(str, p.values())))
def test_a_model_equals_the_naive_one_in_outputs_and_all_gradients(pools):
    model = pooled(num_local_experts=5, iteration_scale=True, **pools).double()
    ids = tokens(1, 3)
    for name, (_, naive) in assert_equals_the_naive_decoder(model, ids).items():
        assert naive.abs().max() > 0, name


@pytest.mark.parametrize("layers_per_pool", [1, 2, 4])
def test_weights_exist_once_under_the_name_of_the_first_layer(layers_per_pool, tmp_path):
    model = pooled(layers_per_pool=layers_per_pool, num_shared_experts=1)
    owners = range(0, LAYERS, layers_per_pool)
    names = {f"model.layers.{layer}.{name}" for layer in owners for name in EXPERTS}
    assert {name for name in model.state_dict() if ".experts." in name} == names
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {name for name in file.keys() if ".experts." in name} == names
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == model.num_parameters()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 4 * model.num_parameters() == 4 * sum(count_parameters(model.config).values())
    optimizer = torch.optim.AdamW(model.parameters())
    loss_and_gradients(model, tokens(2, 5))
    optimizer.step()
    states = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert states == sum(p.grad.numel() for p in model.parameters()) == model.num_parameters()


def test_a_pool_is_as_large_as_one_layers_experts():
    whole, quarter = (count_parameters(pooled(layers_per_pool=g).config)["experts"] for g in (1, 4))
    assert whole == 4 * quarter == 4 * 3 * 7 * 48 * 24


def test_shared_layers_differ_in_everything_but_the_experts():
    model = pooled(layers_per_pool=2)
    first, second = (dict(layer.named_parameters()) for layer in model.model.layers[:2])
    assert first.keys() - second.keys() == set(EXPERTS) and second.keys() < first.keys()
    assert all(second[name] is not first[name] for name in second)


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_a_checkpoint_loads_whole_and_in_shards(max_shard_size, tmp_path):
    model = pooled()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "50KB")
    loaded, report = CoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(loaded(tokens(2, 7)).logits, model(tokens(2, 7)).logits, rtol=0, atol=1e-5)


def test_a_checkpoint_from_before_pools_is_one_pool_a_layer(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    old = "".join(line for line in config.read_text().splitlines(keepends=True) if "layers_per_pool" not in line)
    assert old != config.read_text()
    config.write_text(old)
    loaded = CoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layers_per_pool == 1
    torch.testing.assert_close(loaded(tokens(2, 7)).logits, model(tokens(2, 7)).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_its_own_pool_and_not_the_originals(copied):
    model, ids = pooled(), tokens(1, 6)
    expected = model(ids).logits
    twin = copied(model)
    assert torch.equal(twin(ids).logits, expected)
    with torch.no_grad():
        twin.model.layers[2].mlp.experts.down_proj.zero_()
    assert not torch.equal(twin(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("implementation", ["coe", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("layers_per_pool", [2, 4])
def test_every_experts_implementation_gives_the_eager_gradients(implementation, layers_per_pool):
    ids, results = tokens(2, 9), {}
    for name in (implementation, "eager"):
        model = pooled(layers_per_pool=layers_per_pool, num_iterations=2).train()
        model.set_experts_implementation(name)
        results[name] = loss_and_gradients(model, ids)
    assert_same(results[implementation], results["eager"], 1e-5)


def test_a_layer_without_experts_says_where_they_are():
    layer = pooled().model.layers[1]
    with pytest.raises(ValueError, match="experts of an earlier one"):
        layer.mlp(torch.randn(1, 3, 48))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights_come_back_for_every_visit(offload, tmp_path):
    model, ids = pooled(layers_per_pool=4), tokens(2, 7)
    expected = model(ids).logits
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.experts.down_proj.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert model.model.layers[0].mlp.experts.down_proj.device.type == "meta"


def test_a_device_map_may_put_the_layers_of_a_pool_on_different_devices(tmp_path):
    model, ids = pooled(layers_per_pool=4), tokens(2, 7)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" if layer % 2 == 0 else "cpu" for layer in range(LAYERS)}
    loaded = CoEForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[0].mlp.experts.down_proj.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["coe", "grouped_mm", "eager"])
def test_gradient_checkpointing_changes_no_gradient(implementation):
    results = []
    for checkpointing in (False, True):
        model = pooled(num_iterations=2, router_aux_loss_coef=0.5).train()
        model.set_experts_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(loss_and_gradients(model, tokens(2, 9)))
    assert_same(*results)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers_per_pool", [1, 2, 4])
def test_the_visits_of_all_layers_share_one_weight_gradient(layers_per_pool, checkpointing, monkeypatch):
    fresh, outer = [], experts_coe._Groups.outer
    monkeypatch.setattr(experts_coe._Groups, "outer", lambda *arguments: fresh.append(1) or outer(*arguments))
    model = pooled(layers_per_pool=layers_per_pool, num_iterations=2).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_and_gradients(model, tokens(2, 9))
    assert len(fresh) == 2 * LAYERS // layers_per_pool  # gate_up_proj and down_proj of every pool


def test_a_recomputed_layer_leaves_nothing_behind():
    ids, peaks = tokens(8, 100), []
    for layers_per_pool in (1, 4):
        model = pooled(layers_per_pool=layers_per_pool, num_iterations=4, intermediate_size=48).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # Whole recomputations: cut short, they would end before they could leave anything.
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            loss_and_gradients(model, ids)
            peaks.append(peak_bytes(lambda: loss_and_gradients(model, ids), torch.device("cpu")))  # noqa: B023
    assert peaks[1] <= 1.05 * peaks[0]


def test_compiled_and_exported_models_equal_the_eager_one():
    assert_compiled_and_exported_equal_eager(pooled(num_hidden_layers=2, num_iterations=1), tokens(1, 9))


def test_cached_generation_equals_plain_forward():
    model, ids = pooled(), tokens(2, 5)
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    for length in range(5, generated.shape[1]):
        following = model(generated[:, :length], use_cache=False).logits[:, -1].argmax(-1)
        assert torch.equal(following, generated[:, length])


def test_embeddings_resize_and_the_pools_stay():
    model, ids = pooled(tie_word_embeddings=True), tokens(1, 5)
    expected = model(ids).logits
    model.resize_token_embeddings(105, mean_resizing=False)
    torch.testing.assert_close(model(ids).logits[..., :99], expected)


@pytest.mark.parametrize(
    "head", [CoEModel, CoEForSequenceClassification, CoEForTokenClassification, CoEForQuestionAnswering]
)
def test_every_head_takes_the_pools_of_a_language_model(head, tmp_path):
    language_model = pooled()
    language_model.save_pretrained(tmp_path)
    model = head.from_pretrained(tmp_path).eval()
    base = model if head is CoEModel else model.model
    ids = tokens(2, 6)
    expected = language_model.model(ids).last_hidden_state
    torch.testing.assert_close(base(ids).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_pipeline_ranks_are_refused_by_name():
    with pytest.raises(ValueError, match=r"pp_size=2.*layers_per_pool=2.*share experts"):
        pooled()._resolve_parallel_plans(SimpleNamespace(pp_size=2))


def test_zero_3_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("modeling_coe.modeling_coe.is_deepspeed_zero3_enabled", lambda: True)
    pooled(layers_per_pool=1)
    with pytest.raises(ValueError, match=r"layers_per_pool=2.*ZeRO-3"):
        pooled()


def test_sharded_data_parallelism_gathers_pools_apart_from_their_layers():
    shared, own = pooled(), pooled(layers_per_pool=1)
    assert shared._no_split_modules == {"CoEDecoderLayer", "CoEExperts"}
    assert own._no_split_modules == {"CoEDecoderLayer"}


class PooledTrainer(PoolRate, Trainer):
    pass


def trained(folder, factor, layers_per_pool=2):
    """The model before and after a step of AdamW whose pools learn at `factor` times the rate, and the optimizer."""
    model = pooled(layers_per_pool=layers_per_pool)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = PretrainArguments(
        str(folder), learning_rate=1e-3, max_steps=1, pool_learning_rate_factor=factor, report_to="none", use_cpu=True,
        lr_scheduler_type="constant", save_strategy="no", eval_strategy="no", disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 9)]
    trainer = PooledTrainer(model, arguments, train_dataset=data)
    trainer.train()
    return before, dict(model.named_parameters()), trainer.optimizer


def test_pools_learn_at_their_own_rate_and_all_else_at_the_given_one(tmp_path):
    before, whole, optimizer = trained(tmp_path, 1.0)
    assert len(optimizer.param_groups) == 2  # with and without weight decay, as Trainer's
    _, halved, optimizer = trained(tmp_path, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [5e-4, 1e-3, 1e-3]
    for name, start in before.items():
        full, half = whole[name] - start, halved[name] - start
        torch.testing.assert_close(half, full * (0.5 if ".experts." in name else 1.0), rtol=1e-3, atol=1e-7)
        assert full.abs().max() > 1e-4, name


def test_a_rate_of_the_pool_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="layers_per_pool=1"):
        trained(tmp_path, 0.5, layers_per_pool=1)
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="pool_learning_rate_factor"):
            trained(tmp_path, factor)

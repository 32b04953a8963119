# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The closed forms of `modeling_coe.budget` against real tensors."""

import itertools
import math
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_coe import CoEConfig, CoEForCausalLM
from modeling_coe.budget import (
    EXPERTS_IMPLEMENTATIONS,
    TrainingSetup,
    count_active_parameters,
    count_expert_combinations,
    count_parameters,
    equal_compute_moe,
    forward_flops,
    kv_cache_bytes,
    optimizer_bytes,
    saved_activations,
    training_flops,
    training_memory,
)
from modeling_coe.routing import record_routing
from modeling_coe.train import plan
from modeling_coe.train.plan import propose


PRESETS = sorted(Path(__file__).parents[1].glob("configuration/models/*.json"))
BASE = {
    "vocab_size": 104,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
}
VARIANTS = {
    "chain": {},
    "long_chain": {"num_iterations": 4, "vocab_size": 1000, "num_experts_per_tok": 1},
    "moe": {"num_iterations": 1, "num_shared_experts": 2, "qk_norm": "head"},
    "olmoe": {"qk_norm": "full", "iteration_scale": True, "router_jitter_noise": 0.1, "norm_topk_prob": False},
    "paper": {"residual": "inner", "router_aux_loss_coef": 0.0, "tie_word_embeddings": True, "num_iterations": 3},
    "shared_router": {"independent_gating": False, "residual": "outer", "num_shared_experts": 1},
    "pool": {"layers_per_pool": 3, "vocab_size": 300},
    # The budget is the default one, in proportion, and so what routers that nothing has trained choose.
    "null_experts": {"router_bias": True, "num_null_experts": 3},
    "biased": {"attention_bias": True, "head_dim": 16, "num_local_experts": 40, "intermediate_size": 16},
}
SLOW = pytest.mark.slow
PRECISIONS = {"fp32": ("float32", False), "bf16": ("bfloat16", False), "autocast": ("float32", True)}


def build(config: CoEConfig, dtype: str = "float32", implementation: str = "grouped_mm") -> CoEForCausalLM:
    torch.manual_seed(0)
    model = CoEForCausalLM(config).to(getattr(torch, dtype)).train()
    model.set_experts_implementation(implementation)
    return model


def loss_of(model: CoEForCausalLM, setup: TrainingSetup) -> torch.Tensor:
    tokens = torch.randint(model.config.vocab_size, (setup.batch_size, setup.sequence_length))
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False, "skip_logits": setup.skip_logits}
    if setup.packed:
        inputs["position_ids"] = (torch.arange(setup.sequence_length) % (2 * setup.sequence_length // 3)).expand(
            setup.batch_size, -1
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast):
        return model(**inputs).loss


def bytes_saved_by_autograd(model: CoEForCausalLM, setup: TrainingSetup) -> int:
    """Of the unique storages that the graph keeps, without the parameters."""
    kept = {parameter.untyped_storage().data_ptr(): None for parameter in model.parameters()}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, setup)
    assert loss.isfinite()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor is not None)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that appear while it is active, and the most that lived at once."""

    def __init__(self, ignored):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in ignored}

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key):
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, output)
        return output


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_parameters_of_every_preset_are_exact(path):
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(count_parameters(config).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_by_component_are_exact(variant):
    config = CoEConfig(**BASE | VARIANTS[variant])
    parts = {
        "embed_tokens": "embedding",
        "self_attn": "attention",
        "experts": "experts",
        "shared_expert": "shared_expert",
        "gate": "router",
        "iteration_scale": "iteration_scale",
        "lm_head": "lm_head",
    }
    counted = dict.fromkeys(count_parameters(config), 0)
    with torch.device("meta"):
        model = CoEForCausalLM(config)
    for name, parameter in model.named_parameters():
        part = "norms" if "norm" in name else next(parts[piece] for piece in name.split(".") if piece in parts)
        counted[part] += parameter.numel()
    assert counted == count_parameters(config)


def test_active_parameters_leave_out_the_unvisited_experts():
    config = CoEConfig(**BASE | {"num_experts_per_tok": 2})
    expert = 3 * config.hidden_size * config.intermediate_size
    total = sum(count_parameters(config).values())
    assert count_active_parameters(config) == total - config.num_hidden_layers * (6 - 2 * 2) * expert
    # A chain cannot visit more experts than there are.
    assert count_active_parameters(CoEConfig(**BASE | {"num_iterations": 7})) == total + 5 * 3 * 6 * 48


def test_expert_combinations_are_exact_integers():
    config = CoEConfig()
    assert count_expert_combinations(config) == math.comb(64, 4) ** 2 == 635376**2
    moe = equal_compute_moe(config)
    # 91.2 times, not the 823 times of the paper's text (C(64,4)^2 / C(64,8)).
    assert round(count_expert_combinations(config) / count_expert_combinations(moe), 1) == 91.2
    small = CoEConfig(**BASE | {"num_local_experts": 5, "num_experts_per_tok": 2, "num_iterations": 3})
    subsets = list(itertools.combinations(range(5), 2))
    assert count_expert_combinations(small) == len(list(itertools.product(subsets, repeat=3)))


def test_equal_compute_moe_has_the_chains_flops_and_fewer_combinations():
    config = CoEConfig(**BASE | {"num_experts_per_tok": 2, "num_iterations": 2, "residual": "inner"})
    moe = equal_compute_moe(config)
    assert (moe.num_iterations, moe.num_experts_per_tok, moe.residual) == (1, 4, "inner")
    assert forward_flops(config, 32)["experts"] == forward_flops(moe, 32)["experts"]
    with pytest.raises(ValueError, match="it would need 9"):
        equal_compute_moe(CoEConfig(**BASE | {"num_iterations": 3}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_flops_match_what_torch_counts(variant):
    config = CoEConfig(**BASE | VARIANTS[variant])
    model = build(config, implementation="eager").eval()
    model.set_attn_implementation("eager")
    input_ids = torch.randint(config.vocab_size, (2, 7))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids, use_cache=False)
    if config.num_null_experts > 0:
        config.expert_budget = record_routing(model, input_ids).experts_per_token.mean().item()
        assert 0 < config.expert_budget < 3
    flops = forward_flops(config, 7)
    # Eager attention multiplies all 7 x 7 pairs, a causal kernel only the (7 + 1) / 2 that a token sees on average.
    flops["attention_scores"] *= 7 / 4
    rotary = 2 * 7 * (config.head_dim or 12) // 2
    assert counter.get_total_flops() == pytest.approx(2 * 7 * sum(flops.values()), rel=1e-9, abs=2 * rotary)


def test_training_costs_three_forwards_and_checkpointing_a_fourth_of_the_layers():
    config = CoEConfig(**BASE)
    flops = forward_flops(config, 16)
    assert training_flops(config, 16) == 3 * sum(flops.values())
    assert training_flops(config, 16, True) == 4 * sum(flops.values()) - flops["lm_head"]


def test_a_sliding_window_bounds_scores_and_cache():
    config, windowed = CoEConfig(**BASE), CoEConfig(**BASE | {"sliding_window": 4})
    seen = [min(position + 1, 4) for position in range(10)]
    ratio = forward_flops(windowed, 10)["attention_scores"] / forward_flops(config, 10)["attention_scores"]
    assert ratio == pytest.approx(sum(seen) / sum(range(1, 11)))
    assert kv_cache_bytes(windowed, 2, 10) == 0.4 * kv_cache_bytes(config, 2, 10)


def test_kv_cache_is_exact():
    config = CoEConfig(**BASE)
    cache = build(config).eval()(torch.randint(104, (5, 7)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(config, 5, 7, "float32") == held


@pytest.mark.parametrize("variant", ["olmoe", "pool"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_and_gradient_bytes_are_exact(dtype, variant):
    config = CoEConfig(**BASE | VARIANTS[variant])
    setup = TrainingSetup(2, 8, dtype=dtype)
    model = build(config, dtype)
    loss_of(model, setup).backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    memory = training_memory(config, setup)
    assert memory["optimizer"] == optimizer_bytes(config, setup) == held
    assert memory["gradients"] == memory["weights"] == sum(p.grad.nbytes for p in model.parameters())
    assert training_memory(config, TrainingSetup(2, 8, dtype=dtype, offload_optimizer=True))["optimizer"] == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_adamw_bytes_are_exact(bits):
    low_bit = pytest.importorskip("torchao.optim")
    config = CoEConfig(**BASE | {"hidden_size": 64, "iteration_scale": True})
    model = build(config, "bfloat16")
    optimizer = {8: low_bit.AdamW8bit, 4: low_bit.AdamW4bit}[bits](model.parameters(), block_size=256)
    held = 0
    for parameter in model.parameters():
        # What its first step creates; the step itself would compile a kernel for every shape.
        held += torch.tensor(0.0).nbytes
        for signed in (True, False):
            buffer = optimizer._new_buffer(parameter, signed)
            quantised = isinstance(buffer, torch.Tensor) and type(buffer) is not torch.Tensor
            parts = (buffer.codes, buffer.scale, buffer.qmap) if quantised else (buffer,)
            held += sum(part.nbytes for part in parts)
    assert optimizer_bytes(config, TrainingSetup(dtype="bfloat16", optimizer=f"adamw_{bits}bit")) == held


@pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_activations_are_within_ten_percent_of_autograds(variant, precision, implementation):
    config = CoEConfig(**BASE | VARIANTS[variant])
    dtype, autocast = PRECISIONS[precision]
    for batch_size, sequence_length, packed in ((3, 37, False), (4, 48, True)):
        setup = TrainingSetup(
            batch_size, sequence_length, packed, dtype, autocast, experts_implementation=implementation
        )
        measured = bytes_saved_by_autograd(build(config, dtype, implementation), setup)
        assert sum(saved_activations(config, setup).values()) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=SLOW), pytest.param("autocast", marks=SLOW)])
def test_the_predicted_peak_holds_what_a_step_really_allocates(
    precision, skip_logits, gradient_checkpointing, implementation
):
    dtype, autocast = PRECISIONS[precision]
    chains = ({"vocab_size": 2000}, {"num_iterations": 4, "num_local_experts": 24})
    for extra in (*chains, {"layers_per_pool": 3, "num_local_experts": 24}):
        config = CoEConfig(**BASE | {"hidden_size": 64, "intermediate_size": 48} | extra)
        setup = TrainingSetup(
            6,
            96,
            dtype=dtype,
            autocast=autocast,
            gradient_checkpointing=gradient_checkpointing,
            skip_logits=skip_logits,
            experts_implementation=implementation,
        )
        model = build(config, dtype, implementation)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes([*model.parameters(), *(p.grad for p in model.parameters())]) as memory:
            loss_of(model, setup).backward()
        predicted = training_memory(config, setup)
        transient = predicted["activations"] + predicted["backward"]
        assert 0.9 * memory.peak < transient < 1.3 * memory.peak


@pytest.mark.parametrize("num_items", [None, 1500])
@pytest.mark.parametrize("autocast", [False, True])
def test_skipping_the_logits_changes_neither_loss_nor_gradients(num_items, autocast):
    model = build(CoEConfig(**BASE))
    tokens = torch.randint(104, (3, 301))
    labels = tokens.masked_fill(torch.rand(3, 301) < 0.2, -100)
    options = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    results = []
    for skip_logits in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(tokens, labels=labels, skip_logits=skip_logits, **options)
        output.loss.backward()
        results.append((output.loss.detach(), *(parameter.grad for parameter in model.parameters())))
    assert output.logits is None
    tolerance = {"atol": 1e-3, "rtol": 0.02} if autocast else {"atol": 1e-6, "rtol": 1e-6}
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, **tolerance)


def test_proposals_compute_as_much_and_save_what_was_asked_for_with_the_most_experts():
    baseline = CoEConfig(**BASE | {"num_iterations": 1, "num_experts_per_tok": 4, "num_local_experts": 64})
    setup = TrainingSetup(1, 16, experts_implementation="coe")
    whole, flops = sum(training_memory(baseline, setup).values()), training_flops(baseline, 16)

    def saved(config):
        return 1 - sum(training_memory(config, setup).values()) / whole

    proposals = propose(baseline, setup, 0.5)
    assert {(p.num_iterations, p.layers_per_pool) for p in proposals} >= {(1, 3), (2, 1), (2, 3)}
    for proposal in proposals:
        assert proposal.num_iterations * proposal.num_experts_per_tok == 4
        assert training_flops(proposal, 16) == pytest.approx(flops, rel=0.05)
        more = proposal.to_dict() | {"num_local_experts": proposal.num_local_experts + 8}
        more = CoEConfig(**more)
        assert saved(proposal) >= 0.5
        assert saved(more) < 0.5 or training_flops(more, 16) > 1.05 * flops
    assert propose(baseline, setup, 0.99) == []


def test_the_plan_prints_what_saves_memory_and_refuses_half_a_question(capsys):
    recipe = ["--recipe", "configuration/pretrain/paper_8gb.yaml"]
    plan.main([*recipe, "--like", "moe_k8_n64", "--save", "42%"])
    output = capsys.readouterr().out
    assert re.search(r"^  2, 4, \d+, 4 +[\d,]+ +[\d.]+ +4\d% +1.0\dx$", output, re.MULTILINE)
    plan.main([*recipe, "--like", "moe_k8_n64", "--save", "95%"])
    assert "Nothing does" in capsys.readouterr().out
    for arguments in (["--like", "moe_k8_n64"], ["--save", "42%"], ["--like", "moe_k8_n64", "--save", "142%"]):
        with pytest.raises(SystemExit):
            plan.main([*recipe, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "1.2.3GB"], "'1.2.3GB' is no memory size; write for instance 8GB"),
        (["--gpu", ".GB"], "'.GB' is no memory size"),
        (["--gpu", "0GB"], "--gpu is 0; write for instance 8GB"),
        (["--gpu", "8GB", "--ram", "8GB"], "--ram is the memory to --serve from"),
        (["--like", "nothing", "--save", "42%"], "'nothing' is no preset; choose one of .*moe_k8_n64"),
        (["--like", "moe_k8_n64", "--save", "4.2.1%"], "'4.2.1%' is no share"),
    ],
)
def test_a_plan_of_something_impossible_is_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit):
        plan.main(["--recipe", "configuration/pretrain/paper_8gb.yaml", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_a_misspelt_option_of_the_plan_gets_the_nearest_one():
    with pytest.raises(ValueError, match=r"`--modle`.*did you mean `model`"):
        plan.main(["--modle", "x", "--recipe", "configuration/pretrain/paper_8gb.yaml"])
    with pytest.raises(ValueError, match="is the configuration of a model; name it as `model`"):
        plan.main(["--recipe", "configuration/models/coe_tiny.json"])


def test_a_chain_saves_activations_in_proportion_to_its_iterations():
    setup = TrainingSetup(4, 32)
    saved = [saved_activations(CoEConfig(**BASE | {"num_iterations": count}), setup)["experts"] for count in (1, 2, 4)]
    assert saved == [saved[0], 2 * saved[0], 4 * saved[0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "`dtype='int8'` must be one of"),
        ({"optimizer": "sgd"}, "`optimizer='sgd'` must be one of"),
        ({"dtype": "bfloat16", "autocast": True}, "leave it off"),
        ({"batch_size": 0}, "`batch_size=0` must be at least 1"),
    ],
)
def test_an_impossible_setup_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainingSetup(**fields)

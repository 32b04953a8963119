# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""LoRA on attention, fused experts and routers: counted, merged exactly, and one merged copy for all iterations."""

import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import SMALL, build, tokens


peft = pytest.importorskip("peft")

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402, after the skip

from modeling_coe import CoEConfig, CoEForCausalLM, CoEForSequenceClassification  # noqa: E402
from modeling_coe.adapters import ATTENTION, EXPERTS, ROUTERS, TASKS, count_adapted, lora_config  # noqa: E402
from modeling_coe.balancing import calibrate_expert_budget  # noqa: E402


def adapted(router="full", experts=True, seed=0, model=None, r=5, **overrides):
    """A model with random, non-zero adapters."""
    model = build(**overrides) if model is None else model
    model = peft.get_peft_model(model, lora_config(model, experts=experts, router=router, r=r))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def assert_equal_to_1e6(actual: torch.Tensor, expected: torch.Tensor):
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def expected_counts(router: str, experts: bool, r: int = 5, shared: int = 1) -> dict[str, int]:
    """The arithmetic of LoRA: r * (inputs + outputs) of each matrix."""
    config = CoEConfig(**SMALL)
    H, I, N, C, L = (
        config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_iterations,
        config.num_hidden_layers,
    )  # fmt: skip
    heads, keys = H, config.num_key_value_heads * (H // config.num_attention_heads)
    counts = {"attention": L * r * (2 * (H + heads) + 2 * (H + keys))}
    if experts:
        counts["experts"] = L * r * N * ((H + 2 * I) + (I + H))
        counts["shared_expert"] = L * r * 3 * (H + shared * I)
    if router != "none":
        counts["router"] = L * C * (N * H if router == "full" else r * (N + H))
    return counts


@pytest.mark.parametrize("router", ROUTERS)
def test_a_model_with_null_experts_is_adapted_and_merged_exactly(router):
    model = build(router_bias=True, num_null_experts=3)
    calibrate_expert_budget(model, [{"input_ids": tokens(4, 32)}])
    model, ids = adapted(router, model=model), tokens(2, 9)
    expected = [model(input_ids=ids, expert_budget=budget).logits for budget in (None, 0.75, 2)]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "experts" in name}
    assert adapters and all(gradient.abs().sum() > 0 for gradient in adapters.values())
    merged = model.eval().merge_and_unload()
    for budget, logits in zip((None, 0.75, 2), expected, strict=True):
        assert (merged(ids, expert_budget=budget).logits - logits).abs().max() <= 1e-5
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", [True, False])
def test_adapted_parameters_are_what_the_arguments_say(router, experts):
    model = adapted(router, experts, num_shared_experts=1)
    assert count_adapted(model) == expected_counts(router, experts)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("implementation", ["coe", "grouped_mm"])
def test_every_adapter_learns_and_merges_exactly(router, implementation):
    fields = {"num_shared_experts": 1, "independent_gating": router != "lora", "initializer_range": 0.05}
    model = adapted(router, **fields)
    model.set_experts_implementation(implementation)
    inputs = tokens(3, 11)
    output = model(inputs)
    base = build(**fields)(inputs)
    assert (output.logits - base.logits).abs().max() > 1e-3
    model.train()(inputs, labels=inputs).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    merged = model.eval().merge_and_unload()
    assert type(merged) is CoEForCausalLM
    assert_equal_to_1e6(merged(inputs).logits, output.logits)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_adapter_is_reloaded_merged_and_trained_on(router, tmp_path):
    base = build(initializer_range=0.05)
    base.save_pretrained(tmp_path / "base")
    model = adapted(router, model=CoEForCausalLM.from_pretrained(tmp_path / "base").eval())
    model.save_pretrained(tmp_path / "adapter")
    inputs = tokens(2, 9)
    expected = model(inputs).logits
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert count_adapted(reloaded) == count_adapted(model)
    assert_equal_to_1e6(reloaded.eval()(inputs).logits, expected)
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = CoEForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_equal_to_1e6(again(inputs).logits, expected)


@pytest.mark.parametrize("implementation", ["coe", "grouped_mm"])
def test_the_experts_of_a_pool_have_one_adapter_which_merges_exactly(implementation, tmp_path):
    fields = {"num_hidden_layers": 4, "layers_per_pool": 2, "num_iterations": 2, "initializer_range": 0.05}
    build(**fields).save_pretrained(tmp_path / "base")
    model = adapted(model=CoEForCausalLM.from_pretrained(tmp_path / "base").eval())
    model.set_experts_implementation(implementation)
    own = expected_counts("none", True)["experts"]
    assert count_adapted(model)["experts"] == own  # of two pools, as of two layers of a pool each
    inputs = tokens(3, 11)
    output = model(inputs)
    assert (output.logits - build(**fields)(inputs).logits).abs().max() > 1e-3
    model.train()(inputs, labels=inputs).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_equal_to_1e6(again(inputs).logits, output.logits)
    merged = model.merge_and_unload()
    assert_equal_to_1e6(merged(inputs).logits, output.logits)
    names = [name for name in merged.state_dict() if ".mlp.experts." in name]
    assert len(names) == 2 * 2


def saved_expert_stacks(num_iterations: int, **pools) -> int:
    """Bytes of the expert-stack-sized tensors that autograd keeps of a LoRA forward, without the parameters."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_local_experts": 16, "num_hidden_layers": 1, **pools}
    model = build(num_iterations=num_iterations, num_attention_heads=4, num_key_value_heads=4, **sizes)
    experts = model.model.layers[0].mlp.experts
    stacks = {experts.gate_up_proj.nbytes, experts.down_proj.nbytes}
    model = adapted("none", model=model).train()
    ignored = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored and storage.nbytes() in stacks:
            kept[storage.data_ptr()] = tensor
        return tensor

    inputs = tokens(2, 5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs, labels=inputs).loss.backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_one_merged_copy_of_the_experts_serves_all_iterations():
    one, four = saved_expert_stacks(1), saved_expert_stacks(4)
    assert one > 0
    assert four <= 1.1 * one


def test_one_merged_copy_of_the_experts_serves_all_layers_of_a_pool():
    assert saved_expert_stacks(2, num_hidden_layers=4, layers_per_pool=4) <= 1.1 * saved_expert_stacks(2)


def test_the_cached_merge_has_the_gradients_of_a_merge_per_iteration(monkeypatch):
    import contextlib

    from torch.nn.utils import parametrize

    inputs = tokens(2, 7)
    gradients = []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr(parametrize, "cached", contextlib.nullcontext)
        model = adapted("lora").train()
        model(inputs, labels=inputs).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for with_cache, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_cache, without, atol=1e-6, rtol=1e-4)


def test_lora_with_gradient_checkpointing_has_the_same_gradients():
    inputs = tokens(2, 7)
    gradients = []
    for checkpointing in (False, True):
        model = adapted("full").train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(inputs, labels=inputs).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, atol=1e-6, rtol=1e-4)


def test_all_linear_adapts_attention_and_the_shared_expert_and_not_the_experts():
    model = peft.get_peft_model(build(num_shared_experts=1), peft.LoraConfig(r=5, target_modules="all-linear"))
    expected = expected_counts("none", True)
    expected.pop("experts")
    assert count_adapted(model) == expected


def test_lora_config_without_targets_adapts_what_it_adapts_in_mixtral():
    model = peft.get_peft_model(build(), peft.LoraConfig())
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}


# What a small model needs beside the default.
TUNERS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {},
    "C3A": {"block_size": 64},
    "DELORA": {},
    "FOURIERFT": {},
    "HIRA": {},
    "HRA": {},
    "IA3": {},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "LORA": {},
    "MISS": {},
    "OFT": {},
    "PSOFT": {},
    "RANDLORA": {},
    "ROAD": {},
    "SHIRA": {},
    "VBLORA": {"vector_length": 64},
    "VERA": {},
    "WAVEFT": {},
    "OSF": {},
    "BEFT": {},
    "GRALORA": {},
    "PEANUT": {},
    "TINYLORA": {},
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_without_targets_trains_what_it_trains_in_mixtral(tuner):
    if tuner not in PEFT_TYPE_TO_TUNER_MAPPING:
        pytest.skip(f"this PEFT has no {tuner}")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = peft.get_peft_model(build(**sizes), PEFT_TYPE_TO_CONFIG_MAPPING[tuner](**TUNERS[tuner]))
    inputs = tokens(2, 7)
    model.train()(input_ids=inputs, labels=inputs).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    adapted = "norm" if tuner == "LN_TUNING" else "self_attn"
    shared = ("vera_", "randlora_", "vblora_", "tinylora_")  # one basis for all modules
    assert all(adapted in name or any(part in name for part in shared) for name in trained), trained


@pytest.mark.skipif("SHADOW" not in PEFT_TYPE_TO_TUNER_MAPPING, reason="this PEFT has no SHADOW")
def test_a_shadow_of_a_model_with_pools_has_whole_pools():
    model, ids = build(num_hidden_layers=4, layers_per_pool=2), tokens(2, 7)
    shadow = partial(PEFT_TYPE_TO_CONFIG_MAPPING["SHADOW"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`layers_per_pool=2` must be a divisor of num_hidden_layers=1"):
        peft.get_peft_model(model, shadow())
    model = peft.get_peft_model(build(num_hidden_layers=4, layers_per_pool=2), shadow(shadow_num_hidden_layers=2))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "experts" in name}
    assert gradients and all("shadow" in name and grad.any() for name, grad in gradients.items())


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import peft; import modeling_coe", "import modeling_coe; import peft"])
def test_lora_config_without_targets_works_whichever_is_imported_first(order):
    program = f"{order}\n" + (
        "config = modeling_coe.CoEConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, "
        "num_attention_heads=2, num_local_experts=3, num_experts_per_tok=1)\n"
        "model = peft.get_peft_model(modeling_coe.CoEForCausalLM(config), peft.LoraConfig())\n"
        "print(sorted({n.split('.')[-4] for n, p in model.named_parameters() if p.requires_grad}))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip().splitlines()[-1] == "['q_proj', 'v_proj']"


@pytest.mark.slow
def test_the_package_imports_without_peft():
    program = "import sys; sys.modules['peft'] = None; import modeling_coe; print(modeling_coe.CoEConfig.model_type)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "coe"


def test_lora_config_refuses_what_it_cannot_adapt():
    with pytest.raises(ValueError, match="`router='half'` must be one of"):
        lora_config(build(), router="half")
    with pytest.raises(ValueError, match="adapts CoE models only"):
        from transformers import GPT2Config, GPT2Model

        lora_config(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=8)))
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        count_adapted(model)


def test_a_classifier_is_adapted_too():
    model = build(CoEForSequenceClassification)
    assert count_adapted(peft.get_peft_model(model, lora_config(model)))["experts"] > 0


@pytest.mark.parametrize("head", [*TASKS])
def test_the_new_head_of_a_task_learns_and_is_saved(head, tmp_path):
    build().save_pretrained(tmp_path / "base")
    model = head.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, lora_config(model))
    inputs = {"input_ids": tokens(2, 9)}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    first = model.train()(**inputs)
    sum(value.float().pow(2).sum() for value in first.values() if isinstance(value, torch.Tensor)).backward()
    optimizer.step()
    new = {n for n, p in model.named_parameters() if p.requires_grad and re.search(r"\.(score|qa_outputs)\.", n)}
    assert new or head is CoEForCausalLM
    expected = model.eval()(**inputs)[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(head.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert_equal_to_1e6(again(**inputs)[0], expected)


def test_lists_are_added_to_what_is_adapted_anyway():
    model = build()
    more = {"modules_to_save": ["lm_head"], "target_parameters": ["embed_tokens.weight"], "target_modules": ["gate"]}
    config = lora_config(model, **more)
    assert config.modules_to_save == ["mlp.gate", "lm_head"]
    assert config.target_modules == {*ATTENTION, "gate"}
    assert config.target_parameters == [*EXPERTS, "embed_tokens.weight"]
    counts = count_adapted(peft.get_peft_model(model, lora_config(model, modules_to_save=["lm_head"])))
    assert counts["router"] == expected_counts("full", True)["router"]
    with pytest.raises(ValueError, match=r"`target_modules='all-linear'` is added to .*; give a list"):
        lora_config(model, target_modules="all-linear")

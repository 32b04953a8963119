# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""CoEConfig: what it refuses, and what it tells the host."""

import json

import pytest
from conftest import SMALL, build
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, MixtralConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from modeling_coe import CoEConfig


IMPOSSIBLE = {
    "more experts chosen than there are": (
        {"num_experts_per_tok": 9, "num_local_experts": 8},
        "num_experts_per_tok=9",
    ),
    "no iteration": ({"num_iterations": 0}, "num_iterations=0"),
    "negative iterations": ({"num_iterations": -2}, "num_iterations=-2"),
    "no expert": ({"num_local_experts": 0}, "num_local_experts=0"),
    "no expert chosen": ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
    "heads that do not divide": ({"hidden_size": 50, "num_attention_heads": 4}, "hidden_size=50"),
    "key heads that do not divide": ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads=6"),
    "odd head width": ({"head_dim": 7}, "head_dim=7"),
    "odd derived head width": ({"hidden_size": 60, "num_attention_heads": 4}, "head_dim"),
    "unknown residual": ({"residual": "middle"}, "residual='middle'"),
    "unknown qk_norm": ({"qk_norm": "row"}, "qk_norm='row'"),
    "negative width": ({"intermediate_size": -8}, "intermediate_size=-8"),
    "negative layers": ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
    "empty vocabulary": ({"vocab_size": 0}, "vocab_size=0"),
    "negative shared experts": ({"num_shared_experts": -1}, "num_shared_experts=-1"),
    "NaN coefficient": ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef=nan"),
    "infinite coefficient": ({"router_aux_loss_coef": float("inf")}, "router_aux_loss_coef=inf"),
    "negative coefficient": ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1"),
    "NaN jitter": ({"router_jitter_noise": float("nan")}, "router_jitter_noise=nan"),
    "jitter of one": ({"router_jitter_noise": 1.0}, "router_jitter_noise=1.0"),
    "NaN epsilon": ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    "dropout of one": ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
    "no window": ({"sliding_window": 0}, "sliding_window=0"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_configurations_name_field_value_and_remedy(case):
    overrides, named = IMPOSSIBLE[case]
    with pytest.raises(ValueError) as error:
        CoEConfig(**overrides)
    assert named in str(error.value)
    assert "must be" in str(error.value)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("num_iteration", "num_iterations"),
        ("num_experts_per_token", "num_experts_per_tok"),
        ("residuals", "residual"),
        ("hidden_sise", "hidden_size"),
        ("router_aux_loss_coeff", "router_aux_loss_coef"),
        ("norm_topk_probs", "norm_topk_prob"),
    ],
)
def test_misspelt_keys_are_refused_with_the_field_they_mean(tmp_path, key, field):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "coe", **SMALL, key: 2}))
    with pytest.raises(ValueError, match=rf"`{key}=2`; did you mean `{field}`"):
        AutoConfig.from_pretrained(tmp_path)


def test_wrong_types_are_refused_with_field_and_value():
    with pytest.raises(StrictDataclassError, match="num_iterations"):
        CoEConfig(num_iterations=2.5)


def test_changed_configurations_are_checked_before_they_are_saved(tmp_path):
    config = CoEConfig()
    config.num_experts_per_tok = 65
    with pytest.raises(StrictDataclassError, match="num_experts_per_tok=65"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_round_trip_keeps_every_field_and_foreign_keys(tmp_path):
    config = CoEConfig(
        num_iterations=3, residual="inner", qk_norm="full", sliding_window=9, iteration_scale=True, tokens_seen=12,
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CoEConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert (loaded.tokens_seen, loaded.rope_parameters["factor"]) == (12, 2.0)


def test_fields_shared_with_mixtral_have_its_names_and_types():
    ours, mixtral = CoEConfig.__dataclass_fields__, MixtralConfig.__dataclass_fields__
    assert set(mixtral) <= set(ours)
    assert CoEConfig(num_experts=5, num_experts_per_tok=1).num_local_experts == 5
    assert CoEConfig().num_experts == CoEConfig().num_local_experts


def test_parallel_plans_are_mixtrals():
    ours, mixtral = CoEConfig(), MixtralConfig()
    assert ours.base_model_tp_plan == mixtral.base_model_tp_plan
    assert ours.base_model_pp_plan == mixtral.base_model_pp_plan
    assert ours.base_model_fsdp_plan == mixtral.base_model_fsdp_plan
    if "ep_dispatch_experts" in ALL_PARALLEL_STYLES:
        assert ours.base_model_ep_plan == mixtral.base_model_ep_plan


@pytest.mark.parametrize("options", [{"qk_norm": "head"}, {"qk_norm": "full"}, {"num_shared_experts": 2}])
def test_parallel_plans_name_existing_modules_and_styles(options):
    model = build(**options)
    names = {name.replace(".0.", ".*.").replace(".1.", ".*.") for name, _ in model.named_modules()}
    names |= {name.replace(".0.", ".*.").replace(".1.", ".*.") for name, _ in model.named_parameters()}
    for rule, style in model.config.base_model_tp_plan.items():
        assert f"model.{rule}" in names
        assert style in ALL_PARALLEL_STYLES
    assert "base_model_tp_plan" not in model.config.to_dict()

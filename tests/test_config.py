# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""CoEConfig: what it refuses, and what it tells transformers."""

import json

import pytest
import torch
from conftest import SMALL, build
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from modeling_coe import CoEConfig, CoEForCausalLM, configuration_coe


IMPOSSIBLE = {
    "more experts chosen than there are": (
        {"num_experts_per_tok": 9, "num_local_experts": 8},
        "num_experts_per_tok=9",
    ),
    "no iteration": ({"num_iterations": 0}, "num_iterations=0"),
    "negative iterations": ({"num_iterations": -2}, "num_iterations=-2"),
    "a pool of no layer": ({"layers_per_pool": 0}, "layers_per_pool=0"),
    "pools that do not divide the layers": ({"num_hidden_layers": 4, "layers_per_pool": 3}, "layers_per_pool=3"),
    "a pool of more layers than there are": ({"num_hidden_layers": 4, "layers_per_pool": 8}, "layers_per_pool=8"),
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
    "unknown activation": ({"hidden_act": "sillu"}, "hidden_act='sillu'"),
    "unknown rope type": ({"rope_parameters": {"rope_type": "foo"}}, "'rope_type': 'foo'"),
    "rope type of no string": ({"rope_parameters": {"rope_type": ["linear"]}}, "'rope_type': ['linear']"),
    "theta as text": ({"rope_theta": "1e4"}, "rope_theta='1e4'"),
    "theta of zero": ({"rope_theta": 0}, "'rope_theta': 0"),
    "NaN theta": ({"rope_theta": float("nan")}, "rope_theta=nan"),
    "factor as text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'"),
    "rotation of half a head": ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor': 0.5"),
    "longrope without a head width": (
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}},
        "head_dim=None",
    ),
    "padding beyond the vocabulary": ({"pad_token_id": 32000}, "pad_token_id=32000"),
    "negative padding": ({"pad_token_id": -1}, "pad_token_id=-1"),
    "two numbers of experts": ({"num_experts": 8, "num_local_experts": 16}, "num_experts=8"),
    "a number of experts beside the default": ({"num_experts": 8, "num_local_experts": 64}, "num_local_experts=64"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_configurations_name_field_value_and_remedy(case):
    overrides, named = IMPOSSIBLE[case]
    with pytest.raises(ValueError) as error:
        CoEConfig(**overrides)
    assert named in str(error.value)
    assert "must be" in str(error.value)


def test_yarn_keeps_its_switch():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "truncate": False}
    assert CoEConfig(rope_parameters=yarn).rope_parameters["truncate"] is False


def test_a_rope_type_without_its_factor_is_refused():
    with pytest.raises(ValueError, match=r"rope_parameters=.*'linear'.*factor"):
        CoEConfig(rope_parameters={"rope_type": "linear"})


MISSPELT = {
    "num_iteration": "num_iterations",
    "num_experts_per_token": "num_experts_per_tok",
    "residuals": "residual",
    "hidden_sise": "hidden_size",
    "router_aux_loss_coeff": "router_aux_loss_coef",
    "norm_topk_probs": "norm_topk_prob",
    "top_k": "num_experts_per_tok",
    "n_routed_experts": "num_local_experts",
    "moe_intermediate_size": "intermediate_size",
    "num_label": "num_labels",
    "rope_thetas": "rope_theta",
}


@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_keys_are_refused_where_they_are_typed_and_reported_where_they_are_stored(key, tmp_path, monkeypatch):
    message = f"`{key}=2`; did you mean `{MISSPELT[key]}`"
    with pytest.raises(ValueError, match=message):
        CoEConfig(**SMALL, **{key: 2})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "coe", **SMALL, key: 2}))
    warnings = []
    monkeypatch.setattr(configuration_coe.logger, "warning", warnings.append)
    for load in (AutoConfig.from_pretrained, CoEConfig.from_pretrained):
        assert load(tmp_path).num_iterations == SMALL["num_iterations"]
    CoEConfig.from_dict({**SMALL, key: 2})
    assert len(warnings) == 3 and all(message in warning for warning in warnings)


PLAUSIBLE = (
    "eot_token_id sep_token_id boi_token_id eos_token pad_token num_iteration n_shared_experts hidden_sizes num_label "
    "architecture use_sliding_window attention_heads v_head_dim tokenizer_class finetuning_task problem_types dtypes "
    "tie_word_embedding hidden_activation head_dims is_decoder mlp_bias qk_norms model_types output_router_logit"
).split()


def test_what_was_saved_loads_again_and_copies_itself(tmp_path):
    config = CoEConfig(**SMALL)
    refused = set()
    for key in PLAUSIBLE:
        try:
            setattr(config, key, 5)
        except ValueError as error:
            assert f"unknown key `{key}=5`; did you mean" in str(error)
            refused.add(key)
    assert {"num_iteration", "hidden_sizes"} <= refused < set(PLAUSIBLE)
    config.save_pretrained(tmp_path)
    for loaded in (CoEConfig.from_pretrained(tmp_path), CoEConfig(**config.to_dict())):
        assert {getattr(loaded, key) for key in set(PLAUSIBLE) - refused - set(configuration_coe.OTHER_NAMES)} == {5}
    stored = json.loads((tmp_path / "config.json").read_text()) | dict.fromkeys(PLAUSIBLE, 5)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    CoEConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert CoEConfig.from_pretrained(tmp_path / "again").eot_token_id == 5


@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_keys_are_refused_as_attributes_and_beside_a_path(key, tmp_path):
    build().save_pretrained(tmp_path)
    message = f"unknown key `{key}=2`; did you mean `{MISSPELT[key]}`"
    if key in configuration_coe.OTHER_NAMES:  # transformers sets some of them, whatever the model
        setattr(CoEConfig(**SMALL), key, 2)
    else:
        with pytest.raises(ValueError, match=message):
            setattr(CoEConfig(**SMALL), key, 2)
    for load in (AutoConfig.from_pretrained, CoEConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **{key: 2})


@pytest.mark.parametrize("key", ["rope_theta", "rope_scaling"])
def test_what_a_configuration_reads_once_is_refused_later(key):
    assert CoEConfig(**SMALL, rope_theta=5e4).rope_parameters["rope_theta"] == 5e4
    with pytest.raises(ValueError, match=f"`{key}=10000.0` has no effect .* change `rope_parameters`"):
        setattr(CoEConfig(**SMALL), key, 1e4)


@pytest.mark.parametrize(
    "field, value", [("eos_token_id", 99), ("eos_token_id", [2, -1]), ("bos_token_id", 120), ("num_labels", "3")]
)
def test_impossible_tokens_and_labels_are_refused_where_they_are_typed(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{field}="):
        CoEConfig(**{**SMALL, field: value})
    config = CoEConfig(**SMALL)
    config.save_pretrained(tmp_path)
    if field == "num_labels":
        with pytest.raises(ValueError, match="`num_labels='3'` must be a positive integer"):
            AutoConfig.from_pretrained(tmp_path, num_labels="3")
    else:
        stored = json.loads((tmp_path / "config.json").read_text()) | {field: value}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        assert getattr(CoEConfig.from_pretrained(tmp_path), field) == value
        with pytest.raises(ValueError, match=f"`{field}="):
            CoEConfig.from_pretrained(tmp_path, **{field: value})


def test_tokens_of_their_own_are_no_misspelling(monkeypatch):
    warnings = []
    monkeypatch.setattr(configuration_coe.logger, "warning", warnings.append)
    assert CoEConfig(eot_token_id=5, sep_token_id=6, decoder_start_token_id=7).eot_token_id == 5
    CoEConfig(**CoEConfig(eot_token_id=5).to_dict())
    assert warnings == []


@pytest.mark.parametrize("field, value", [("num_experts_per_tok", 8), ("num_iterations", 0), ("hidden_act", "sillu")])
def test_changed_configurations_are_checked_before_they_become_a_model(field, value):
    config = CoEConfig(**SMALL)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"`{field}={value!r}` must be"):
        CoEForCausalLM(config)


def test_a_padding_token_may_come_before_its_embedding_and_only_a_model_refuses_it(tmp_path):
    model = build()
    model.config.pad_token_id = SMALL["vocab_size"]  # as TRL sets it
    model.resize_token_embeddings(SMALL["vocab_size"] + 1, mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert CoEForCausalLM.from_pretrained(tmp_path).model.embed_tokens.padding_idx == SMALL["vocab_size"]
    model.config.pad_token_id = 200
    model.config.save_pretrained(tmp_path)  # nobody loses a trained model for it
    with pytest.raises(ValueError, match="`pad_token_id=200` must be"):
        CoEForCausalLM.from_pretrained(tmp_path)
    assert CoEForCausalLM.from_pretrained(tmp_path, pad_token_id=3).config.pad_token_id == 3


def test_wrong_types_are_refused_with_field_and_value():
    with pytest.raises(StrictDataclassError, match="num_iterations"):
        CoEConfig(num_iterations=2.5)


def test_changed_configurations_are_checked_before_they_are_saved(tmp_path):
    config = CoEConfig()
    config.num_experts_per_tok = 65
    with pytest.raises(ValueError, match="num_experts_per_tok=65"):
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


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": [1.0]},
        {"rope_type": "default", "rope_theta": True},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": [2.0]},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 0},
        {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": 1.0, "long_factor": 1.0},
    ],
)
def test_rope_values_that_cannot_be_are_refused_by_name(rope):
    with pytest.raises(ValueError, match="rope_parameters"):
        CoEConfig(head_dim=8, rope_parameters=rope)


@pytest.mark.parametrize("key", ["num_layers", "n_heads", "hidden_dim", "num_selected_experts", "jitter_noise"])
def test_names_of_other_models_are_refused_with_ours(key):
    with pytest.raises(ValueError, match=f"unknown key `{key}=3`; did you mean"):
        CoEConfig(**{key: 3})


def test_a_type_that_torch_has_not_is_refused_by_name():
    with pytest.raises(ValueError, match="`dtype='bf16'` must be"):
        CoEConfig(dtype="bf16")
    assert CoEConfig(dtype="bfloat16").dtype in ("bfloat16", torch.bfloat16)


def test_a_stored_configuration_with_an_impossible_override_is_refused(tmp_path):
    CoEConfig(num_local_experts=4, num_experts_per_tok=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_experts_per_tok=9"):
        CoEConfig.from_pretrained(tmp_path, num_experts_per_tok=9)

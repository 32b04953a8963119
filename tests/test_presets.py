# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Every preset names only fields of its configuration, and every pretraining recipe is understood as written."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_coe import CoEConfig
from modeling_coe.train.arguments import DataArguments, ModelArguments, PretrainArguments, parse


PROJECT = Path(__file__).parents[1]
PRESETS = sorted((PROJECT / "configuration" / "models").glob("*.json"))
RECIPES = sorted((PROJECT / "configuration" / "pretrain").glob("*.yaml"))


def parameters(name: str) -> int:
    config = AutoConfig.from_pretrained(PROJECT / "configuration" / "models" / name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_key_of_a_preset_is_a_declared_field(path):
    preset = json.loads(path.read_text())
    assert preset.pop("model_type") == CoEConfig.model_type
    assert not preset.keys() - {field.name for field in fields(CoEConfig)}
    config = AutoConfig.from_pretrained(path)
    assert {key: getattr(config, key) for key in preset} == preset


def test_the_baseline_differs_from_the_chain_in_c_and_k_alone():
    chain, baseline = (
        json.loads((PROJECT / "configuration" / "models" / f"{name}.json").read_text())
        for name in ("coe_c2_k4_n64", "moe_k8_n64")
    )
    assert {key for key in chain if chain[key] != baseline[key]} == {"num_iterations", "num_experts_per_tok"}
    for preset in (chain, baseline):
        assert preset["num_iterations"] * preset["num_experts_per_tok"] == 8
    # The chain has one more router a layer, and nothing else.
    assert parameters("coe_c2_k4_n64.json") - parameters("moe_k8_n64.json") == 4 * 64 * 1024


def test_the_presets_with_one_pool_have_a_quarter_and_all_of_the_experts():
    experts = 64 * 3 * 1024 * 704
    own, quarter, whole = map(parameters, (f"coe_c2_k4_n{n}.json" for n in ("64", "64_pool4", "256_pool4")))
    assert own - quarter == 3 * experts
    # A router chooses among four times as many.
    assert whole - own == 4 * 2 * (256 - 64) * 1024


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_parsed_as_written_and_its_first_comment_says_how_and_what(path, monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    output = str(tmp_path)
    # A recipe for an accelerator asks for bf16, which Trainer refuses where there is none.
    arguments = ["--config", str(path), "--output_dir", output, "--bf16", "false"]
    model, data, training = parse(ModelArguments, DataArguments, PretrainArguments, arguments=arguments)
    known = vars(model) | vars(data) | vars(training)
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in ("output_dir", "bf16"):
            assert known[key] == (float(value) if isinstance(known[key], float) else value), key
    assert Path(model.model).is_file()
    comment = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"--config configuration/pretrain/{path.name}" in comment
    assert re.search("[Hh]ardware|GPU|CPU|card", comment) and re.search("[Ee]xpected|[Mm]easured", comment)


def test_a_misspelt_recipe_key_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[0].read_text() + "\nlerning_rate: 1.0e-3\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        parse(ModelArguments, DataArguments, PretrainArguments, arguments=["--config", str(recipe)])


def test_the_paper_recipe_is_the_published_set_up():
    recipe = PROJECT / "configuration" / "pretrain" / "paper.yaml"
    arguments = ["--config", str(recipe), "--bf16", "false"]
    _, data, training = parse(ModelArguments, DataArguments, PretrainArguments, arguments=arguments)
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert sequences * data.sequence_length == 32_768
    assert (training.max_steps, training.warmup_steps, training.learning_rate) == (1000, 100, 3e-4)
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.01)
    assert (training.max_grad_norm, training.lr_scheduler_type) == (1.0, "constant_with_warmup")


def test_the_demo_s_recorded_runs_have_its_recipe():
    recorded = json.loads((PROJECT / "model_cards" / "studies" / "pretrain_smoke.json").read_text())
    recipe = yaml.safe_load((PROJECT / "configuration" / "pretrain" / "smoke.yaml").read_text())
    preset = json.loads((PROJECT / recipe["model"]).read_text())
    assert (recorded["recipe"], recorded["preset"]) == (recipe, preset)
    assert {run["evaluations"][-1]["step"] for run in recorded["runs"]} == {recipe["max_steps"]}

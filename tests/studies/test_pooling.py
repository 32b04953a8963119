# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The ways in which the study joins the pools of two layers."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build

from modeling_coe import CoEForCausalLM, downcycle, upcycle
from modeling_coe.train.studies.pooling import join_pools


SIZES = {"num_iterations": 1, "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture
def source(tmp_path):
    build(**SIZES).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_the_mean_is_what_upcycle_makes(source, tmp_path):
    joined = CoEForCausalLM.from_pretrained(join_pools(source, tmp_path / "mean", "mean"))
    mixtral = downcycle(source, tmp_path / "mixtral")
    upcycled = upcycle(mixtral, tmp_path / "upcycled", num_iterations=1, layers_per_pool=2)
    expected = CoEForCausalLM.from_pretrained(upcycled).state_dict()
    assert joined.state_dict().keys() == expected.keys()
    for name, tensor in joined.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.mark.parametrize("way, experts", [("alternate", 8), ("concatenated", 16)])
def test_each_expert_keeps_its_row_of_the_router(source, tmp_path, way, experts):
    """In both layers, so a token that goes to the experts of its own layer meets what it met before."""
    weights = CoEForCausalLM.from_pretrained(source).state_dict()
    joined = CoEForCausalLM.from_pretrained(join_pools(source, tmp_path / way, way))
    result = joined.state_dict()
    assert joined.config.num_local_experts == experts and joined.config.layers_per_pool == 2
    for index in range(experts):
        layer, old = (index % 2, index) if way == "alternate" else divmod(index, 8)
        for pool in (0, 2):
            origin = f"model.layers.{pool + layer}.mlp"
            pair = [f"model.layers.{pool}.mlp.experts.down_proj", f"{origin}.experts.down_proj"]
            torch.testing.assert_close(result[pair[0]][index], weights[pair[1]][old])
            for user in (pool, pool + 1):
                row = result[f"model.layers.{user}.mlp.gate.weight"][0, index]
                torch.testing.assert_close(row, weights[f"{origin}.gate.weight"][0, old])


def test_what_upcycle_does_healed_best_of_what_halves_the_experts_with_every_seed():
    result = Path(__file__).parents[2] / "model_cards" / "studies" / "pooling_gsm8k.json"
    runs = json.loads(result.read_text())["runs"]
    losses = {(run["name"], run["seed"]): run["validation_loss"] for run in runs}
    assert all(losses["mean", seed] < losses["alternate", seed] for seed in (0, 1))

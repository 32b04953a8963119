# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Model cards: rendered from facts and nothing else, complete or not at all, with a head that the Hub takes."""

import copy
import json
import re
from pathlib import Path

import jinja2
import pytest
from conftest import build
from huggingface_hub import EvalResult, ModelCard, ModelCardData, eval_result_entries_to_yaml

from modeling_coe.train.cards import benchmark_results, energy_facts, model_facts, render_card, validate_metadata


CARDS = Path(__file__).parents[1] / "model_cards"
TEMPLATE = CARDS / "template.md"
PUBLISHED = sorted(path.parent for path in CARDS.glob("*/facts.json"))


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture
def facts():
    return facts_of(PUBLISHED[0])


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_committed_card_is_what_its_facts_render_to(folder):
    assert (folder / "README.md").read_text() == str(render_card(facts_of(folder), TEMPLATE))
    for picture in ("loss_curve.png", "routing.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def without(facts: dict, path: list[str]) -> dict:
    pruned = copy.deepcopy(facts)
    parent = pruned
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return pruned


def test_missing_fact_is_an_error(facts):
    read = set(re.findall(r"\b(?:data|energy|model|routing|run|sample)\.[a-z_]+", TEMPLATE.read_text()))
    assert {"run.seed", "data.license", "model.parameters", "energy.watts", "sample.prompt"} <= read
    for name in [*read, *(facts.keys() - {"date"})]:  # the date is for `.eval_results` only
        with pytest.raises((jinja2.UndefinedError, KeyError)):
            render_card(without(facts, name.split(".")), TEMPLATE)


def test_changed_facts_change_the_card(facts):
    facts["evaluation"][0]["value"] = 12.3456
    facts["run"]["tokens"] = 7654321
    card = render_card(facts, TEMPLATE)
    assert "12.35" in card.text and "7,654,321 tokens" in card.text
    assert card.data.eval_results[0].metric_value == 12.3456


def test_results_stand_in_both_forms(facts):
    facts["data"] = {"name": "openai/gsm8k", "hub_id": "openai/gsm8k", "license": "mit"}
    facts["evaluation"] = [
        {"split": "test", "metric": "loss", "name": "validation loss", "value": 1.5, "count": None},
        {"split": "test", "metric": "exact_match", "name": "share solved", "value": 0.125, "count": 1319},
    ]
    card = render_card(facts, TEMPLATE)
    reread = ModelCard(str(card)).data
    assert [(r.metric_type, r.metric_value) for r in reread.eval_results] == [("loss", 1.5), ("exact_match", 0.125)]
    assert {r.dataset_type for r in reread.eval_results} == {"openai/gsm8k"}
    (entry,) = eval_result_entries_to_yaml(benchmark_results(facts))
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 0.125
    assert "1319 problems" in entry["notes"]


def test_base_model_is_metadata_only_where_the_hub_has_it(facts):
    for hub_id in (None, "user/base"):
        facts["base"] = {"hub_id": hub_id, "training": None, "upcycling": None}
        assert render_card(facts, TEMPLATE).data.base_model == hub_id


def test_data_that_is_not_on_the_hub_has_no_benchmark_results(facts):
    facts["data"]["hub_id"] = None
    assert benchmark_results(facts) == []
    assert render_card(facts, TEMPLATE).data.datasets is None


GOOD = {
    "language": "en",
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["coe"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": "Apache 2"}, "Apache 2"),
        ({"license": None}, "license=None"),
        ({"language": "English"}, "English"),
        ({"base_model": "/somewhere/runs/smoke"}, "somewhere"),
        ({"datasets": ["a b"]}, "a b"),
    ],
)
def test_metadata_the_hub_would_not_take_is_refused(change, message):
    validate_metadata(GOOD)
    with pytest.raises(ValueError, match=message):
        validate_metadata(GOOD | change)


def test_results_that_are_no_numbers_are_refused():
    result = EvalResult("text-generation", "data", "data", "loss", float("nan"), metric_name="validation loss")
    metadata = ModelCardData(**GOOD, eval_results=[result], model_name="model").to_dict()
    with pytest.raises(ValueError, match="validation loss=nan"):
        validate_metadata(metadata)


def test_model_facts_count_the_parameters_that_exist():
    model = build(num_shared_experts=1)
    facts = model_facts(model.config)
    assert facts["parameters"] == model.num_parameters()
    assert facts["active_parameters"] < facts["parameters"]
    assert (facts["num_iterations"], facts["num_experts_per_tok"], facts["num_local_experts"]) == (3, 2, 7)


def test_energy_is_power_times_time():
    assert energy_facts(seconds=7200, watts=500)["kilowatt_hours"] == 1.0

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Model cards as build products: facts (JSON) and a template give the Markdown, and a missing fact is an error.

facts = json.loads(Path("facts.json").read_text())
card = render_card(facts, Path("model_cards/template.md"))
card.save("README.md")
benchmark_results(facts)            # the same numbers in the form of `.eval_results/*.yaml`
"""

import math
import re
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from modeling_coe.budget import count_active_parameters, count_parameters
from modeling_coe.configuration_coe import CoEConfig


def model_facts(config: CoEConfig) -> dict:
    """The fields of the chain, and the parameters in total and those one token meets (`budget`)."""
    fields = (
        "num_iterations num_local_experts num_experts_per_tok num_shared_experts residual norm_topk_prob "
        "independent_gating iteration_scale num_hidden_layers hidden_size intermediate_size vocab_size "
        "max_position_embeddings num_attention_heads num_key_value_heads"
    ).split()
    return {name: getattr(config, name) for name in fields} | {
        "parameters": sum(count_parameters(config).values()),
        "active_parameters": count_active_parameters(config),
    }


def energy_facts(seconds: float, watts: float) -> dict | None:
    """An estimate, not a measurement: the assumed mean draw of the machine over the time of the run, in kWh.

    None where the time is not known, as for a finished run that was started once more.
    """
    if not seconds:
        return None
    return {"watts": watts, "kilowatt_hours": float(f"{watts * seconds / 3.6e6:.3g}")}


class MissingFact(jinja2.StrictUndefined):
    """Fails, naming the fact, in format strings too."""

    __format__ = jinja2.StrictUndefined.__str__


def render_card(facts: dict, template: Path) -> ModelCard:
    """The card of `facts`, with validated metadata.

    Raises:
        jinja2.UndefinedError: the template asks for a fact that is not there.
        KeyError: likewise, for the metadata.
        ValueError: metadata that the Hub would not take.
    """
    environment = jinja2.Environment(
        undefined=MissingFact, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["python"] = lambda text: repr(str(text))
    metadata = ModelCardData(**_metadata(facts))
    validate_metadata(metadata.to_dict())
    text = environment.from_string(template.read_text()).render(metadata=metadata.to_yaml(), **facts)
    return ModelCard(text)


def _metadata(facts: dict) -> dict:
    results = [
        EvalResult(
            task_type=facts["task"],
            dataset_type=facts["data"]["hub_id"] or facts["data"]["name"],
            dataset_name=facts["data"]["name"],
            dataset_split=result["split"],
            metric_type=result["metric"],
            metric_name=result["name"],
            metric_value=result["value"],
        )
        for result in facts["evaluation"]
    ]
    hub_id = facts["data"]["hub_id"]
    return {
        "license": facts["license"],
        "library_name": "transformers",
        "pipeline_tag": facts["task"],
        "language": facts["language"],
        "tags": ["coe", "chain-of-experts", "mixture-of-experts", "arxiv:2506.18945"],
        "base_model": facts["base"] and facts["base"]["hub_id"],
        "datasets": None if hub_id is None else [hub_id],
        "eval_results": results,
        "model_name": facts["repo"].rpartition("/")[2],
    }


def validate_metadata(metadata: dict):
    """What can be told offline; the Hub checks the rest of a card's head before it takes a commit.

    Raises:
        ValueError: naming the key, its value and what may stand there.
    """
    shapes = {"license": r"[a-z][a-z0-9.-]+", "language": r"[a-z]{2,3}"}
    for name, shape in shapes.items():
        if not re.fullmatch(shape, str(metadata.get(name))):
            raise ValueError(f"`{name}={metadata.get(name)!r}` must be an identifier such as apache-2.0 or en.")
    for repo in [metadata.get("base_model"), *(metadata.get("datasets") or [])]:
        if repo is not None:
            validate_repo_id(repo)  # a HFValidationError is a ValueError
    if "model-index" in metadata:
        _, results = model_index_to_eval_results(metadata["model-index"])
        for result in results:
            if not isinstance(result.metric_value, int | float) or not math.isfinite(result.metric_value):
                raise ValueError(f"The result `{result.metric_name}={result.metric_value!r}` must be a finite number.")


def benchmark_results(facts: dict) -> list[EvalResultEntry]:
    """The results on a benchmark of the Hub, for `.eval_results/*.yaml`; none if the data is not on the Hub.

    A benchmark counts solved problems; a validation loss does not belong there.
    """
    hub_id = facts["data"]["hub_id"]
    if hub_id is None:
        return []
    return [
        EvalResultEntry(
            dataset_id=hub_id,
            task_id=hub_id.rpartition("/")[2],
            value=result["value"],
            date=facts["date"],
            notes=f"{result['name']}, {result['count']} problems of the {result['split']} split",
        )
        for result in facts["evaluation"]
        if result["metric"] == "exact_match"
    ]

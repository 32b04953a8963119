# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Model cards as build products: facts (JSON) and a template give the Markdown, and a missing fact is an error.

facts = json.loads(Path("facts.json").read_text())
card = render_card(facts, Path("model_cards/template.md"))
card.save("README.md")
benchmark_results(facts)            # the same numbers in the form of `.eval_results/*.yaml`
"""

import math
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from modeling_coe.budget import count_active_parameters, count_parameters
from modeling_coe.configuration_coe import CoEConfig


# What the Hub reads from the head of a card; it drops other keys, or refuses the card, without saying which.
METADATA_KEYS = {
    "base_model",
    "datasets",
    "language",
    "library_name",
    "license",
    "model-index",
    "pipeline_tag",
    "tags",
}
REQUIRED_KEYS = {"language", "library_name", "license", "pipeline_tag", "tags"}
# Identifiers of the Hub's list; others need `license: other` with a name and a link, which the template does not have.
LICENSES = {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0", "mit", "odc-by"}
TASKS = {"text-generation", "text-classification", "token-classification", "question-answering"}


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


def energy_facts(seconds: float, watts: float) -> dict:
    """An estimate, not a measurement: the assumed mean draw of the machine over the time of the run, in kWh."""
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
    """Offline, what the Hub's own check of a card's head would object to.

    Raises:
        ValueError: naming the key, its value and what may stand there.
    """
    if unknown := sorted(metadata.keys() - METADATA_KEYS):
        raise ValueError(f"The metadata has the keys {unknown}; the Hub reads {sorted(METADATA_KEYS)}.")
    if missing := sorted(key for key in REQUIRED_KEYS if not metadata.get(key)):
        raise ValueError(f"The metadata lacks {missing}; add these facts.")
    if metadata["license"] not in LICENSES:
        raise ValueError(f"`license={metadata['license']!r}` must be one of {sorted(LICENSES)}.")
    if metadata["pipeline_tag"] not in TASKS:
        raise ValueError(f"`pipeline_tag={metadata['pipeline_tag']!r}` must be one of {sorted(TASKS)}.")
    if not (2 <= len(metadata["language"]) <= 3 and metadata["language"].islower()):
        raise ValueError(f"`language={metadata['language']!r}` must be an ISO 639 code such as 'en'.")
    for repo in [metadata.get("base_model"), *metadata.get("datasets", [])]:
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

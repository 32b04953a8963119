# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Every claim and what became of it, from the committed results of train/studies/reproduce.py:

python train/studies/verdicts.py     # writes model_cards/studies/README.md
"""

import json
import statistics
from pathlib import Path

import jinja2
import yaml

from modeling_coe import CoEConfig
from modeling_coe.budget import count_expert_combinations, equal_compute_moe


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "studies"
TABLES = ROOT / "configuration" / "studies"


def main():
    (RESULTS / "README.md").write_text(render(), encoding="utf-8")


def render() -> str:
    """The page, from the JSON files in model_cards/studies and its template there."""
    questions = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["question"] for path in TABLES.glob("*.yaml")
    }
    results = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    memory, losses, routings, searches, others = {}, {}, {}, {}, {}
    for name, result in results.items():
        if name.startswith("routing_"):
            routings[name] = result
        elif name.startswith("search_"):
            searches[name] = result | {
                "comparison": compare_forms(result["runs"]),
                "by_width": compare_first_weights(result["runs"]),
            }
        elif "claims" in result:
            (memory if name.endswith("_memory.json") else losses)[name] = result
        else:
            others[name] = result
    chain = CoEConfig(num_iterations=2, num_experts_per_tok=4, num_local_experts=64)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mean_by_iteration"] = mean_by_iteration
    template = environment.from_string((RESULTS / "template.md").read_text(encoding="utf-8"))
    claims = [claim | {"scale": scale_of(name)} for name, result in losses.items() for claim in result["claims"]]
    return template.render(
        margin=min((claim["margin"] for claim in claims), default=0.02),
        claims=claims,
        memory_claims=[
            claim | {"scale": scale_of(name)} for name, result in memory.items() for claim in result["claims"]
        ],
        combinations=count_expert_combinations(chain) / count_expert_combinations(equal_compute_moe(chain)),
        tables=[describe(name, result) for name, result in losses.items()],
        routings=routings,
        searches=searches,
        memory_tables=[{"file": name, "scale_name": scale_of(name), **result} for name, result in memory.items()],
        missing=[
            (table, question)
            for table, question in sorted(questions.items())
            if not any(name.startswith(f"{table}_") and name not in memory for name in results)
        ],
        others=[(name, result.get("question")) for name, result in others.items()],
    )


def scale_of(name: str) -> str:
    """`memory_cpu_memory.json` -> `cpu`."""
    return name.removesuffix(".json").removesuffix("_memory").rpartition("_")[2]


def mean_by_iteration(values: list[list[float]]) -> str:
    """`[L][C]` -> the means over the layers."""
    return ", ".join(f"{statistics.mean(layers):.3f}" for layers in zip(*values, strict=True))


def compare_forms(runs: list[dict]) -> list[dict]:
    """The forms of a search: each one's differences to Mixtral's block with the same seed, learning rate, length and
    first weights, the best form first."""
    same = ("dataset", "seed", "learning_rate", "steps", "initializer_range", "draw_by_name")
    baseline = {tuple(run[key] for key in same): run for run in runs if run["form"] == "Mixtral"}
    forms = {}
    for run in runs:
        key = tuple(run[key] for key in same)
        if run["draw_by_name"] and run["form"] != "Mixtral" and key in baseline:
            row = {name: run[name] for name in ("form", "dataset", "steps", "learning_rate")}
            row = forms.setdefault(tuple(row.values()), row | {"differences": [], "solved": []})
            row["differences"].append(run["validation_loss"] - baseline[key]["validation_loss"])
            row["solved"].append((run["share_solved"], baseline[key]["share_solved"]))
    order = ("dataset", "steps", "learning_rate")
    return sorted(forms.values(), key=lambda row: (*(row[key] for key in order), statistics.mean(row["differences"])))


def compare_first_weights(runs: list[dict]) -> dict[tuple[str, float], list[float]]:
    """Losses of two blocks, by the width of their first weights, after equally many steps at one learning rate."""
    losses = {}
    for run in runs:
        if run["form"] in ("Mixtral", "nested") and not run["draw_by_name"]:
            if (run["dataset"], run["learning_rate"], run["steps"]) == ("gsm8k", 0.004, 400):
                losses.setdefault((run["form"], run["initializer_range"]), []).append(run["validation_loss"])
    return losses


def describe(name: str, result: dict) -> dict:
    """A result with the mean share of problems that each row's seeds solve."""
    rows = {
        row: content | {"solved": statistics.mean(run["share_solved"] or 0 for run in content["runs"])}
        for row, content in result["rows"].items()
    }
    pictures = [path.name for path in sorted(RESULTS.glob(f"{Path(name).stem}*.png"))]
    return result | {"file": name, "scale_name": scale_of(name), "pictures": pictures, "rows": rows}


if __name__ == "__main__":
    main()

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Every claim and what became of it, from the committed results of train/studies/reproduce.py:

python train/studies/verdicts.py     # writes README.md and differences.png in model_cards/studies
"""

import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import yaml

from modeling_coe import CoEConfig
from modeling_coe.budget import count_expert_combinations, equal_compute_moe
from modeling_coe.train.report import save_picture
from modeling_coe.train.studies.reproduce import T_95, Claim, judge
from modeling_coe.train.studies.tasks import stored_bits


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "studies"
TABLES = ROOT / "configuration" / "studies"
LARGEST_ERROR = 0.01  # nats


def main():
    (RESULTS / "README.md").write_text(render(), encoding="utf-8")
    plot_differences(judged(read_results("losses")), RESULTS / "differences.png")


def render() -> str:
    """The page, from the JSON files in model_cards/studies and its template there."""
    losses, memory = read_results("losses"), read_results("memory")
    tables = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TABLES.glob("*.yaml"))}
    chain = CoEConfig(num_iterations=2, num_experts_per_tok=4, num_local_experts=64)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"mean_by_iteration": mean_by_iteration, "code": "`{}`".format, "signed": signed}
    template = environment.from_string((RESULTS / "template.md").read_text(encoding="utf-8"))
    claims = judged(losses)
    instruments = [judge_scale(name, result) for name, result in losses.items() if name.startswith("instrument_")]
    passed = [instrument["scale"] for instrument in instruments if instrument["counts"]]
    return template.render(
        claims=claims,
        memory_claims=judged(memory),
        combinations=count_expert_combinations(chain) / count_expert_combinations(equal_compute_moe(chain)),
        tables=[describe(name, result) for name, result in losses.items()],
        memory_tables=[{"file": name, "scale_name": scale_of(name), **result} for name, result in memory.items()],
        largest_error=LARGEST_ERROR,
        instruments=instruments,
        passed=passed,
        search=read_results("search")["search.json"],
        routings=read_results("routing"),
        others=read_results("others"),
        difference=lambda file, row, than: difference_of(losses[f"{file}.json"], row, than),
        across=lambda file, row, other, than: difference_across(
            losses[f"{file}.json"], row, losses[f"{other}.json"], than
        ),
        error_at_capo=judge_scale("storage_capo.json", losses["storage_capo.json"])["standard_error"],
        half_widths=half_widths([claim for claim in claims if claim["scale"] in passed]),
        missing={
            table: content["question"]
            for table, content in tables.items()
            if not any(name.startswith(f"{table}_") for name in losses)
        },
    )


def read_results(kind: str) -> dict[str, dict]:
    """The results of a kind by file name: `losses` and `memory` of tables, `routing`, `search` or `others`."""
    results = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {name: result for name, result in results.items() if kind_of(name, result) == kind}


def kind_of(name: str, result: dict) -> str:
    if "claims" in result:
        return "memory" if name.endswith("_memory.json") else "losses"
    first = re.split(r"[_.]", name)[0]
    return first if first in ("routing", "search") else "others"


def judged(results: dict[str, dict]) -> list[dict]:
    """The claims of all results, each with the scale at which it was judged, its verdict in words, and a number."""
    claims = [
        claim
        | {
            "file": name,
            "scale": scale_of(name),
            "words": words_of(claim, result["rows"]),
            "seeds": seeds_of(claim, result["rows"]),
            "unit": " of the problems" if result.get("measure") == "unsolved" else "",
        }
        for name, result in results.items()
        for claim in result["claims"]
    ]
    return [claim | {"number": number} for number, claim in enumerate(claims, 1)]


def signed(value: float) -> str:
    """Three decimals, or four where three would not tell on which side of zero it lies."""
    return f"{value:+.3f}" if abs(value) >= 0.0005 else f"{value:+.4f}"


def difference_of(result: dict, row: str, than: str) -> str:
    """How much higher `row` ends than `than`, with its 95 % interval, by the claim of a result about the two."""
    for claim in result["claims"]:
        low, high = claim["interval"]
        if (claim["row"], claim["than"]) == (row, than):
            return f"{signed(claim['difference'])} ({signed(low)} to {signed(high)})"
        if (claim["row"], claim["than"]) == (than, row):
            return f"{signed(-claim['difference'])} ({signed(-high)} to {signed(-low)})"
    raise KeyError(f"No claim compares {row!r} with {than!r}.")


def difference_across(first: dict, row: str, second: dict, than: str) -> str:
    """As `difference_of`, of two results at the same scale, over the seeds that both have."""
    rows = {"row": first["rows"][row]["runs"], "than": second["rows"][than]["runs"]}
    shared = {run["seed"] for run in rows["row"]} & {run["seed"] for run in rows["than"]}
    rows = {
        name: {"runs": sorted((run for run in runs if run["seed"] in shared), key=lambda run: run["seed"])}
        for name, runs in rows.items()
    }
    return difference_of({"claims": [judge(Claim("", "row", "than"), rows)]}, "row", "than")


def words_of(claim: dict, rows: dict) -> str:
    undecided = claim["verdict"] == "undecided"
    return f"not decided by {seeds_of(claim, rows)} seeds" if undecided else claim["verdict"]


def seeds_of(claim: dict, rows: dict) -> int:
    row = claim["row"] if isinstance(claim["row"], str) else claim["row"][0]
    return len(rows[row].get("runs", ()))


def half_widths(claims: list[dict]) -> dict[int, float]:
    """The largest half of an interval by the number of seeds, rounded up."""
    halves = defaultdict(list)
    for claim in claims:
        halves[claim["seeds"]].append((claim["interval"][1] - claim["interval"][0]) / 2)
    return {seeds: math.ceil(100 * max(values)) / 100 for seeds, values in sorted(halves.items())}


def judge_scale(name: str, result: dict) -> dict:
    """Whether a scale can tell experts, active experts and layers apart, by the rule in its table instrument.yaml: all
    claims supported, and no standard error above `LARGEST_ERROR`."""
    seeds = len(result["scale"]["seeds"])
    errors = [(claim["interval"][1] - claim["interval"][0]) / 2 / T_95[seeds] for claim in result["claims"]]
    is_decided = all(claim["verdict"] == "supported" for claim in result["claims"])
    is_exact = max(errors) <= LARGEST_ERROR
    return {
        "scale": scale_of(name),
        "claims": [claim | {"words": words_of(claim, result["rows"])} for claim in result["claims"]],
        "standard_error": max(errors),
        "counts": is_decided and is_exact,
        "words": "failed" if not is_decided else "passed" if is_exact else f"not yet: {seeds} seeds are too few",
    }


def plot_differences(claims: list[dict], path: Path):
    """The difference that decided each claim, with its 95 % interval; left of zero the first of the two is better."""
    colors = {"supported": "#1b7837", "contradicted": "#b2182b", "undecided": "0.55"}
    figure, axis = plt.subplots(figsize=(7, 0.13 * len(claims) + 1), layout="constrained")
    axis.axvline(0, color="0.3", linewidth=0.8)
    for height, claim in enumerate(claims):
        low, high = claim["interval"]
        difference, color = claim["difference"], colors[claim["verdict"]]
        spread = [[difference - low], [high - difference]]
        axis.errorbar(difference, height, xerr=spread, fmt="o", markersize=4, color=color)
    axis.set_yticks(range(len(claims)), [claim["number"] for claim in claims], fontsize=6)
    axis.set(
        ylim=(len(claims) - 0.5, -0.5),
        ylabel="claim",
        xlabel="difference (nats, or share of problems)",
    )
    # One interval of seeds that disagree would leave no room for the others.
    axis.set_xlim(max(-0.4, axis.get_xlim()[0]), min(0.4, axis.get_xlim()[1]))
    axis.grid(axis="x", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], color=color, marker="o") for color in colors.values()]
    figure.legend(
        handles,
        ("supported", "contradicted", "not decided"),
        loc="outside upper center",
        ncols=len(colors),
        frameon=False,
    )
    save_picture(figure, path)


def mean_of(runs: list[dict], fact: str) -> float | list[float]:
    """The mean over the seeds of a number or of every number in a list."""
    values = [run[fact] for run in runs]
    if isinstance(values[0], list):
        return [statistics.mean(column) for column in zip(*values, strict=True)]
    return statistics.mean(values)


def health_of(runs: list[dict], fact: str) -> list[float]:
    """The mean over the seeds of a number of `routing_health`, by iteration."""
    names = [name for name in runs[0]["routing_health"] if name.startswith(fact)]
    return [statistics.mean(run["routing_health"][name] for run in runs) for name in sorted(names)]


def balance_facts(health: dict) -> tuple[str, str]:
    """How uneven the load is and how many experts are dead: in a pool, over all the layers that visit it."""
    return ("pool_imbalance", "dead_pool") if "dead_pool_experts" in health else ("load_imbalance", "dead_experts")


def scale_of(name: str) -> str:
    """`memory_cpu_memory.json` -> `cpu`."""
    return name.removesuffix(".json").removesuffix("_memory").rpartition("_")[2]


def mean_by_iteration(values: list[list[float]]) -> str:
    """`[L][C]` -> the means over the layers."""
    return ", ".join(f"{statistics.mean(layers):.3f}" for layers in zip(*values, strict=True))


def describe(name: str, result: dict) -> dict:
    """A result with the mean share of problems that each row's seeds solve, None where they were asked none."""
    rows = {}
    for row, content in result["rows"].items():
        shares = [run["share_solved"] for run in content["runs"] if run.get("share_solved") is not None]
        rows[row] = content | {"solved": statistics.mean(shares) if shares else None}
    dial = [
        (row, mean_of(content["runs"], "experts_per_token"), mean_of(content["runs"], "experts_by_loss"))
        for row, content in rows.items()
        if "experts_per_token" in content["runs"][0]
    ]
    balance = [
        (row, *(health_of(content["runs"], fact) for fact in balance_facts(content["runs"][0]["routing_health"])))
        for row, content in rows.items()
        if "routing_health" in content["runs"][0]
    ]
    stored = [
        (row, stored_bits(content["mean_validation_loss"]) / content["parameters"])
        for row, content in rows.items()
        if scale_of(name) == "capo"
    ]
    picture = Path(name).with_suffix(".png")
    picture = picture if (RESULTS / picture).is_file() else None
    return result | {
        "file": name,
        "scale_name": scale_of(name),
        "picture": picture,
        "rows": rows,
        "dial": dial,
        "balance": balance,
        "stored": stored,
    }


if __name__ == "__main__":
    main()

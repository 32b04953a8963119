# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the README says is true: its snippets run, its commands and files exist, its tree is the tree."""

import json
import math
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import SMALL, build, whitespace_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_coe.train.studies import verdicts


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_IN_THE_TREE = {".gitignore", ".pre-commit-config.yaml", ".ci/run", "README.md", "modeling_coe/py.typed"}


def fenced(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return set(listed.stdout.split())


def test_python_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(max_position_embeddings=512).save_pretrained("runs/smoke")
    whitespace_tokenizer().save_pretrained("runs/smoke")
    torch.manual_seed(0)
    shared = {key: value for key, value in SMALL.items() if key != "num_iterations"}
    MixtralForCausalLM(MixtralConfig(**shared)).save_pretrained("path/to/mixtral")
    snippets = fenced("python")
    assert len(snippets) >= 5
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)


def test_commands_name_existing_scripts_recipes_and_targets():
    commands = "\n".join(fenced("bash"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"make ([a-z-]+)", commands)) <= targets
    for path in re.findall(r"(?:train|configuration)/[\w./-]+\.(?:py|yaml|json)", commands):
        assert (ROOT / path).is_file(), path


def result(name):
    return json.loads((ROOT / "model_cards" / "studies" / f"{name}.json").read_text(encoding="utf-8"))


def benchmark_table():
    """The README's rows, from the committed benchmark."""
    suites = {name: suite["results"] for name, suite in result("benchmark_cpu").items()}
    rows = [
        ("speed of a training step", "train_step", "train step"),
        ("speed of the block, forward + backward", "block", "block, hidden 256"),
        ("speed of decoding, batch 1", "decode", "decode, batch 1,"),
        ("speed of decoding, batch 16", "decode", "decode, batch 16,"),
        ("bytes the block keeps for backward", "memory", "bytes a block keeps for backward, hidden 256"),
        ("peak of a training step beyond weights and optimizer", "memory", "peak of a train step"),
    ]
    lines = ["| | CoE-1(8/64) | CoE-2(4/64) | CoE-4(2/64) |", "|---|---|---|---|"]
    for label, suite, prefix in rows:
        (measured,) = (value for key, value in suites[suite].items() if key.startswith(prefix))
        ratios = [measured[chain]["ratio"] for chain in ("CoE-1(8/64)", "CoE-2(4/64)", "CoE-4(2/64)")]
        lines.append(f"| {label} | " + " | ".join(f"{ratio:.2f}x" for ratio in ratios) + " |")
    return "\n".join(lines)


def test_quoted_results_are_the_committed_ones():
    assert benchmark_table() in README
    assert f"{result('pretrain_smoke')['share_solved']:.1%} of the held-out problems solved" in README
    same, other = (run["share_solved"] for run in result("pretrain_smoke_repeated")["runs"])
    assert f"ended with {same:.1%}, seed 1 with {other:.1%}" in " ".join(README.split())
    assert result("pretrain_gsm8k")["share_solved"] == 0
    losses = {run["name"]: run["validation_loss"] for run in result("healing_gsm8k")["runs"] if run["seed"] == 0}
    assert abs(losses["chain"] - losses["source"]) < 0.01 < losses["chain"] - losses["source, more steps"]
    tuned, upcycled = (
        json.loads((ROOT / "model_cards" / name / "facts.json").read_text(encoding="utf-8"))
        for name in ("coe-gsm8k-finetuned", "coe-upcycled")
    )
    assert f"{tuned['run']['validation_loss_before']:.2f} -> {tuned['run']['validation_loss']:.2f}" in README
    assert tuned["run"]["share_solved"] == 0
    assert abs(upcycled["run"]["validation_loss"] - upcycled["control"]["validation_loss"]) < 0.01


def test_what_the_readme_says_of_the_paper_s_claims_is_what_was_measured():
    tables = [f"equal_compute_{scale}" for scale in ("cpu", "small", "tiny")]
    tables += ["seeds_tiny", "longer_tiny", "width_tiny", "beyond_tiny", "ablations_cpu", "ablations_tiny"]
    judged = {
        (table, claim["row"], claim["than"]): (claim["verdict"], round(claim["difference"], 2))
        for table in tables
        for claim in result(table)["claims"]
    }
    said = " ".join(README.split())
    nested, mixtral, chain, moe = "nested CoE-2(4/64)", "Mixtral MoE(8/64)", "paper's CoE-2(4/64)", "paper's MoE(8/64)"
    (verdict, lead), (other, seeds), (later, steps) = (
        judged[table, nested, mixtral] for table in ("equal_compute_small", "seeds_tiny", "longer_tiny")
    )
    assert (verdict, other, later) == ("confirmed", "refuted", "refuted")
    assert f"{-lead:.2f} nats below Mixtral's block at 7 M and {seeds:.2f} above at 2.9 M (ten seeds)" in said
    assert len(result("seeds_tiny")["scale"]["seeds"]) == 10
    assert f"three times the steps the chain ends {steps:.2f} above" in said
    widths = result("first_weights_small")
    best = [min(row["mean_validation_loss"] for name, row in widths["rows"].items() if name.startswith(form))
            for form in ("nested", "Mixtral")]  # fmt: skip
    assert "the chain and Mixtral's block end at {:.2f} and {:.2f}".format(*best) in said
    verdict, behind = widths["claims"][2]["verdict"], widths["claims"][2]["difference"]
    assert verdict == "refuted" and f"from wider ones the chain ends {behind:.2f} above" in said
    verdict, behind = judged["equal_compute_tiny", chain, moe]
    assert verdict == "refuted" and f"CoE-2(4/64) ends {behind:.2f} above its own baseline" in said
    assert judged["equal_compute_small", chain, moe] == ("undecided", -0.01)
    assert judged["equal_compute_cpu", chain, moe][0] == "undecided"
    verdict, behind = judged["width_tiny", "paper's CoE-2(8/64)", "paper's MoE(16/64)"]
    assert verdict == "refuted" and f"CoE-2(8/64) ends {behind:.2f} above MoE(16/64)" in said
    residual = [
        judged[f"ablations_{scale}", "paper's CoE-2(8/64)", "CoE-2(8/64) outer residual"] for scale in ("cpu", "tiny")
    ]
    assert [verdict for verdict, _ in residual] == ["confirmed"] * 2
    assert "ends {:.2f} and {:.2f} higher".format(*(-lead for _, lead in residual)) in said
    verdict, behind = judged["beyond_tiny", "nested CoE-2(4/64), shared expert", nested]
    assert verdict == "refuted" and f"shared expert in the chain costs {behind:.2f}" in said
    for balancing in ("no balancing", "ten times the balancing"):
        rows = result("beyond_tiny")["rows"]
        difference = rows[f"{nested}, {balancing}"]["mean_validation_loss"] - rows[nested]["mean_validation_loss"]
        assert abs(difference) < 0.01
    assert f"is {math.comb(64, 4) ** 2 / math.comb(64, 8):.0f}x by the paper's own formula" in said
    rows = result("equal_compute_tiny")["rows"].items()
    losses = [row["mean_validation_loss"] for name, row in rows if not name.startswith("paper")]
    assert ", ".join(f"{loss:.2f}" for loss in losses) in README
    frontier = {name: row["mean_validation_loss"] for name, row in result("frontier_tiny")["rows"].items()}
    assert frontier["MoE(8/16)"] < frontier["CoE-2(4/64)"]  # a quarter of the experts, one iteration


def test_what_the_readme_says_of_the_search_is_what_was_tried():
    said = " ".join(README.split())
    runs = [run for name in ("search_small", "search_tiny") for run in result(name)["runs"]]
    forms = {run["form"] for run in runs} - {"Mixtral", "nested", "one_choice+parallel"}
    assert f"tried {len(forms)} in {len(runs)} runs" in said
    assert forms < {form for name in ("search_small", "search_tiny") for form in result(name)["forms"]}
    compared = {name: verdicts.compare_forms(result(name)["runs"]) for name in ("search_small", "search_tiny")}
    assert all(statistics.mean(row["differences"]) > 0 for row in compared["search_tiny"]), "a form won"
    small, tiny = (
        {row["form"]: statistics.mean(row["differences"]) for row in rows if row["learning_rate"] == rate
         and (row["dataset"], row["steps"]) == ("gsm8k", 400)}
        for rows, rate in ((compared["search_small"], 0.002), (compared["search_tiny"], 0.004))
    )  # fmt: skip
    doubled = "one_choice+parallel+double"  # Mixtral's block with its router weights doubled
    assert f"goes the same way: {-small[doubled]:.2f} below and {tiny[doubled]:.2f} above" in said
    assert all(abs(form["nested"] - form[doubled]) < 0.02 for form in (small, tiny))
    assert small["parallel"] < small["nested"]  # two routers without a chain
    assert abs(small["mean"]) < 0.01  # the chain divided by two


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_file_tree_lists_every_file_and_no_other():
    (tree,) = (block for block in fenced("text") if "modeling_coe/" in block)
    folder, listed = "", set()
    for line in filter(None, tree.splitlines()):
        entry = line.strip().split("  ")[0]
        if line.startswith(" "):
            listed = listed - {folder} | {folder + entry}
        else:
            folder = entry
            listed.add(entry)
    files = tracked_files() - NOT_IN_THE_TREE
    for entry in listed:
        assert any(file == entry or file.startswith(entry.rstrip("/") + "/") for file in files), entry
    folders = tuple(entry for entry in listed if entry.endswith("/"))
    assert {file for file in files if not file.startswith(folders)} <= listed

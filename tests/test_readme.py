# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the README says is true: its snippets run, its commands and files exist, its tree is the tree."""

import json
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import SMALL, build, whitespace_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

import verdicts


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_IN_THE_TREE = {".gitignore", ".pre-commit-config.yaml", ".ci/run", "README.md"}


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
    return json.loads((ROOT / "model_cards" / "results" / f"{name}.json").read_text(encoding="utf-8"))


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
    mean = {name: row["mean_validation_loss"] for name, row in result("equal_compute_cpu")["rows"].items()}
    papers = (mean["paper's MoE(8/64)"], mean["paper's CoE-2(4/64)"])
    assert min(papers) - mean["Mixtral MoE(8/64)"] > 0.12
    assert round(mean["paper's CoE-2(4/64)"] - mean["nested CoE-2(4/64)"], 2) == 0.13
    assert abs(mean["nested CoE-2(4/64)"] - mean["Mixtral MoE(8/64)"]) < 0.03
    judged = {
        (table, claim["row"], claim["than"]): (claim["verdict"], claim["difference"])
        for table in ("equal_compute_cpu", "equal_compute_tiny", "ablations_cpu", "width_tiny")
        for claim in result(table)["claims"]
    }
    chain, moe = "paper's CoE-2(4/64)", "paper's MoE(8/64)"
    assert judged["equal_compute_cpu", chain, moe][0] == "undecided"
    assert judged["equal_compute_tiny", chain, moe] == ("refuted", pytest.approx(0.04, abs=0.005))
    wide = judged["width_tiny", "paper's CoE-2(8/64)", "paper's MoE(16/64)"]
    assert wide == ("refuted", pytest.approx(0.05, abs=0.005))
    over_sizes, *_ = result("frontier_tiny")["claims"]
    assert round(over_sizes["difference"], 2) == 0.06 and [round(end, 2) for end in over_sizes["interval"]] == [
        -0.02,
        0.14,
    ]
    rows = result("frontier_tiny")["rows"]
    pairs = [
        (run["validation_loss"], other["validation_loss"])
        for row, than in zip(over_sizes["row"], over_sizes["than"], strict=True)
        for run, other in zip(rows[row]["runs"], rows[than]["runs"], strict=True)
    ]
    assert len(pairs) == 12 and all(two > one for two, one in pairs)
    frontier = {name: row["mean_validation_loss"] for name, row in rows.items()}
    assert frontier["MoE(8/16)"] < frontier["CoE-2(4/64)"]  # a quarter of the experts, one iteration
    rows = result("equal_compute_tiny")["rows"]
    nested = [rows[name]["mean_validation_loss"] for name in rows if not name.startswith("paper")]
    assert ", ".join(f"{loss:.2f}" for loss in nested) in README
    for comparison, (verdict, _) in judged.items():
        if comparison[0].startswith("equal_compute") and "paper" not in comparison[2]:
            assert verdict != "confirmed", "a chain beat one wide choice"


def test_what_the_readme_says_of_the_search_is_what_was_tried():
    runs = result("search_tiny")["runs"]
    assert len(runs) > 70
    assert len({run["form"] for run in runs} - {"Mixtral", "nested", "one_choice+parallel"}) == 16
    assert all(run["form"] in result("search_tiny")["forms"] for run in runs)
    mean = {
        (row["form"], row["dataset"], row["steps"]): statistics.mean(row["differences"])
        for row in verdicts.compare_forms(runs)
        if row["form"] != "one_choice+parallel"  # Mixtral's block by another way
    }
    assert min(mean.values()) > 0, "a form ended below Mixtral's block"
    short = {
        form: difference for (form, dataset, steps), difference in mean.items() if (dataset, steps) == ("gsm8k", 400)
    }
    best = sorted(short, key=short.get)[:2]
    assert all(form.startswith("one_choice") and short[form] < 0.02 for form in best)


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

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the README shows is true: its snippets print what it says, its commands exist, its tables are the results."""

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest
from conftest import build
from peft import get_peft_model

from modeling_coe import CoEConfig, lora_config
from modeling_coe.budget import ServingSetup, weight_bytes
from modeling_coe.train.studies import readme, tasks
from modeling_coe.train.studies.reproduce import Claim, judge


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """`runs/chain` and `runs/adapter`, as the README's commands leave them."""
    monkeypatch.chdir(tmp_path)
    build().save_pretrained("runs/chain")
    chain = type(build()).from_pretrained("runs/chain")
    get_peft_model(chain, lora_config(chain, experts=True, router="full", r=2)).save_pretrained("runs/adapter")


def test_snippets_run_in_order_and_print_what_the_readme_says(adapter):
    namespace, printed = {}, []
    for snippet in fenced("python"):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(snippet, "README.md", "exec"), namespace)
        printed.append(output.getvalue())
    assert len(printed) >= 4
    assert printed[0] == fenced("text")[0]


def test_commands_name_existing_targets_entry_points_scripts_and_recipes():
    commands = "\n".join(fenced("bash"))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"make ([a-z-]+)", commands)) <= targets
    named = set(re.findall(r"\bcoe-[a-z-]+(?= )", commands)) | set(
        re.findall(r"^\| `(coe-[a-z-]+)`", README, re.MULTILINE)
    )
    assert named == set(PROJECT["scripts"])
    for path in re.findall(r"(?:train|configuration)/[\w./-]+\.(?:py|yaml|json)", commands):
        assert (ROOT / path).is_file(), path
    assert set(re.findall(r'pip install "\.\[(\w+)\]"', README)) <= set(PROJECT["optional-dependencies"])


def test_every_table_is_what_the_committed_results_render_to():
    assert {"speed", "use"} <= {name for _, name, _, _ in readme.MARKED.findall(README)} <= set(readme.TABLES)
    assert readme.render(README) == README, "run `python train/studies/readme.py`"


def test_few_bits_change_the_loss_as_the_readme_says():
    text = " ".join(README.split())
    assert "On source code, 4 bits raised the loss by 0.012 nats and 8 bits by less than 0.001" in text
    rows = readme.result("bits_narrow")["rows"]
    for name in ("MoE(4/16)", "One pool for four layers (4/36)"):
        in_4, in_8, exact = (
            rows[row]["mean_validation_loss"] for row in (f"{name} in 4 bits", f"{name} in 8 bits", name)
        )
        assert in_4 - exact == pytest.approx(0.012, abs=5e-4) and abs(in_8 - exact) < 0.001
    assert "on easy word problems neither raised it by 0.001" in text
    quality = [chain["results"].values() for chain in readme.result("low_bits")["quality"].values()]
    assert len(quality) == 3 and all(abs(row["change"]) < 0.001 for rows in quality for row in rows)


def test_what_the_readme_says_of_facts_dials_and_upcycling_is_what_was_measured():
    text = " ".join(README.split())
    assert "With 0.24 M parameters, one pool of experts that four layers share stores 1.2 times as many bits" in text
    rows = readme.result("storage_capo")["rows"]
    pool, layers = (rows[name] for name in ("One pool for four layers (4/64)", "MoE(4/16)"))
    bits = [tasks.stored_bits(row["mean_validation_loss"]) for row in (pool, layers)]
    assert bits[0] / bits[1] == pytest.approx(1.2, abs=0.05) and len(pool["runs"]) == 3
    assert pool["parameters"] == pytest.approx(0.24e6, abs=5e3)
    assert (
        "two visits to half of the experts end 0.05 nats a token below one visit to all of them (five seeds," in text
    )
    names = ("CoE-2(8/16), learned scale", "MoE(16/16), learned scale")
    decided, open_ = (
        readme.claim("higher_rate_narrow", *names),
        readme.claim("chain_narrow", "CoE-2(8/16)", "MoE(16/16)"),
    )
    assert (decided["verdict"], open_["verdict"]) == ("supported", "undecided")
    assert round(decided["difference"], 2) == round(open_["difference"], 2) == -0.05
    assert len(readme.result("higher_rate_narrow")["rows"][names[0]]["runs"]) == 5
    assert "one expert in place of two raised the loss by 0.06 nats; turned up to four, the model ended 0.23" in text
    dial = {name: row["mean_validation_loss"] for name, row in readme.result("dial_code")["rows"].items()}
    assert dial["dial at 1"] - dial["dial, as trained"] == pytest.approx(0.06, abs=5e-3)
    assert dial["dial at 4"] - dial["K=4 for every token"] == pytest.approx(0.23, abs=5e-3)
    assert "no better than its source after as many steps, and 0.11 nats worse at the same compute (one seed)" in text
    runs = readme.result("healing_gsm8k")["runs"]
    losses = {run["name"]: run["validation_loss"] for run in runs if run["seed"] == 0}
    assert losses["chain"] > losses["source"]
    assert losses["chain"] - losses["source, more steps"] == pytest.approx(0.11, abs=5e-3)


def test_16_experts_in_4_bits_take_less_memory_than_9_in_bf16_and_which_end_lower_is_not_decided():
    text = README.replace("\n", " ")
    assert "16 experts a layer in 4 bits take less memory than 9 in bf16; which of the two ends lower, eight" in text
    assert "eight seeds do not decide." in text
    rounded, halved = readme.result("bits_narrow"), readme.result("promise_narrow")
    rows = {"16": rounded["rows"]["MoE(4/16) in 4 bits"], "9": halved["rows"]["MoE(4/9), 56 %"]}
    configs = [
        CoEConfig(**result["config"] | row["config"])
        for result, row in zip((rounded, halved), rows.values(), strict=True)
    ]
    sizes = [
        sum(weight_bytes(c, ServingSetup(expert_bits=b)).values()) for c, b in zip(configs, (4, None), strict=True)
    ]
    assert sizes[0] < sizes[1] and len(rows["9"]["runs"]) == 8
    assert judge(Claim("", "16", "9", margin=0.0), rows)["verdict"] == "undecided"
    assert judge(Claim("", "16", "9", margin=0.0, as_good=True), rows)["verdict"] == "undecided"


def test_every_program_that_works_names_a_test_or_a_target_that_exists():
    for row in readme.result("compatibility"):
        name = row["shown_by"] or ""
        path, _, test = name.partition("::")
        if test:
            assert f"\ndef {test}(" in (ROOT / path).read_text(encoding="utf-8"), name
        elif name:
            assert f"\n{name.removeprefix('make ')}: " in MAKEFILE, name
        else:
            assert "not run" in row["runs"], row
    rendered = readme.compatibility().splitlines()
    assert len(rendered) == 2 + len(readme.result("compatibility"))
    (peft,) = re.findall(r"^peft==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"| PEFT | {peft} |" in readme.compatibility()


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target

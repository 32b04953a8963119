# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A table compares like with like, runs nothing twice, and its verdicts follow from its losses."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL, build, whitespace_tokenizer

from modeling_coe.modeling_coe import CoETopKRouter
from modeling_coe.train import pretrain
from modeling_coe.train.arguments import DataArguments, ModelArguments, PretrainArguments, parse
from modeling_coe.train.studies import forms, reproduce, verdicts
from modeling_coe.train.studies.reproduce import Claim, MemoryClaim, ReproduceArguments


ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "configuration" / "studies").glob("*.yaml"))
SCALES = sorted((ROOT / "configuration" / "studies" / "scales").glob("*.yaml"))
RESULTS = ROOT / "model_cards" / "studies"
TABLE = """
question: Does one beat two?
rows:
  one: {num_iterations: 1, num_experts_per_tok: 8}
  two: {num_iterations: 2, num_experts_per_tok: 4}
claims:
  - {claim: two ends lower, row: two, than: one, equal_compute: true}
"""


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def trained(monkeypatch):
    """In place of train/pretrain.py: the runs it was asked for; its loss grows with the rate's distance from 2e-3."""
    runs = []

    def run(command, stdout, **kwargs):
        options = dict(zip(command[2::2], command[3::2], strict=True))
        preset = json.loads(Path(options["--model"]).read_text())
        rate, seed = float(options["--learning_rate"]), int(options["--seed"])
        runs.append((preset["num_iterations"], rate, seed))
        if rate == 4e-3 and preset["num_iterations"] == 2:
            stdout.write("error: {'loss': nan} at step 7: training stops.\n(PYTHONDEVMODE=1 ...)\n")
            return SimpleNamespace(returncode=1)
        if seed == 9:
            stdout.write("Traceback ...\nOSError: no space left\n")
            return SimpleNamespace(returncode=1)
        loss = 4 + abs(rate - 2e-3) * 100 - 0.1 * (preset["num_iterations"] == 2) + 0.01 * seed
        facts = {"validation_loss": loss, "share_solved": 0.5, "tokens": 1, "train_seconds": 1.0,
                 "peak_memory_gib": 1.0, "commit": "abc"}  # fmt: skip
        folder = Path(options["--output_dir"])
        (folder / "facts.json").write_text(json.dumps(facts))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    return runs


def run_table(folder, text=TABLE, *options):
    (folder / "table.yaml").write_text(text)
    reproduce.main(["--table", str(folder / "table.yaml"), "--runs_dir", str(folder / "runs"),
                    "--results_dir", str(folder / "results"), "--dataset", "word_problems", *options])  # fmt: skip
    return json.loads((folder / "results" / "table_cpu.json").read_text())


def test_every_variant_runs_all_seeds_at_its_own_best_rate_and_nothing_runs_twice(tmp_path, trained):
    result = run_table(tmp_path)
    expected = {(chain, rate, 0) for chain in (1, 2) for rate in (1e-3, 2e-3, 4e-3)}
    expected |= {(chain, 2e-3, seed) for chain in (1, 2) for seed in (1, 2)}
    assert len(trained) == len(expected) and set(trained) == expected
    for row in result["rows"].values():
        assert row["learning_rate"] == 2e-3 and [run["seed"] for run in row["runs"]] == [0, 1, 2]
        assert all(run["validation_loss"] > 3 and run["commit"] == "abc" for run in row["runs"])
    assert result["rows"]["two"]["loss_by_learning_rate"]["0.004"] is None  # it diverged
    assert result["config"]["hidden_size"] > 0 and "num_iterations" not in result["config"]
    assert [row["config"]["num_iterations"] for row in result["rows"].values()] == [1, 2]
    (claim,) = result["claims"]
    assert claim["difference"] == pytest.approx(-0.1) and claim["verdict"] == "supported"
    assert not (tmp_path / "results" / "table_cpu.png").exists()
    again = run_table(tmp_path)
    assert len(trained) == len(expected) and again["rows"] == result["rows"]
    for picture in ("frontier", "memory"):
        run_table(tmp_path, f"{picture}: true" + TABLE)
        assert len(trained) == len(expected)
        drawn = tmp_path / "results" / "table_cpu.png"
        assert drawn.stat().st_size > 5_000
        drawn.unlink()


def test_a_run_that_a_result_records_is_not_repeated_without_its_folder(tmp_path, trained, monkeypatch):
    result = run_table(tmp_path)
    number = len(trained)
    (tmp_path / "runs").rename(tmp_path / "lost")
    assert run_table(tmp_path)["rows"] == result["rows"] and len(trained) == number
    # Runs on another corpus are others.
    monkeypatch.setattr(reproduce, "hash_of_corpus", lambda dataset: "abc")
    assert run_table(tmp_path)["corpus"] == "abc" and len(trained) == 2 * number


def test_a_table_s_own_seeds_and_rates_take_the_place_of_the_scale_s(tmp_path, trained):
    result = run_table(tmp_path, "scale: {seeds: [3, 0], learning_rates: [1.0e-3, 3.0e-3]}" + TABLE)
    assert [run["seed"] for run in result["rows"]["two"]["runs"]] == result["scale"]["seeds"] == [3, 0]
    assert {rate for _, rate, _ in trained} == {1e-3, 3e-3} and sum(seed == 3 for _, _, seed in trained) == 4


def test_a_longer_row_trains_and_decays_longer_and_costs_so_much_more(tmp_path):
    scale = reproduce.load_scale(ReproduceArguments(table="", scale="tiny"))
    row = {"num_iterations": 1, "num_experts_per_tok": 8}
    once, thrice = (reproduce.build_variant(row | {"length": length}, scale) for length in (1, 3))
    assert thrice.flops == 3 * once.flops and thrice.preset == once.preset
    assert (once.recipe["max_steps"], thrice.recipe["max_steps"]) == (400, 1200)
    decay = {"num_decay_steps": 360, "decay_type": "linear"}
    assert thrice.recipe == once.recipe | {"max_steps": 1200, "eval_steps": 1200, "lr_scheduler_kwargs": decay}


def test_a_row_s_fields_go_before_the_scale_s_and_those_before_the_preset_s():
    scale = reproduce.load_scale(ReproduceArguments(table="", scale="small"))
    preset = json.loads(Path(scale.recipe["model"]).read_text())
    assert reproduce.build_variant({}, scale).preset == preset | {"initializer_range": 0.057}
    assert reproduce.build_variant({"initializer_range": 0.04}, scale).config.initializer_range == 0.04
    with pytest.raises(ValueError, match=r"initializer_rang.*no fields"):
        reproduce.build_variant({}, reproduce.replace(scale, fields={"initializer_rang": 0.04}))


def test_variants_start_with_the_same_weights_where_they_have_the_same_modules():
    def initialise(seed, **fields):
        torch.manual_seed(1)
        model = build(**fields)
        pretrain.draw_by_name(model, seed)
        return model.state_dict()

    chain, mixtral = initialise(0), initialise(0, num_iterations=1, num_experts_per_tok=4)
    other, inner = initialise(1), initialise(0, residual="inner", num_shared_experts=1)
    assert chain.keys() == mixtral.keys() and len(chain) > 10
    for name, weight in chain.items():
        first = weight[:1] if name.endswith("gate.weight") else weight
        assert torch.equal(first, mixtral[name]) and torch.equal(weight, inner[name])
        if "norm" not in name:
            assert not torch.equal(weight, other[name])
            assert weight.std().item() == pytest.approx(SMALL["initializer_range"], rel=0.1)


def test_a_checkpoint_is_not_drawn_anew(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"draw_by_name.*has weights"):
        pretrain.build_model(ModelArguments(model=str(tmp_path)), None, 8, None, None, draw_seed=0)


def test_a_form_is_trained_by_its_own_script(tmp_path, trained, monkeypatch):
    commands, run = [], reproduce.subprocess.run

    def remember(command, **kwargs):
        commands.append(command[1:3])
        return run([command[0], "forms.py", *command[3:]] if "forms.py" in command[1] else command, **kwargs)

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=remember, STDOUT=None))
    run_table(tmp_path, TABLE.replace("num_experts_per_tok: 8}", "num_experts_per_tok: 8, form: normalised_router}"))
    scripts = [Path(script).name for script, _ in commands]
    assert scripts.count("forms.py") == scripts.count("pretrain.py") == 5
    assert {form for script, form in commands if script.endswith("forms.py")} == {"normalised_router"}


def test_the_normalised_router_sees_directions_alone(monkeypatch):
    monkeypatch.setattr(CoETopKRouter, "__init__", CoETopKRouter.__init__)
    monkeypatch.setattr(CoETopKRouter, "logits", CoETopKRouter.logits)
    plain = build()
    forms.FORMS["normalised_router"]()
    gate = build().model.layers[0].mlp.gate
    states = torch.randn(9, SMALL["hidden_size"], generator=torch.Generator().manual_seed(0))
    expected = 5 * F.cosine_similarity(states[:, None], gate.weight[1][None], dim=-1)
    with torch.no_grad():
        gate.logit_scale.fill_(5)
    torch.testing.assert_close(gate.logits(states, 1), expected)
    torch.testing.assert_close(gate.logits(3 * states, 1), expected)
    assert "logit_scale" not in dict(plain.model.layers[0].mlp.gate.named_parameters())


def test_a_run_that_fails_names_its_log_and_leaves_the_others(tmp_path, trained, monkeypatch):
    scale = reproduce.load_scale(ReproduceArguments(table="", dataset="word_problems"))
    monkeypatch.setattr(reproduce, "load_scale", lambda options: reproduce.replace(scale, seeds=[0, 9]))
    with pytest.raises(RuntimeError, match=r"no space left.*\.log"):
        run_table(tmp_path)
    assert len(list((tmp_path / "runs").rglob("facts.json"))) == 5


@pytest.mark.slow
def test_a_table_really_trains(tmp_path, monkeypatch):
    scale = reproduce.load_scale(ReproduceArguments(table="", dataset="word_problems"))
    sizes = {"max_steps": 4, "warmup_steps": 1, "logging_steps": 2, "eval_steps": 4, "train_problems": 200,
             "validation_problems": 20, "scored_problems": 2}  # fmt: skip
    small = reproduce.Scale(scale.recipe | sizes, learning_rates=[1e-3], seeds=[0, 1])
    monkeypatch.setattr(reproduce, "load_scale", lambda options: small)
    result = run_table(tmp_path, TABLE, "--jobs", "2")
    losses = [run["validation_loss"] for row in result["rows"].values() for run in row["runs"]]
    assert len(set(losses)) == 4 and all(5 < loss < 9 for loss in losses)


DIAL = """
question: What does a budget cost?
rows:
  K=2: {num_iterations: 2, num_experts_per_tok: 2, num_local_experts: 8}
  dial, as trained: &dial
    {num_iterations: 2, num_experts_per_tok: 4, num_local_experts: 8, num_null_experts: 4, router_bias: true,
     expert_budget: 2, recipe: {router_bias_rate: 0.01}}
  dial at 1: {<<: *dial, budget: 1}
  dial at 4: {<<: *dial, budget: 4}
  K=2 in 8 bits: {num_iterations: 2, num_experts_per_tok: 2, num_local_experts: 8, bits: 8}
claims:
  - {claim: one is as good as four, row: dial at 1, than: dial at 4, as_good: true}
"""


@pytest.mark.slow
def test_budgets_and_bits_score_the_run_of_their_row_and_train_none_of_their_own(tmp_path, monkeypatch):
    scale = reproduce.load_scale(ReproduceArguments(table="", dataset="word_problems"))
    sizes = {"max_steps": 3, "warmup_steps": 1, "logging_steps": 3, "eval_steps": 3, "train_problems": 60,
             "validation_problems": 12, "scored_problems": 0, "sequence_length": 160,
             "model": "configuration/models/coe_demo.json"}  # fmt: skip
    small = reproduce.Scale(scale.recipe | sizes, learning_rates=[3e-3], seeds=[0, 1])
    monkeypatch.setattr(reproduce, "load_scale", lambda options: small)
    rows = run_table(tmp_path, DIAL, "--jobs", "2")["rows"]
    assert len(list((tmp_path / "runs" / "cpu").glob("*/facts.json"))) == 4  # two rows, two seeds
    for run, trained in zip(rows["dial at 4"]["runs"], rows["dial, as trained"]["runs"], strict=True):
        assert run["experts_per_token"] == 4 and run["experts_by_loss"] == [4, 4, 4, 4]
        assert run["validation_loss"] != trained["validation_loss"]
    for run, trained in zip(rows["K=2 in 8 bits"]["runs"], rows["K=2"]["runs"], strict=True):
        assert run["validation_loss"] == pytest.approx(trained["validation_loss"], abs=2e-3)
        stored = json.loads((next((tmp_path / "runs" / "cpu").glob("*/bits_8.json"))).read_text())
        assert stored.keys() == {"validation_loss"}
    for run in rows["dial at 1"]["runs"]:
        assert run["experts_per_token"] == pytest.approx(1, abs=0.3)
    assert (
        rows["dial at 1"]["flops_ratio"] == rows["dial, as trained"]["flops_ratio"] == rows["dial at 4"]["flops_ratio"]
    )
    # Every row is about the folder's model, and a record of another machine has none.
    assert not (tmp_path / "results" / "runs").exists()
    assert all("share_solved" not in run for run in rows["dial at 1"]["runs"])
    assert (tmp_path / "results" / "table_cpu.png").stat().st_size > 1000


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_can_be_built_and_compares_equal_compute_where_it_says_so(path):
    """At the scales that it names and at those at which it ran."""
    text, table = path.read_text(), reproduce.load_table(path)
    scales = set(re.findall(rf"--table configuration/studies/{path.name} --scale (\w+)", text))
    scales |= {
        file.stem.split("_")[-1] for file in RESULTS.glob(f"{path.stem}_*.json") if "memory.json" not in file.name
    }
    assert scales and "Expected:" in text
    for scale in scales:
        sizes = reproduce.load_scale(ReproduceArguments(table=str(path), scale=scale))
        reproduce.check_compute(table, {name: reproduce.build_variant(row, sizes) for name, row in table.rows.items()})


@pytest.mark.parametrize("path", SCALES, ids=lambda path: path.stem)
def test_a_scale_s_recipe_is_one_of_the_pretraining_script(path, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    content = yaml.safe_load(path.read_text())["recipe"] | {"output_dir": str(tmp_path)}
    if "tokenizer" in content:  # which train/studies/corpus.py makes
        whitespace_tokenizer().save_pretrained(tmp_path / "tokenizer")
        content["tokenizer"] = str(tmp_path / "tokenizer")
    recipe.write_text(yaml.safe_dump(content))
    parse(ModelArguments, DataArguments, PretrainArguments, arguments=["--config", str(recipe), "--bf16", "false"])


def test_unequal_compute_is_refused_where_a_claim_says_equal(tmp_path, trained):
    with pytest.raises(ValueError, match=r"'two' costs 1\.\d\d times the FLOPs of 'one'"):
        run_table(tmp_path, TABLE.replace("num_experts_per_tok: 4", "num_experts_per_tok: 8"))
    assert not trained


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("num_iterations: 2", "num_iteration: 2", "num_iteration"),
        ("than: one", "than: three", "'three'"),
        ("num_experts_per_tok: 4", "num_experts_per_tok: 99", "num_experts_per_tok=99"),
    ],
)
def test_a_mistake_in_a_table_is_named(tmp_path, trained, old, new, message):
    with pytest.raises(ValueError, match=message):
        run_table(tmp_path, TABLE.replace(old, new))


def verdict(differences, **options):
    rows = {
        "a": {"runs": [{"validation_loss": 4 + difference} for difference in differences]},
        "b": {"runs": [{"validation_loss": 4.0} for _ in differences]},
    }
    return reproduce.judge(Claim("a ends lower", "a", "b", **options), rows)["verdict"]


@pytest.mark.parametrize(
    "differences, lower, as_good",
    [
        ([-0.10, -0.11, -0.09], "supported", "supported"),
        ([-0.10, +0.10, -0.05], "undecided", "undecided"),
        ([-0.001, -0.002, 0.0], "contradicted", "supported"),  # level: no gain worth the name, and no loss
        ([+0.10, +0.11, +0.09], "contradicted", "contradicted"),
    ],
)
def test_a_verdict_needs_the_interval_and_the_margin(differences, lower, as_good):
    assert verdict(differences) == lower
    assert verdict(differences, as_good=True) == as_good


def test_the_share_unsolved_can_decide_the_rate_and_the_claims_in_place_of_the_loss(tmp_path, trained, monkeypatch):
    def run(command, **kwargs):
        """Where the loss is lowest, fewest problems are solved."""
        done = trained_run(command, **kwargs)
        options = dict(zip(command[2::2], command[3::2], strict=True))
        facts = Path(options["--output_dir"]) / "facts.json"
        if facts.exists():
            written = json.loads(facts.read_text())
            facts.write_text(json.dumps(written | {"share_solved": round(written["validation_loss"] - 3.8, 4)}))
        return done

    trained_run = reproduce.subprocess.run
    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    scale = reproduce.load_scale(ReproduceArguments(table="", dataset="word_problems"))
    scored = reproduce.replace(scale, learning_rates=[1e-3, 2e-3], recipe=scale.recipe | {"scored_problems": 9})
    monkeypatch.setattr(reproduce, "load_scale", lambda options: scored)
    result = run_table(tmp_path, "measure: unsolved" + TABLE)
    assert result["measure"] == "unsolved"
    assert {row["learning_rate"] for row in result["rows"].values()} == {1e-3}
    (claim,) = result["claims"]
    assert claim["difference"] == pytest.approx(+0.1) and claim["verdict"] == "contradicted"
    monkeypatch.setattr(reproduce, "load_scale", lambda options: reproduce.replace(
        scale, recipe=scale.recipe | {"scored_problems": 0}))  # fmt: skip
    with pytest.raises(ValueError, match=r"`measure: unsolved` needs .*`scored_problems`.*'cpu'"):
        run_table(tmp_path, "measure: unsolved" + TABLE)
    with pytest.raises(ValueError, match=r"`measure=solved` is unknown"):
        run_table(tmp_path, "measure: solved" + TABLE)


def test_where_nothing_is_solved_nothing_is_decided():
    """Two rows at the floor are equal to the last bit."""
    rows = {name: {"runs": [{"share_solved": 0.0} for _ in range(3)]} for name in "ab"}
    assert reproduce.judge(Claim("", "a", "b", as_good=True), rows, "unsolved")["verdict"] == "undecided"
    rows["a"]["runs"] = rows["b"]["runs"] = [{"share_solved": 0.9}] * 3
    assert reproduce.judge(Claim("", "a", "b", as_good=True), rows, "unsolved")["verdict"] == "supported"


def test_of_rates_that_solve_as_many_the_one_with_the_lower_loss_is_taken():
    runs = [
        {"validation_loss": loss, "share_solved": solved, "diverged": diverged}
        for loss, solved, diverged in ((3.0, 0.5, False), (2.0, 0.5, False), (1.0, 0.4, False), (None, None, True))
    ]
    assert min(runs, key=lambda run: reproduce.rank(run, "unsolved")) is runs[1]
    assert min(runs, key=lambda run: reproduce.rank(run, "validation_loss")) is runs[2]


def test_the_interval_is_student_s():
    rows = {name: {"runs": [{"validation_loss": loss} for loss in losses]}
            for name, losses in (("a", [1.0, 2.0, 3.0]), ("b", [0.0, 0.0, 0.0]))}  # fmt: skip
    # mean 2, standard error 1 / sqrt(3), t(2 degrees of freedom) = 4.303
    assert reproduce.judge(Claim("", "a", "b"), rows)["interval"] == [-0.4843, 4.4843]


def test_measured_memory_is_what_budget_predicts_and_more_layers_cost_more():
    table = reproduce.load_table(ROOT / "configuration" / "studies" / "memory.yaml")
    scale = reproduce.load_scale(ReproduceArguments(table=""))
    names = ["paper's CoE-2(8/64)", "paper's MoE(8/64), 2x layers"]
    rows = {name: reproduce.measure_memory(reproduce.build_variant(table.rows[name], scale)) for name in names}
    for row in rows.values():
        assert row["peak_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.05)
    claim = MemoryClaim("less", *names, published=0.42)
    measured = reproduce.judge_memory(claim, rows)
    assert measured["verdict"] == "supported" and measured["basis_of_peak"] == "measured"
    assert reproduce.judge_memory(reproduce.replace(claim, published=0.6), rows)["verdict"] == "contradicted"
    # The parameters save more than the peak, half of which is activations at this size.
    by_parameters = reproduce.replace(claim, published=0.48, of="parameters")
    assert reproduce.judge_memory(by_parameters, rows)["verdict"] == "supported"


def test_what_is_too_large_is_predicted_and_called_so():
    rows = {"a": {"peak_bytes": None, "predicted_bytes": 5, "parameters": 5},
            "b": {"peak_bytes": 9, "predicted_bytes": 10, "parameters": 10}}  # fmt: skip
    claim = reproduce.judge_memory(MemoryClaim("less", "a", "b", published=0.5), rows)
    assert claim["basis_of_peak"] == "predicted" and claim["saving"] == {"peak": 0.5, "parameters": 0.5}


def test_in_a_claim_about_several_pairs_a_seed_counts_once():
    losses = {"a": [1.0, 1.2], "b": [1.1, 1.2], "c": [2.0, 2.1], "d": [2.3, 2.2]}
    rows = {name: {"runs": [{"validation_loss": loss} for loss in seeds]} for name, seeds in losses.items()}
    claim = Claim("", ["a", "c"], ["b", "d"])
    assert claim.pairs == [("a", "b"), ("c", "d")]
    judged = reproduce.judge(claim, rows)
    # differences -0.1 and -0.3 of the first seed, 0 and -0.1 of the second: means -0.2 and -0.05, standard error
    # 0.075, t(1 degree of freedom) = 12.706
    assert judged["difference"] == -0.125 and judged["interval"] == pytest.approx([-1.078, 0.828], abs=1e-3)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_committed_verdicts_follow_from_the_committed_runs(path):
    """And the runs are those of the table as it stands."""
    table = reproduce.load_table(path)
    for file in RESULTS.glob(f"{path.stem}_*.json"):
        result = json.loads(file.read_text())
        size = file.stem.removesuffix("_memory").rpartition("_")[2]
        scale = reproduce.load_scale(ReproduceArguments(table="", scale=size))
        assert {name: result["config"] | row["config"] for name, row in result["rows"].items()} == {
            name: reproduce.build_variant(row, scale).preset for name, row in table.rows.items()
        }
        judge, claims = (
            (reproduce.judge_memory, table.memory_claims)
            if file.stem.endswith("memory")
            else (reproduce.judge, table.claims)
        )
        measure = {} if judge is reproduce.judge_memory else {"measure": table.measure}
        assert result["claims"] == [judge(claim, result["rows"], **measure) for claim in claims]


def test_the_page_of_verdicts_is_what_the_results_render_to():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == verdicts.render()


@pytest.mark.parametrize(
    "gain, spread, words",
    [(0.2, 0.0, "passed"), (0.04, 0.0, "failed"), (0.2, 0.03, "not yet: 3 seeds are too few")],
)
def test_the_page_lists_the_claims_of_a_scale_that_passed_by_themselves(gain, spread, words, tmp_path, monkeypatch):
    passes = words == "passed"
    shutil.copytree(RESULTS, tmp_path / "studies")
    table = reproduce.load_table(ROOT / "configuration" / "studies" / "instrument.yaml")
    losses = dict(zip(table.rows, (4.0, 4 + gain, 3.9, 3.7), strict=True))
    rows = {
        name: {
            "config": {}, "parameters": 9, "flops_ratio": 1.0, "learning_rate": 1e-3, "mean_validation_loss": loss,
            "standard_deviation": 0.01,
            "runs": [
                {"validation_loss": loss + shift * spread * (name == "MoE(4/4)"), "share_solved": None}
                for shift in (1, 0, -1)
            ],
        }
        for name, loss in losses.items()
    }  # fmt: skip
    result = {"question": table.question, "command": "...", "scale": {"seeds": [0, 1, 2]}, "rows": rows}
    result["claims"] = [reproduce.judge(claim, rows) for claim in table.claims]
    (tmp_path / "studies" / "instrument_other.json").write_text(json.dumps(result))
    monkeypatch.setattr(verdicts, "RESULTS", tmp_path / "studies")
    page = verdicts.render()
    assert ("`other`" in re.search(r"\*\*(.*) passed the test of that\*\*", page)[1]) is passes
    section = page.partition("## Claims at a scale where experts count")[2].partition("\n## ")[0]
    assert ("| `other` |" in section) is passes
    lines = [line for line in page.splitlines() if f"| `other` | {-gain:+.3f} |" in line]
    assert len(lines) == 1 and "Four times the experts at equal compute" in lines[0] and "margin 0.05" in lines[0]
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `other` | {-gain:+.3f}, "))
    assert row.endswith(f"| **{words}** |")


def test_narrow_passes_without_the_seed_that_it_was_chosen_by_too():
    rows = verdicts.read_results("losses")["instrument_narrow.json"]["rows"]
    rows = {name: row | {"runs": row["runs"][1:]} for name, row in rows.items()}
    table = reproduce.load_table(ROOT / "configuration" / "studies" / "instrument.yaml")
    assert {reproduce.judge(claim, rows)["verdict"] for claim in table.claims} == {"supported"}


def test_a_difference_is_told_from_either_side():
    claim = {"row": "a", "than": "b", "difference": -0.02, "interval": [-0.05, 0.01]}
    assert verdicts.difference_of({"claims": [claim]}, "a", "b") == "-0.020 (-0.050 to +0.010)"
    assert verdicts.difference_of({"claims": [claim]}, "b", "a") == "+0.020 (-0.010 to +0.050)"
    with pytest.raises(KeyError, match="No claim compares 'a' with 'c'"):
        verdicts.difference_of({"claims": [claim]}, "a", "c")


def test_the_numbers_of_combinations_in_the_press_follow_from_no_power_of_the_binomials():
    """2.2e42 and 3.8e104 are said of one layer; the 823 of the paper is 91.2 by its formula."""
    assert round(math.comb(64, 4) ** 2 / math.comb(64, 8), 1) == 91.2 and "91.2 times" in verdicts.render()
    for choices in (math.comb(64, 4), math.comb(64, 8)):
        for power in range(1, 40):
            assert min(abs(math.log10(choices**power) - math.log10(claimed)) for claimed in (2.2e42, 3.8e104)) > 0.05


def test_the_page_says_of_the_iterations_what_was_recorded():
    def recorded(name):
        return json.loads((RESULTS / f"routing_{name}.json").read_text())

    fast, best = recorded("nested_c4_rate_4e-3"), recorded("nested_c4")
    assert f"{max(map(max, fast['change_of_state'])):.0f} times its input" in verdicts.render()
    assert fast["trained"]["learning_rate"] == 2 * best["trained"]["learning_rate"]
    assert all(max(map(max, recorded(name)["change_of_state"])) < 2 for name in ("nested_c2", "nested_c4"))
    for name in ("nested_c2", "nested_c4", "paper_c2"):
        routing = recorded(name)
        revisits = [value for layer in routing["revisits"] for value in layer]
        assert sum(revisits) / len(revisits) < 1.2 * routing["revisits_if_choices_were_independent"]


def test_what_the_page_says_in_words_is_what_was_recorded():
    def rows_of(name):
        return json.loads((RESULTS / f"{name}.json").read_text())["rows"]

    def loss(name, row):
        return rows_of(name)[row]["mean_validation_loss"]

    page = verdicts.render()
    for name, most in (("tiny", 0.083), ("code", 0.242)):
        rows = rows_of(f"balancing_{name}")
        dead = {row: max(verdicts.health_of(content["runs"], "dead_experts")) for row, content in rows.items()}
        assert dead["bias"] == 0 and dead["no balancing"] == pytest.approx(most, abs=0.001)
        assert dead["Switch loss, 0.001"] < 0.21
        default = loss(f"balancing_{name}", "bias") - loss(f"balancing_{name}", "Switch loss, 0.001")
        assert round(default, 2) == 0.02
    assert (
        "no expert dead on the first validation batch, where no balancing left up to 24 % (the mean of three seeds)"
        in page
    )
    assert "It ends 0.02 higher than with Switch's loss at the default 0.001 at both scales" in page
    quality = json.loads((RESULTS / "low_bits.json").read_text())["quality"].values()
    assert all(abs(bits["change"]) < 0.001 for model in quality for bits in model["results"].values())
    for name in ("code", "problems"):
        for budget, experts in ((2, 2.1), (1, 1.1)):
            runs = rows_of(f"dial_{name}")[f"dial at {budget}"]["runs"]
            assert verdicts.mean_of(runs, "experts_per_token") == pytest.approx(experts, abs=0.05)
    assert "It computes 2.1 experts a token where two are asked for, and 1.1 where one is." in page
    share_of_harder = {}
    for name in ("code", "problems"):
        quarters = verdicts.mean_of(rows_of(f"dial_{name}")["dial at 2"]["runs"], "experts_by_loss")
        share_of_harder[name] = sum(quarters[2:]) / sum(quarters[:2])
    assert share_of_harder["code"] == pytest.approx(1.1, abs=0.02)
    assert share_of_harder["problems"] == pytest.approx(0.75, abs=0.02)
    assert "the harder half computes a tenth more on source code, and a quarter less on word problems" in page
    mixtral = loss("equal_compute_small", "Mixtral MoE(8/64)")
    chain, block = (loss("equal_compute_small", f"paper's {name}") for name in ("CoE-2(4/64)", "MoE(8/64)"))
    assert (round(mixtral - chain, 2), round(mixtral - block, 2)) == (0.08, 0.07)
    assert "ends 0.08 below Mixtral's block, and so does the paper's block without a chain (0.07)" in page
    by_width = {
        row["initializer_range"]: statistics.mean(row["validation_losses"])
        for row in json.loads((RESULTS / "search.json").read_text())["initialisation"]
        if (row["scale"], row["form"]) == ("tiny", "Mixtral")
    }
    assert round(by_width[0.02] - by_width[0.08], 1) == 0.2
    twice, rule = (loss("initialisation_small", f"Mixtral MoE(8/64), {std}") for std in ("0.04", "0.057"))
    assert twice <= rule and "at width 128, twice 0.02 did as well" in page


@pytest.mark.parametrize(
    "scale, rate, losses, row",
    [
        ("wide", 4e-3, {4.3719, 4.3905}, "-0.019, one seed: 4.3719 and [4.3905]"),
        ("fine", 4e-3, {3.1786, 3.4552, 3.197}, "-0.277, one seed: 3.1786 and [3.4552]"),
        ("fine", 4e-3, {3.1786, 3.4552, 3.197}, "+0.018, one seed: [3.1970]"),
        ("fine", 3e-3, {2.7518, 2.9112, 2.7437}, "-0.159, one seed: 2.7518 and [2.9112]"),
        ("fine", 3e-3, {2.7518, 2.9112, 2.7437}, "-0.008, one seed: [2.7437]"),
        ("capacity", 3e-3, {2.8485, 2.8241, 2.8267, 2.9084, 2.9852, 2.8794}, "-0.091, seeds from -0.053 to -0.161"),
        ("short", 4e-3, {2.9619, 3.0759, 2.956, 2.9437}, "-0.114, one seed: 2.9619 and [3.0759]"),
        ("short", 4e-3, {2.9619, 3.0759, 2.956, 2.9437}, "-0.006, one seed: [2.9560](runs/short.json) | -0.018, one"),
        ("capacity", 3e-3, {2.7394, 2.7348, 2.7547, 2.7229}, "| -0.090 | -0.126, one seed | [0.035]"),
    ],
)
def test_a_first_look_that_failed_is_recorded(scale, rate, losses, row):
    runs = json.loads((RESULTS / "runs" / f"{scale}.json").read_text()).values()
    assert losses <= {run["validation_loss"] for run in runs if run["learning_rate"] == rate}
    assert row in verdicts.render()


def test_results_of_two_tables_are_paired_by_the_seeds_that_both_have():
    def result(name, losses):
        return {"rows": {name: {"runs": [{"seed": s, "validation_loss": loss} for s, loss in losses.items()]}}}

    first, second = result("a", {0: 3.0, 1: 2.0, 2: 9.0}), result("b", {1: 1.9, 3: 9.0, 0: 2.7})
    # Differences of 0.3 and 0.1; with two seeds, half of an interval is 12.706 standard errors, here of 0.1.
    assert verdicts.difference_across(first, "a", second, "b") == "+0.200 (-1.071 to +1.471)"
    assert [verdicts.signed(value) for value in (0.00021, -0.0004, 0.05)] == ["+0.0002", "-0.0004", "+0.050"]


def test_results_and_pictures_stay_below_900_kilobytes():
    assert sum(path.stat().st_size for path in RESULTS.parent.rglob("*") if path.is_file()) < 900_000


def test_the_search_found_no_form_that_wins_and_its_gain_is_not_the_chain_s():
    search = json.loads((RESULTS / "search.json").read_text())
    assert {row["form"] for row in search["comparisons"]} == search["forms"].keys() - {"Mixtral"}
    means = {}
    for row in search["comparisons"]:
        mean = statistics.mean(row["differences"])
        assert mean > 0 or row["scale"] != "tiny", f"{row['form']} won"
        if (row["dataset"], row["steps"], "initialisation" in row) == ("gsm8k", 400, False):
            means.setdefault((row["scale"], row["learning_rate"]), {})[row["form"]] = mean
    small, tiny = means["small", 0.002], means["tiny", 0.004]
    doubled = "one_choice+parallel+double"  # Mixtral's block with its router weights doubled
    assert small[doubled] < 0 < tiny[doubled]
    assert all(abs(form["nested"] - form[doubled]) < 0.02 for form in (small, tiny))
    assert small["parallel"] < small["nested"]  # two routers without a chain
    assert abs(small["mean"]) < 0.01  # the chain divided by two

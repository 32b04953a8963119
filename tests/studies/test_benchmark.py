# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says, can lose, and says so. No test asserts a time."""

import json
from pathlib import Path

import pytest
import torch
import transformers


ROOT = Path(__file__).parents[2]

from modeling_coe.train.studies import benchmark  # noqa: E402


TINY = {
    **benchmark.SIZES["cpu"],
    "model": {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "batch": 2, "sequence": 8, "paper_block_tokens": 8, "decode_batches": (1, 2), "new_tokens": 2,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    paper = {**benchmark.PAPER_BLOCK, "hidden_size": 32, "intermediate_size": 16}
    monkeypatch.setattr(benchmark, "PAPER_BLOCK", paper)
    monkeypatch.setitem(benchmark.SIZES, "cpu", TINY)
    monkeypatch.setattr(transformers.logging, "set_verbosity_error", lambda: None)


def test_every_suite_runs_and_records_shape_machine_and_all_variants(tiny, tmp_path):
    output = tmp_path / "results" / "benchmark.json"
    benchmark.main(["--repetitions", "2", "--output", str(output)])
    results = json.loads(output.read_text())
    assert set(results) == set(benchmark.SUITES)
    for suite in results.values():
        assert {"commit", "versions", "device", "threads", "clock"} <= set(suite["machine"])
        assert suite["size"]["model"] == TINY["model"]
    own_shape, paper_shape = results["block"]["results"].values()
    assert set(own_shape) == {*benchmark.MIXTRAL, *benchmark.CHAINS} and set(paper_shape) == set(benchmark.NO_LOOPS)
    for rows in (own_shape, paper_shape):
        assert rows[benchmark.BASELINE]["ratio"] == 1.0 and rows[benchmark.BASELINE]["rounds"] >= 2
    before = results["block"]
    benchmark.main(["--suites", "load", "--repetitions", "1", "--output", str(output)])
    assert json.loads(output.read_text())["block"] == before  # suites that did not run are kept


def test_a_slower_variant_is_printed_as_a_loss_and_a_faster_one_as_a_win(capsys):
    seconds = {benchmark.BASELINE: [1.0, 1.1, 0.9], "slow": [2.0, 2.2, 1.8], "fast": [0.5, 0.55, 0.45]}
    rows = benchmark.compare("title", seconds, tokens=100)
    assert (rows["slow"]["ratio"], rows["fast"]["ratio"]) == (0.5, 2.0)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "LOSES" in lines["slow"] and "wins" in lines["fast"]
    assert "wins" not in lines["mixtral"] and "LOSES" not in lines["mixtral"]


def test_variants_alternate_and_each_round_starts_with_another():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = benchmark.alternate(variants, {"device": "cpu"}, repetitions=3)
    assert order == list("abcbcacababc")
    assert all(len(values) == 3 for values in seconds.values())  # the first round is warm-up


def test_variants_have_equal_experts_and_visit_equally_many():
    models = {name: benchmark.build(name, TINY) for name in (*benchmark.MIXTRAL, *benchmark.CHAINS)}
    experts = {sum(p.numel() for n, p in m.named_parameters() if "experts" in n) for m in models.values()}
    visits = {getattr(m.config, "num_iterations", 1) * m.config.num_experts_per_tok for m in models.values()}
    assert len(experts) == 1 and visits == {8}
    assert models["CoE-2(4/64)"].config._experts_implementation == "coe"
    assert models["CoE-2(4/64) naive loop"].config._experts_implementation == "eager"


def test_peak_bytes_is_the_highest_point_not_the_sum():
    def step():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(5000, dtype=torch.uint8)
        del first, second
        torch.empty(2000, dtype=torch.uint8)

    assert 6000 <= benchmark.peak_bytes(step, torch.device("cpu")) <= 6500


def test_saved_bytes_counts_each_storage_once_and_leaves_out_what_was_given():
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    # `x @ weight` keeps x and weight; exp keeps its result, 10 x 4 fp32; the product keeps that result twice.
    assert benchmark.saved_bytes(lambda: (lambda e: e * e)((x @ weight).exp()), (x, weight)) == 160


@pytest.mark.parametrize("arguments", [["--suites", "speed"], ["--repetitions", "0"], ["--reps", "3x"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "model_cards" / "studies").glob("benchmark_*.json")))
def test_committed_results_say_where_they_come_from(file):
    for suite, result in json.loads(file.read_text()).items():
        assert suite in benchmark.SUITES
        assert result["machine"]["commit"] and result["machine"]["versions"]["torch"] and result["machine"]["device"]

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The routing of a saved checkpoint, from the command line."""

import json

import pytest
import torch
from conftest import build, tokens, whitespace_tokenizer

from modeling_coe.routing import record_routing
from modeling_coe.train import show_routing


def test_kinds_are_told_by_the_text_of_a_token():
    assert [show_routing.KINDS[show_routing.kind_of(text)] for text in ("7", " apples", "\n", "<<", "####", "a1")] == [
        "digits", "words", "signs", "signs", "signs", "signs",
    ]  # fmt: skip


@pytest.mark.parametrize("iterations", [1, 3])
def test_script_writes_numbers_and_pictures_of_a_checkpoint(tmp_path, iterations):
    build(num_iterations=iterations).save_pretrained(tmp_path / "model")
    whitespace_tokenizer().save_pretrained(tmp_path / "model")
    made = {"learning_rate": 0.004, "seed": 1, "model": "/home/someone/preset.json"}
    (tmp_path / "model" / "facts.json").write_text(json.dumps(made))
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"question": f"w{i} w5", "answer": f"w{i + 1} w9 #"}) + "\n" for i in range(3, 13))
    )
    options = {"model": tmp_path / "model", "dataset": tmp_path / "data.jsonl", "validation_size": 4,
               "output_dir": tmp_path / "routing"}  # fmt: skip
    show_routing.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    facts = json.loads((tmp_path / "routing" / "routing.json").read_text())
    assert facts["trained"] == {"learning_rate": 0.004, "seed": 1}  # and nothing of somebody's machine
    assert facts["documents"] == 4 and facts["tokens"] > 8
    for name in ("entropy_of_load", "change_of_state", "specialisation_by_kind_of_token"):
        assert [len(row) for row in facts[name]] == [iterations] * 2
    assert [len(row) for row in facts["revisits"]] == [iterations - 1] * 2
    assert (tmp_path / "routing" / "transitions.png").exists() == (iterations > 1)
    assert (tmp_path / "routing" / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("budget", [None, 2])
def test_script_tells_what_tokens_cost_where_there_are_null_experts(tmp_path, capsys, budget):
    build(router_bias=True, num_null_experts=3).save_pretrained(tmp_path / "model")
    whitespace_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"w{i} w5", "answer": f"w{i + 1} w9 #"} for i in range(3, 13)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": tmp_path / "model", "dataset": tmp_path / "data.jsonl", "validation_size": 4,
               "output_dir": tmp_path / "routing"} | ({} if budget is None else {"expert_budget": budget})  # fmt: skip
    show_routing.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    facts = json.loads((tmp_path / "routing" / "routing.json").read_text())
    experts = sum(facts["experts_by_quarter"][0]) / 4
    assert experts == 2 if budget == 2 else 0 < experts < 2
    assert "quarters from the easiest" in capsys.readouterr().out
    assert (tmp_path / "routing" / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_a_row_for_each_layer_and_iteration():
    summary = {
        "entropy_of_load": [[0.91, 0.92], [0.93, 0.94]],
        "busiest_expert_over_mean": [[1.1, 1.2], [1.3, 1.4]],
        "change_of_state": [[0.5, 0.6], [0.7, 0.8]],
        "revisits": [[0.21], [0.22]],
    }
    rows = [line.split() for line in show_routing.table(summary).splitlines()[1:]]
    assert rows == [
        ["0", "1", "0.91", "1.10", "0.50"],
        ["0", "2", "0.92", "1.20", "0.60", "21%"],
        ["1", "1", "0.93", "1.30", "0.70"],
        ["1", "2", "0.94", "1.40", "0.80", "22%"],
    ]


def test_summary_is_the_routing_s_own():
    routing = record_routing(build(), tokens(2, 9))
    kinds = torch.arange(18) % 3
    summary = show_routing.summarise(routing, kinds)
    assert summary["change_of_state"][1][2] == pytest.approx(routing.change[1, 2].item(), abs=1e-4)
    assert summary["busiest_expert_over_mean"][0][0] == pytest.approx(routing.load[0, 0].max().item() * 7, abs=1e-3)
    assert summary["revisits_if_choices_were_independent"] == pytest.approx(2 / 7, abs=1e-4)

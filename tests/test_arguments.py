# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Recipes and command lines: what is written is what a run gets, and what cannot be is refused with the remedy."""

import sys

import pytest

from modeling_coe.train import generate
from modeling_coe.train.arguments import DataArguments, ModelArguments, PretrainArguments, command_line, parse
from modeling_coe.train.upcycle import UpcycleArguments


def recipe(tmp_path, text: str | bytes, *options: str, classes=(PretrainArguments,)):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse(*classes, arguments=["--config", str(path), *options])


def test_a_recipe_is_read_as_the_command_line_would_be(tmp_path):
    text = "use_cpu: yes\nsave_steps: 50\neval_strategy: no\nlearning_rate: 3e-4\nmax_steps: 7\nreport_to: [none]\n"
    text += "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 6, decay_type: linear}\n"
    (training,) = recipe(tmp_path, text + "save_total_limit: null\n", "--max_steps", "8")
    assert (training.eval_strategy, training.learning_rate, training.max_steps) == ("no", 3e-4, 8)
    assert training.lr_scheduler_kwargs == {"num_decay_steps": 6, "decay_type": "linear"}
    assert training.save_total_limit is None and training.report_to == []


def test_a_single_value_of_a_list_is_a_list_of_one(tmp_path):
    (upcycling,) = recipe(tmp_path, "layers: 3\n", classes=(UpcycleArguments,))
    assert upcycling.layers == [3]
    (upcycling,) = recipe(tmp_path, "layers: [3, 5]\n", classes=(UpcycleArguments,))
    assert upcycling.layers == [3, 5]


def test_a_list_of_other_things_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers: \['two'\].*takes a list of int"):
        recipe(tmp_path, "layers: [two]\n", classes=(UpcycleArguments,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: [1]", r"max_steps: \[1\].*takes one plain value"),
        ("max_steps: {a: 1}", "max_steps.*takes one plain value"),
        ("max_steps:", "max_steps: null.*takes one plain value"),
        ("max_steps: many", "max_steps.*'many'"),
        ("use_cpu: perhaps", "use_cpu.*perhaps"),
        ("lr_scheduler_type: 'constnt'", "constnt"),
        ("learning_rat: 1", r"has `learning_rat`.*did you mean `learning_rate`\?"),
        ("completely_different: 1", "has `completely_different`.*--help"),
        ("- a\n- b", "lines of `key: value`"),
        ("", "lines of `key: value`"),
        ("a: [", "no YAML in UTF-8"),
        ("output_dir: läufe".encode("latin-1"), "recipe.yaml` is no YAML in UTF-8"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, text, "--use_cpu", "true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rat", "1"], "has `--learning-rat`.*did you mean `learning_rate`"),
        (["--max_step=3"], "did you mean `max_steps`"),
        (["stray"], "has `stray`"),
        (["--max_steps", "x"], "max_steps.*'x'"),
        (["--optim", "adamw_torhc"], "invalid choice"),
        (["--config", "nowhere.yaml"], "config=nowhere.yaml`: no such file"),
        (["--config"], "expected one argument"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse(ModelArguments, DataArguments, PretrainArguments, arguments=["--use_cpu", "true", *words])


def test_a_script_ends_with_a_message_and_a_call_with_the_error(monkeypatch, capsys):
    @command_line
    def main(arguments=None):
        raise ValueError("`size=0` must be at least 1.")

    with pytest.raises(ValueError, match="size=0"):
        main(["--size", "0"])
    with pytest.raises(SystemExit, match=r"^error: `size=0` must be at least 1\.\n.*PYTHONDEVMODE=1.*$"):
        main()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--questio", "What?"])
    with pytest.raises(SystemExit) as end:
        generate.main()
    assert len(str(end.value).splitlines()) <= 3 and capsys.readouterr() == ("", "")


def test_help_has_the_recipe_first_then_the_script_s_own_options_and_inherited_ones_on_request(capsys):
    def help_of(option):
        with pytest.raises(SystemExit):
            parse(ModelArguments, PretrainArguments, arguments=[option], description="What it does.")
        return capsys.readouterr().out

    brief, full = help_of("--help"), help_of("--help-all")
    places = [
        brief.index(part) for part in ("What it does.", "--config VALUE", "--model ", "--skip_logits ", "--help-all.")
    ]
    assert places == sorted(places)
    assert "--max_grad_norm" not in brief and full.index("--skip_logits ") < full.index("--max_grad_norm ")
    assert "(default: None)" not in full and "--skip-logits" not in full

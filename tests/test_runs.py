# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: nobody else's work is overwritten, one process at a time, and a resumed run is the same run."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import build, whitespace_tokenizer
from datasets import Dataset

from modeling_coe.train import checkpoints, eval_lm, finetune, pretrain, show_routing
from modeling_coe.train.arguments import PretrainArguments, is_preset, require_weights
from modeling_coe.train.runs import (
    LOCK,
    PARTIAL,
    keep_scores,
    match_record,
    record_of,
    result_folder,
    run_folder,
    write_json,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    build().save_pretrained(folder)
    whitespace_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_s_folder_may_be_called_like_a_preset(tmp_path):
    run = tmp_path / "smoke.json"
    run.mkdir()
    require_weights(str(run))
    assert not is_preset(str(run)) and is_preset(str(tmp_path / "coe_tiny.json"))
    with pytest.raises(ValueError, match="is a preset without weights"):
        require_weights(str(tmp_path / "coe_tiny.json"))


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TRAINING = ["--use_cpu", "true", "--dataset", "word_problems"]
SCRIPTS = {
    pretrain: TRAINING,
    finetune: TRAINING,
    eval_lm: ["--dataset", "word_problems"],
    show_routing: ["--dataset", "word_problems"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_no_script_writes_into_the_folder_of_its_model_or_of_another_one(script, model, tmp_path):
    build(seed=1).save_pretrained(tmp_path / "other")
    for output in (model, tmp_path / "other"):
        before = content(output)
        with pytest.raises(ValueError, match=rf"output_dir={output}` (is or )?holds.*choose "):
            script.main([*SCRIPTS[script], "--model", str(model), "--output_dir", str(output)])
        assert content(output) == before


@pytest.mark.parametrize("script", [pretrain, finetune], ids=lambda script: script.__name__)
def test_no_run_starts_in_a_folder_with_somebody_s_files_or_around_its_model(script, model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex and no run.json.*new or empty folder"):
        script.main([*TRAINING, "--model", str(model), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="is or holds `model="):
        script.main([*TRAINING, "--model", str(model), "--output_dir", str(model.parent)])
    with pytest.raises(ValueError, match=r"is inside `model=.*choose another"):
        script.main([*TRAINING, "--model", str(model), "--output_dir", str(model / "tuned")])
    assert not (model / "tuned").exists()
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_run_does_not_start_from_a_checkpoint_in_its_own_folder(tmp_path):
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"data": {}, "training": {}}')
    with pytest.raises(ValueError, match=r"is or holds `model=.*checkpoint-4"), \
            run_folder(tmp_path / "run", str(tmp_path / "run" / "checkpoint-4")):  # fmt: skip
        pass


def test_a_folder_has_one_process_at_a_time_and_none_after_a_kill(tmp_path):
    folder = tmp_path / "run"
    ready, wait = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with run_folder(folder, "user/model"):
            os.write(ready[1], b"1")
            os.read(wait[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    for hold in (run_folder(folder, "user/model"), result_folder(folder, ("facts.json",))):
        with pytest.raises(OSError, match=rf"output_dir={folder}.*process {child} on .*wait for it"), hold:
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / LOCK).exists()
    with run_folder(folder, "user/model"):
        assert str(os.getpid()) in (folder / LOCK).read_text()
    assert not folder.exists()  # it was empty, and this run had made it


def test_a_folder_that_was_there_stays_and_the_error_is_the_one_that_was_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the reason"), run_folder(Path("."), "user/model"):
        raise ValueError("the reason")
    with pytest.raises(ValueError, match="the reason"), run_folder(Path("new"), "user/model"):
        raise ValueError("the reason")
    assert tmp_path.is_dir() and not Path("new").exists()


def test_a_run_that_was_killed_while_it_wrote_its_record_begins_again(tmp_path):
    (tmp_path / ".run.json.partial").write_text("{")
    with run_folder(tmp_path, "user/model"):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_what_a_killed_run_left_half_written_is_named_and_removed(tmp_path, capsys):
    (tmp_path / PARTIAL / "checkpoint-8").mkdir(parents=True)
    (tmp_path / PARTIAL / "checkpoint-8" / "model.safetensors").write_text("half")
    (tmp_path / ".facts.json.partial").write_text("{")
    (tmp_path / "run.json").write_text('{"data": {}, "training": {}}')
    with run_folder(tmp_path, "user/model"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "run.json"]
    printed = capsys.readouterr().out
    assert f"{PARTIAL}/checkpoint-8, which a killed run left" in printed and ".facts.json.partial" in printed


def record(model, documents, **settings):
    training = PretrainArguments(output_dir="unused", use_cpu=True, report_to="none", save_strategy="no", **settings)
    return record_of(str(model), build().config, whitespace_tokenizer(), training, documents)


def test_a_changed_document_is_found_wherever_it_is(model, tmp_path):
    texts = [f"w{number % 90 + 3}" for number in range(1000)]
    (tmp_path / "checkpoint-2").mkdir()
    match_record(tmp_path, record(model, Dataset.from_dict({"text": texts})))
    match_record(tmp_path, record(model, Dataset.from_dict({"text": texts})))
    for place in (0, 777, 999):
        changed = [*texts[:place], "w1 w2", *texts[place + 1 :]]
        with pytest.raises(ValueError, match=r"others are here, the first between number") as error:
            match_record(tmp_path, record(model, Dataset.from_dict({"text": changed})))
        first, last = map(int, re.findall(r"number (\d+) and (\d+)", str(error.value))[0])
        assert first <= place + 1 <= last <= first + 16
    with pytest.raises(ValueError, match="`data=1000 documents`, this one has `999`"):
        match_record(tmp_path, record(model, Dataset.from_dict({"text": texts[:-1]})))


def test_a_run_of_the_same_sizes_from_other_weights_is_another_run(model, tmp_path):
    documents = Dataset.from_dict({"text": ["w5"]})
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    match_record(tmp_path / "run", record(model, documents))
    build(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds a run with `weights="):
        match_record(tmp_path / "run", record(tmp_path / "other", documents))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lr_scheduler_kwargs": {"num_decay_steps": 3}}, "training.lr_scheduler_kwargs.num_decay_steps"),
        ({"optim_args": "bf16_stochastic_round=True"}, "training.optim_args"),
        ({"label_smoothing_factor": 0.1}, "training.label_smoothing_factor"),
        ({"seed": 43}, "training.seed"),
        ({"train_sampling_strategy": "sequential"}, "training.train_sampling_strategy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_recipe_is_another_run(model, tmp_path, change, field):
    documents = Dataset.from_dict({"text": ["w5"]})
    (tmp_path / "checkpoint-2").mkdir()
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}
    match_record(tmp_path, record(model, documents, **schedule))
    with pytest.raises(ValueError, match=f"holds a run with `{field}="):
        match_record(tmp_path, record(model, documents, **schedule | change))


def test_what_is_recorded_since_later_is_only_where_it_is_set(model):
    documents = Dataset.from_dict({"text": ["w5"]})
    names = {"auto_find_batch_size", "train_sampling_strategy"}
    assert names.isdisjoint(record(model, documents)["training"])
    options = {"auto_find_batch_size": True, "train_sampling_strategy": "group_by_length"}
    assert options.items() <= record(model, documents, **options)["training"].items()


def test_a_finished_model_without_checkpoints_is_not_overwritten_by_another_run(model, tmp_path):
    documents = Dataset.from_dict({"text": ["w5"]})
    match_record(tmp_path, record(model, documents))
    match_record(tmp_path, record(model, documents, seed=1))  # nothing to lose yet
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(ValueError, match=r"`training.seed=1`, this one has `2`"):
        match_record(tmp_path, record(model, documents, seed=2))


def test_scores_are_kept_for_a_later_leg_of_the_same_documents_and_settings(tmp_path):
    documents, settings = Dataset.from_dict({"text": ["w5", "w6"]}), {"scored_problems": 2}
    assert keep_scores(tmp_path, documents, settings, None) is None
    assert keep_scores(tmp_path, documents, settings, {"validation_loss": 2.5}) == {"validation_loss": 2.5}
    assert keep_scores(tmp_path, documents, settings, None) == {"validation_loss": 2.5}
    assert keep_scores(tmp_path, documents.select([0]), settings, None) is None
    assert keep_scores(tmp_path, documents, {"scored_problems": 3}, None) is None


@pytest.mark.parametrize("name", ["run.json", "facts.json"])
def test_a_damaged_record_is_named(model, tmp_path, name):
    base, output = tmp_path / "base", tmp_path / "run"
    build().save_pretrained(base)
    whitespace_tokenizer().save_pretrained(base)
    (output / "checkpoint-2").mkdir(parents=True)
    (output / "run.json").write_text('{"data": {}, "training": {}}')
    damaged = (output if name == "run.json" else base) / name
    damaged.write_text('{"seed": 4')
    write = json.dumps({"text": "w5 w6 w7"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(4 * write)
    data = ["--dataset", str(tmp_path / "rows.jsonl"), "--validation_size", "1", "--sequence_length", "16"]
    with pytest.raises(ValueError, match=f"{damaged} is damaged.*(?i:restore it)"):
        pretrain.main(["--use_cpu", "true", "--model", str(base), "--output_dir", str(output), *data])


def checkpoint(folder, step: int):
    partial = folder / PARTIAL / f"checkpoint-{step}"
    partial.mkdir(parents=True)
    torch.save({"step": step, "state": torch.ones(4000)}, partial / "optimizer.pt")
    torch.save({"step": step}, partial / "rng_state.pth")
    checkpoints.complete(folder, partial.name, keep=None)
    return folder / partial.name


def zeroed(path):
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda folder: zeroed(folder / "optimizer.pt"), "optimizer.pt"),
        (lambda folder: (folder / "rng_state.pth").write_bytes(b"\0" * 900), "rng_state.pth"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth"),
        (lambda folder: (folder / "files.json").write_text("{"), "files.json"),
        (lambda folder: (folder / "files.json").write_text("[]"), "files.json"),
    ],
)
def test_a_damaged_checkpoint_of_unchanged_size_is_passed_over_for_the_one_before(tmp_path, damage, name):
    older, newer = checkpoint(tmp_path, 4), checkpoint(tmp_path, 12)
    assert checkpoints.checkpoint_to_resume(tmp_path, None) == newer
    size = (newer / "optimizer.pt").stat().st_size
    damage(newer)
    assert (newer / "optimizer.pt").stat().st_size == size
    with pytest.warns(UserWarning, match=rf"checkpoint-12 is incomplete \({name}\)"):
        assert checkpoints.checkpoint_to_resume(tmp_path, None) == older
    with pytest.raises(ValueError, match=f"checkpoint-12` is damaged: {name}"):
        checkpoints.checkpoint_to_resume(tmp_path, str(newer))


def test_a_checkpoint_is_resumed_from_by_name_or_refused_by_name(tmp_path):
    older, _ = checkpoint(tmp_path / "run", 4), checkpoint(tmp_path / "run", 12)
    elsewhere = checkpoint(tmp_path / "elsewhere", 4)
    assert checkpoints.checkpoint_to_resume(tmp_path / "run", str(older)) == older
    for wanted in ("/nope", str(elsewhere)):
        with pytest.raises(ValueError, match=rf"{wanted}` is no checkpoint of .*checkpoint-4, checkpoint-12; leave"):
            checkpoints.checkpoint_to_resume(tmp_path / "run", wanted)


def test_no_file_of_somebody_else_is_removed_emptied_or_followed(tmp_path):
    """Links and files that stand where a run puts its own are named; the run does not start."""
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("mine")
    for name, target in ((".lock", thesis / "chapter.tex"), (".partial", thesis)):
        folder = tmp_path / f"run{name}"
        folder.mkdir()
        (folder / name).symlink_to(target)
        with pytest.raises(OSError), run_folder(folder, "preset.json"):
            pass
    for name in (".partial/chapter.tex", ".lock"):
        folder = tmp_path / f"own{name[:5]}"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        with pytest.raises(OSError, match="not of this project"), run_folder(folder, "preset.json"):
            pass
        assert (folder / name).read_text() == "mine"
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / ".thesis.partial").write_text("mine")
    with result_folder(folder, ("facts.json",)):
        pass
    assert (folder / ".thesis.partial").read_text() == (thesis / "chapter.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("script", "names"), [(eval_lm, ["samples.json"]), (show_routing, ["load.png", "routing.json"])]
)
def test_results_replace_earlier_results_and_nothing_else(script, names, model, tmp_path):
    command = [*SCRIPTS[script], "--model", str(model), "--validation_problems", "4", "--sequence_length", "64"]
    command += ["--output_dir", str(tmp_path / "results")]
    command += ["--scored_problems", "1", "--max_new_tokens", "2"] if script is eval_lm else []
    for name in names:
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / name).write_text('["my own work"]')
    with pytest.raises(ValueError, match=rf"holds .*{names[0]}.*, which no earlier run of this script wrote"):
        script.main(command)
    assert {path.read_text() for path in (tmp_path / "results").iterdir()} == {'["my own work"]'}
    for name in names:
        (tmp_path / "results" / name).unlink()
    (tmp_path / "results" / "notes.txt").write_text("mine")
    script.main(command)
    before = content(tmp_path / "results")
    script.main(command)
    assert content(tmp_path / "results").keys() == before.keys() > {"notes.txt", *names}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_nothing_is_written_among_the_documents(script, model, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "w5 w6"}\n')
    command = [*SCRIPTS[script], "--model", str(model), "--dataset", str(tmp_path), "--output_dir"]
    for output in (tmp_path, tmp_path / "run"):
        with pytest.raises(ValueError, match=rf"`output_dir={output}` (is or is inside `dataset=|holds train\.jsonl)"):
            script.main([*command, str(output)])
    assert content(tmp_path).keys() == {"train.jsonl"}


def test_another_programs_run_json_makes_no_run(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "npm run"}')
    with pytest.raises(ValueError, match=r"holds run\.json"), run_folder(tmp_path, "preset.json"):
        pass
    assert (tmp_path / "run.json").read_text() == '{"name": "npm run"}'


def test_json_is_read_back_as_it_was_given_with_short_lists_on_one_line(tmp_path):
    texts = ["Sort [ 3, 1 ] and { }", "[\n  5 ]", "a [", " b ]", "{ ", " }", '" [ \\', "] [", ""]
    given = {"answers": [{"prompt": text, "seen": [1, 2], "none": [], "all": {"x": [texts]}} for text in texts]}
    write_json(tmp_path / "facts.json", given)
    text = (tmp_path / "facts.json").read_text()
    assert json.loads(text) == given and '"seen": [1, 2]' in text
    for path in (Path(__file__).parents[1] / "model_cards" / "studies").glob("*.json"):
        write_json(tmp_path / "again.json", json.loads(path.read_text()))
        assert (tmp_path / "again.json").read_text() == path.read_text(), path

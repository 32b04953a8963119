# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The pretraining script: killed and resumed runs, equivalent runs, and runs that must stop with a clear error."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer import logger as trainer_logger

from modeling_coe.routing import record_routing
from modeling_coe.train import arguments, eval_lm, pretrain, report
from modeling_coe.train.arguments import DataArguments, ModelArguments, PretrainArguments, parse
from modeling_coe.train.checkpoints import AtomicCheckpoints, checkpoints, newest_checkpoint
from modeling_coe.train.report import read_curve


PROJECT = Path(__file__).parents[1]
TINY = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 160,
}  # fmt: skip


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "tiny.json"
    path.write_text(json.dumps({"model_type": "coe", **TINY}))
    return path


def options(preset, output, **changes) -> list[str]:
    """A run of 12 steps in two epochs, which logs every second and saves every fourth one."""
    values = {
        "model": preset, "output_dir": output, "train_problems": 90, "validation_problems": 9, "sequence_length": 160,
        "scored_problems": 5, "max_new_tokens": 6, "max_steps": 12, "per_device_train_batch_size": 4,
        "learning_rate": "3e-3", "warmup_steps": 3, "logging_steps": 2, "eval_steps": 4, "save_steps": 4,
        "save_total_limit": 2, "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return [item for key, value in (values | changes).items() for item in (f"--{key}", str(value))]


def curve(output: Path) -> list[dict]:
    """The loss curve without what depends on the speed of the machine."""
    noise = ("runtime", "seconds", "per_second", "memory")
    rows = [json.loads(line) for line in (output / "loss_curve.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not any(word in key for word in noise)} for row in rows]


@pytest.fixture(scope="module")
def whole_run(preset, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    pretrain.main(options(preset, output))
    return output


def test_dropping_the_last_batch_drops_none_of_the_validation(preset, tmp_path):
    losses, changes = [], {"max_steps": 1, "warmup_steps": 0, "save_steps": 2, "scored_problems": 0}
    for drop in (False, True):
        changes |= {"per_device_eval_batch_size": 8, "dataloader_drop_last": drop}
        pretrain.main(options(preset, tmp_path / str(drop), **changes))
        losses.append(json.loads((tmp_path / str(drop) / "facts.json").read_text())["validation_loss"])
    assert losses[0] == losses[1]


def test_facts_of_other_weights_do_not_outlive_them(preset, tmp_path, monkeypatch):
    pretrain.main(options(preset, tmp_path / "run", max_steps=4, scored_problems=0))
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["steps"] == 4

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "write_results", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(options(preset, tmp_path / "run", max_steps=8, scored_problems=0))
    assert not (tmp_path / "run" / "facts.json").exists()
    pretrain.main(options(preset, tmp_path / "run", max_steps=8, scored_problems=0))
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    "option",
    [
        {"prediction_loss_only": True},
        {"label_names": "foo"},
        {"eval_accumulation_steps": 0},
        {"batch_eval_metrics": True},
        {"include_num_input_tokens_seen": "no"},
    ],
)
def test_options_that_leave_no_result_are_refused_before_training(option, preset, tmp_path):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}="):
        pretrain.main(options(preset, tmp_path / "run", **option))
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_a_model_that_loads_its_tokenizer_its_curve_and_its_facts(whole_run):
    model = AutoModelForCausalLM.from_pretrained(whole_run)
    tokenizer = AutoTokenizer.from_pretrained(whole_run)
    assert model.config.use_cache and model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert [path.name for path in checkpoints(whole_run)] == ["checkpoint-8", "checkpoint-12"]
    assert not (whole_run / ".partial").exists()
    rows = curve(whole_run)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12]
    assert rows[-1]["eval_loss"] < rows[2]["eval_loss"]
    facts = json.loads((whole_run / "facts.json").read_text())
    assert facts["validation_loss"] == rows[-1]["eval_loss"]
    assert facts["tokens"] == rows[-1]["num_input_tokens_seen"] > 1000
    assert facts["learning_rate"] == 3e-3 and facts["versions"]["torch"] == torch.__version__
    assert facts["scored_problems"] == 5
    assert len(json.loads((whole_run / "samples.json").read_text())) == 5
    assert (whole_run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_validation_loss_is_the_mean_over_all_validation_tokens(whole_run, preset):
    model = AutoModelForCausalLM.from_pretrained(whole_run)
    tokenizer = AutoTokenizer.from_pretrained(whole_run)
    _, data, training = parse(ModelArguments, DataArguments, PretrainArguments, arguments=options(preset, "unused"))
    total, count = 0.0, 0
    for row in pretrain.load_documents(data, training.seed)["validation"]:
        ids = torch.tensor([[*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        total -= scores.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert curve(whole_run)[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_reports_what_the_run_reported(whole_run, tmp_path):
    facts = json.loads((whole_run / "facts.json").read_text())
    data = {"train_problems": 90, "validation_problems": 9, "scored_problems": 5, "max_new_tokens": 6}
    settings = {"model": whole_run, "dataset": "word_problems", "output_dir": tmp_path, **data}
    eval_lm.main([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    scored = json.loads((tmp_path / "facts.json").read_text())
    for name in ("validation_loss", "share_solved", "scored_problems"):
        assert scored[name] == pytest.approx(facts[name], rel=1e-5), name


# One process that imports everything once and lets its children be killed, each at the place its parent names.
KILLED_RUNS = """
import os, signal, sys
from modeling_coe.train import checkpoints, pretrain
from transformers import Trainer

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(step):
    original = Trainer.training_step
    def training_step(self, *args, **kwargs):
        return kill() if self.state.global_step == step else original(self, *args, **kwargs)
    Trainer.training_step = training_step

def while_saving(step, owner, name):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        is_due = os.path.exists(os.path.join(output, ".partial", f"checkpoint-{step}"))
        return kill() if is_due else original(*args, **kwargs)
    setattr(owner, name, patched)

output, *arguments = sys.argv[1:]
places = [
    lambda: at_step(2),                                               # before the first checkpoint
    lambda: while_saving(4, Trainer, "_save_optimizer_and_scheduler"),  # the model is written, the rest is not
    lambda: at_step(7),                                               # between two points of the loss curve
    lambda: while_saving(8, checkpoints, "write_json"),               # everything is written, nothing is listed
    lambda: while_saving(12, checkpoints.os, "replace"),              # everything but the name
]
for place in places:
    child = os.fork()
    if child == 0:
        place()
        pretrain.main(arguments)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    folders = sorted(name for name in os.listdir(output) if name.startswith("checkpoint"))
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    print("killed" if died else status, folders, flush=True)
"""


def test_a_run_killed_again_and_again_has_the_curve_of_an_uninterrupted_one_bit_for_bit(preset, whole_run, tmp_path):
    command = [sys.executable, "-c", KILLED_RUNS, tmp_path, *options(preset, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT / "train")}
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=True)
    places = [line for line in done.stdout.splitlines() if line.endswith("]")]
    assert places == [
        "killed []",
        "killed []",
        "killed ['checkpoint-4']",
        "killed ['checkpoint-4']",
        "killed ['checkpoint-4', 'checkpoint-8']",
    ], done.stderr
    pretrain.main(options(preset, tmp_path))
    assert json.loads((tmp_path / "facts.json").read_text())["resumed_from"] == "checkpoint-8"
    assert curve(tmp_path) == curve(whole_run)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()


def test_a_killed_run_has_the_biases_and_the_budget_of_an_uninterrupted_one_bit_for_bit(tmp_path):
    preset = tmp_path / "dial.json"
    dial = {"router_bias": True, "num_null_experts": 3, "expert_budget": 1.5, "router_aux_loss_coef": 0.0}
    preset.write_text(json.dumps({"model_type": "coe", **TINY, **dial}))
    changes = {"router_bias_rate": 0.05, "scored_problems": 0, "gradient_accumulation_steps": 2}
    pretrain.main(options(preset, tmp_path / "whole", **changes))
    killed = tmp_path / "killed"
    killed.mkdir()
    command = [sys.executable, "-c", KILLED_RUNS, killed, *options(preset, killed, **changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT / "train")}
    subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=True)
    pretrain.main(options(preset, killed, **changes))
    assert json.loads((killed / "facts.json").read_text())["resumed_from"] == "checkpoint-8"
    assert (killed / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()

    model = AutoModelForCausalLM.from_pretrained(killed)
    biases = torch.stack([layer.mlp.gate.e_score_correction_bias for layer in model.model.layers])
    steps = biases / 0.05
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert 3 <= steps.abs().max() <= 12
    ids = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    computed = [record_routing(model, ids, expert_budget=x).experts_per_token.mean().item() for x in (0.5, 1, 1.5)]
    assert computed == sorted(computed) and computed[2] - computed[0] > 0.3
    facts = json.loads((killed / "facts.json").read_text())
    assert 0 < facts["routing_health"]["eval_experts_per_token_2"] < 2


def test_a_finished_run_repeated_or_killed_before_its_last_save_is_the_same_run(whole_run, preset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole_run, output)
    for name in ("model.safetensors", "facts.json", "loss_curve.png"):
        (output / name).unlink()
    pretrain.main(options(preset, output))
    assert curve(output) == curve(whole_run)
    assert (output / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    facts, before = (json.loads((folder / "facts.json").read_text()) for folder in (output, whole_run))
    for name in ("steps", "tokens", "validation_loss", "share_solved"):
        assert facts[name] == before[name]


def test_a_finished_run_scored_again_keeps_the_facts_of_the_machine_that_trained_it(whole_run, preset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole_run, output)
    facts = json.loads((output / "facts.json").read_text())
    assert facts["train_seconds"] > 0 and facts["resumed_from"] is None
    elsewhere = {"train_seconds": 77.7, "commit": "1234567", "python": "3.99", "device": "Another (CPU)"}
    (output / "facts.json").write_text(json.dumps(facts | elsewhere))
    pretrain.main(options(preset, output, scored_problems=3))
    again = json.loads((output / "facts.json").read_text())
    assert again == facts | elsewhere | {"scored_problems": 3, "share_solved": again["share_solved"]}


def test_a_longer_run_does_not_keep_the_facts_of_the_shorter_one(whole_run, preset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole_run, output)
    facts = json.loads((output / "facts.json").read_text()) | {"steps": 8, "commit": "1234567"}
    (output / "facts.json").write_text(json.dumps(facts))
    pretrain.main(options(preset, output))
    assert json.loads((output / "facts.json").read_text())["commit"] != "1234567"


def test_a_resumed_run_reports_the_seconds_of_all_its_legs(preset, whole_run, tmp_path, monkeypatch):
    """Each step takes ten seconds of a clock of our own, those included that a kill made the next leg repeat."""
    clock = iter(range(0, 10**6, 10))
    now = [0.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    step = pretrain.Trainer.training_step

    def ten_seconds(self, *args, **kwargs):
        now[0] = float(next(clock)) + 10
        if self.state.global_step == 7 and now[0] < 100:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(pretrain.Trainer, "training_step", ten_seconds)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain.main(options(preset, tmp_path))
    pretrain.main(options(preset, tmp_path))
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["resumed_from"] == "checkpoint-4"
    # Six logged steps, and the eight after checkpoint-4 once more; the step that died was not logged.
    assert facts["train_seconds"] == 10 * (6 + 8)
    assert [row["train_seconds"] for row in read_curve(tmp_path) if "loss" in row] == [20, 40, 80, 100, 120, 140]
    assert curve(tmp_path) == curve(whole_run)


def test_ctrl_c_ends_with_one_line_that_names_the_checkpoint_to_continue_from(preset, tmp_path, monkeypatch, capsys):
    step = pretrain.Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == due:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(pretrain.Trainer, "training_step", interrupted)
    for due, place in ((3, "the start, there is no checkpoint yet"), (6, tmp_path / "checkpoint-4")):
        with pytest.raises(SystemExit) as end:
            pretrain.main(options(preset, tmp_path, disable_tqdm=False))
        assert end.value.code == 130
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert line == f"Interrupted at step {due}. The same command continues from {place}."


def test_a_run_and_its_resumption_warn_of_nothing(preset, tmp_path, monkeypatch):
    """With tied weights, of which a file has one name, and without `use_cpu`, as on a machine that has no GPU."""
    tied = tmp_path / "tied.json"
    tied.write_text(json.dumps({"model_type": "coe", **TINY, "tie_word_embeddings": True}))
    messages = []
    monkeypatch.setattr(trainer_logger, "warning", lambda message, *args, **kwargs: messages.append(message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The interpreter's and the operating system's, of no concern to the run.
        warnings.filterwarnings("ignore", category=ResourceWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for steps in (4, 8):
            pretrain.main(options(tied, tmp_path / "run", max_steps=steps, use_cpu=False))
    assert messages == []
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["resumed_from"] == "checkpoint-4"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"num_input_tokens_seen": 10, "loss": 2.0}],
        [{"num_input_tokens_seen": 10, "eval_loss": 0.5, "eval_solved": 1.0}],
        [{"num_input_tokens_seen": n, "loss": loss} for n, loss in ((10, 1.0), (20, 0.0))],
        [{"num_input_tokens_seen": n, "loss": 0.0, "eval_loss": 0.0} for n in (10, 20)],
    ],
    ids=["nothing", "one point", "evaluated only", "reaches zero", "zero"],
)
def test_every_curve_can_be_drawn(rows, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.plot_curve(rows, tmp_path / "curve.png", "run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_checkpoint_is_passed_over(whole_run, preset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole_run, output)
    weights = output / "checkpoint-12" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"checkpoint-12 is incomplete \(optimizer.pt\)"):
        assert newest_checkpoint(output).name == "checkpoint-8"
    (output / "checkpoint-8" / "files.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-8"):
        assert newest_checkpoint(output) is None
    (output / "checkpoint-12" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning):
        pretrain.main(options(preset, output))  # from the start, over the damaged ones
    assert curve(output) == curve(whole_run)


def test_a_run_that_is_fitted_to_its_card_goes_on_where_another_micro_batch_fits(preset, tmp_path, monkeypatch):
    step, rows = pretrain.Trainer.training_step, []

    def counted(self, model, inputs, *args, **kwargs):
        rows.append(len(inputs["input_ids"]))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(pretrain.Trainer, "training_step", counted)
    monkeypatch.setattr(pretrain, "free_memory", lambda device: 0)
    for steps, fitting in ((4, 4), (6, 2)):
        monkeypatch.setattr(arguments, "largest_micro_batch", lambda *_, fitting=fitting: fitting)
        pretrain.main(options(preset, tmp_path, max_steps=steps, auto_find_batch_size=True))
    assert json.loads((tmp_path / "facts.json").read_text())["resumed_from"] == "checkpoint-4"
    assert rows == 4 * [4] + 2 * [2, 2]
    for changes in ({}, {"auto_find_batch_size": True, "per_device_train_batch_size": 2}):
        with pytest.raises(ValueError, match=r"holds a run with `training\.(auto_find|per_device_train)_batch_size="):
            pretrain.main(options(preset, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"train_problems": 91}, "data"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "training.gradient_accumulation_steps"),
        ({"learning_rate": "1e-3"}, "training.learning_rate"),
        ({"seed": 1}, "data"),
    ],
)
def test_continuing_another_run_is_refused(whole_run, preset, changes, field):
    before = (whole_run / "loss_curve.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"holds a run with `{field}=.*another `output_dir`"):
        pretrain.main(options(preset, whole_run, **changes))
    assert (whole_run / "loss_curve.jsonl").read_bytes() == before


def test_continuing_with_another_model_is_refused(whole_run, preset, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model_type": "coe", **TINY, "num_iterations": 3}))
    with pytest.raises(ValueError, match=r"`model.num_iterations=2`, this one has `3`"):
        pretrain.main(options(other, whole_run))


def test_accumulation_and_checkpointing_give_the_run_of_one_batch(whole_run, preset, tmp_path):
    """Compared without the auxiliary loss, a statistic of each micro-batch that is no mean over its sequences."""
    no_aux = tmp_path / "no_aux.json"
    no_aux.write_text(json.dumps({"model_type": "coe", **TINY, "router_aux_loss_coef": 0.0}))
    runs = {
        "one batch": {"per_device_train_batch_size": 8},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "checkpointed": {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    }
    losses = {}
    for name, changes in runs.items():
        pretrain.main(options(no_aux, tmp_path / name, max_steps=6, **changes))
        losses[name] = [row.get("loss", row.get("eval_loss")) for row in curve(tmp_path / name)]
    assert len(losses["one batch"]) == 5
    assert losses["accumulated"] == pytest.approx(losses["one batch"], abs=1e-5)
    assert losses["checkpointed"] == pytest.approx(losses["one batch"], abs=1e-5)
    first = [row["loss"] for row in curve(whole_run) if "loss" in row]
    assert losses["one batch"][0] != pytest.approx(first[0], abs=1e-5)


def test_a_nan_loss_stops_the_run_says_where_and_keeps_the_last_good_checkpoint(preset, tmp_path, monkeypatch):
    step = pretrain.Trainer.training_step

    def poisoned(self, model, *args, **kwargs):
        if self.state.global_step == 6:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(pretrain.Trainer, "training_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"'loss': nan.* at step 8.*checkpoint is .*checkpoint-4"):
        pretrain.main(options(preset, tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    monkeypatch.undo()
    pretrain.main(options(preset, tmp_path))
    assert json.loads((tmp_path / "facts.json").read_text())["resumed_from"] == "checkpoint-4"


@pytest.mark.parametrize("poison", ["loss", "weights"])
def test_a_nan_that_no_log_has_seen_is_not_saved_as_a_model(preset, tmp_path, monkeypatch, poison):
    step = pretrain.Trainer.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 2 and poison == "weights":
            for weight in model.parameters():
                weight.grad.fill_(float("nan"))
        return loss * float("nan") if self.state.global_step == 1 and poison == "loss" else loss

    monkeypatch.setattr(pretrain.Trainer, "training_step", poisoned)
    options_ = options(preset, tmp_path, max_steps=3, logging_steps=50, save_strategy="no", eval_strategy="no")
    with pytest.raises(FloatingPointError, match=r"not finite.* at step 3|eval_loss.*nan"):
        pretrain.main(options_)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "facts.json").exists()


def test_weights_of_another_rank_that_are_not_finite_are_said_to_be_another_rank_s(tmp_path):
    args = SimpleNamespace(device="cpu", output_dir=str(tmp_path))
    accelerator = SimpleNamespace(reduce=lambda count: count + 1)  # the other rank's
    trainer = AtomicCheckpoints()
    vars(trainer).update(
        args=args, model=torch.nn.Linear(2, 2), accelerator=accelerator, state=SimpleNamespace(global_step=7)
    )
    with pytest.raises(FloatingPointError, match="not finite: a loss or weights of another rank at step 7"):
        trainer.save_model()


def test_a_picture_that_cannot_be_drawn_costs_no_result(preset, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("Data cannot be log-scaled")

    monkeypatch.setattr(report, "plot_curve", broken)
    pretrain.main(options(preset, tmp_path, max_steps=2, save_strategy="no", eval_strategy="no", logging_steps=1))
    assert json.loads((tmp_path / "facts.json").read_text())["steps"] == 2
    assert "Data cannot be log-scaled" in capsys.readouterr().out


def test_a_run_shorter_than_its_first_point_of_the_curve_leaves_its_facts(preset, tmp_path):
    short = {"max_steps": 3, "warmup_steps": 5, "logging_steps": 50, "save_strategy": "no", "eval_strategy": "no"}
    with pytest.warns(UserWarning, match="`warmup_steps=5` are more than the 3 steps"):
        pretrain.main(options(preset, tmp_path, **short))
    assert json.loads((tmp_path / "facts.json").read_text())["steps"] == 3
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_the_earlier_ones(preset, whole_run, tmp_path):
    """The largest file a process may write stands for the full disk: both fail in the middle of a file."""
    output = tmp_path / "run"
    pretrain.main(options(preset, output, max_steps=4))
    size = (output / "checkpoint-4" / "optimizer.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Could not write .*checkpoint-8 .*continues from .*checkpoint-4"):
            pretrain.main(options(preset, output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4"]
    pretrain.main(options(preset, output))
    assert curve(output)[-1] == curve(whole_run)[-1]


def test_an_unwritable_output_is_refused_before_any_work(preset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(pretrain, "load_documents", None)
    with pytest.raises(OSError, match=r"Cannot write to `output_dir=.*file/run"):
        pretrain.main(options(preset, tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 161}, "sequence_length=161.*max_position_embeddings=160"),
        ({"save_steps": 5}, "save_steps=5.*multiple of `logging_steps=2"),
        ({"logging_nan_inf_filter": True}, "would hide a NaN"),
        ({"learning_rat": "1e-3"}, "learning_rat"),
    ],
)
def test_impossible_arguments_are_refused(preset, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain.main(options(preset, tmp_path, **changes))


def test_a_checkpoint_is_a_start_for_other_data(whole_run, tmp_path):
    """Plain text, the tokenizer of the checkpoint, and no problem to score."""
    (tmp_path / "data").mkdir()
    for split, count in (("train", 40), ("test", 7)):
        rows = [json.dumps({"text": f"{split} has a line with the number {n}."}) for n in range(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(rows))
    output = tmp_path / "run"
    pretrain.main(options(whole_run, output, dataset=tmp_path / "data", max_steps=4))
    facts = json.loads((output / "facts.json").read_text())
    assert facts["share_solved"] is None and facts["scored_problems"] == 0
    assert (output / "tokenizer.json").read_bytes() == (whole_run / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_was_saved_after_it_padded_does_not_make_a_resumed_run_another_one(whole_run, tmp_path):
    """The first leg switched the padding off by tokenizing, the second found the tokens in the cache of `datasets`."""
    base = tmp_path / "base"
    shutil.copytree(whole_run, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer(["2+2?", "3"], padding=True)
    tokenizer.save_pretrained(base)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"a line with the number {n}."}) + "\n" for n in range(30)))
    for steps in (4, 8):
        changes = {"dataset": data, "validation_size": 5, "scored_problems": 0, "max_steps": steps}
        pretrain.main(options(base, tmp_path / "run", **changes))
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["resumed_from"] == "checkpoint-4"

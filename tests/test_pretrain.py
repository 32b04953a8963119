# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The pretraining script: killed and resumed runs, equivalent runs, and runs that must stop with a clear error."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pretrain
import pytest
import torch
from arguments import DataArguments, ModelArguments, PretrainArguments, parse
from checkpoints import checkpoints, newest_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_coe import CoEConfig


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
    noise = ("runtime", "per_second", "memory")
    rows = [json.loads(line) for line in (output / "loss_curve.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not any(word in key for word in noise)} for row in rows]


@pytest.fixture(scope="module")
def whole_run(preset, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    pretrain.main(options(preset, output))
    return output


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
    assert facts["versions"]["torch"] == torch.__version__ and facts["scored_problems"] == 5
    assert len(json.loads((whole_run / "samples.json").read_text())) == 5
    assert (whole_run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_held_out_loss_is_the_mean_over_all_held_out_tokens(whole_run, preset):
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


# One process that imports everything once and lets its children be killed, each at the place its parent names.
KILLED_RUNS = """
import os, signal, sys
import pretrain, checkpoints
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
    print("killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else status, folders, flush=True)
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

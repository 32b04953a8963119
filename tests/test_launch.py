# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""One script under every accelerate file: two gloo ranks have the loss curve of one process, and survive a kill.

Runs start from one checkpoint, without auxiliary loss (a statistic of a micro-batch, and ranks have smaller ones).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import build, tokens

from modeling_coe import CoEForCausalLM


ROOT = Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "configuration/accelerate").glob("*.yaml"))
STEPS = 6
RECIPE = {
    "dataset": "word_problems",
    "train_problems": 200,
    "validation_problems": 12,
    "scored_problems": 4,
    "max_new_tokens": 4,
    "sequence_length": 128,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_steps": 3,
    "report_to": "none",
    "disable_tqdm": "true",
}
# The accelerate file, what its first line adds for eight ranks, and rows per rank: four rows a step in every layout.
LAYOUTS = {
    "DDP": (None, [], 2),
    "FSDP2": ("fsdp2", [], 2),
    "FSDP2 + EP": ("expert_parallel", ["--fsdp_size", "2", "--ep_size", "2"], 2),
    "TP": ("tensor_parallel", ["--tp_size", "2"], 4),
    "EP + TP": ("expert_parallel", ["--tp_size", "2", "--ep_size", "2"], 4),
    "ZeRO-3": ("deepspeed_zero3", [], 2),
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
layouts = [pytest.param(name, marks=needs_deepspeed if name == "ZeRO-3" else (), id=name) for name in LAYOUTS]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def command(launcher, start, output, rows, *options, script=("tests/gloo_ranks.py", "train/pretrain.py")):
    recipe = RECIPE | {"model": start, "output_dir": output, "per_device_train_batch_size": rows}
    arguments = [str(part) for name, value in recipe.items() for part in (f"--{name}", value)]
    return [*launcher, *script, *arguments, *options]


def torchrun(*options):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        free_port(),
        *options,
    ]


def accelerate(file):
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    return [*launcher, "--main_process_port", free_port(), "--config_file", f"configuration/accelerate/{file}.yaml"]


def start_process(arguments, log):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as file:
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def run(arguments, log):
    assert start_process(arguments, log).wait(timeout=800) == 0, Path(log).read_text()[-3000:]


def curve(output):
    rows = [json.loads(line) for line in (output / "loss_curve.jsonl").read_text().splitlines()]
    return {
        (row["step"], name): row[name] for row in rows for name in ("loss", "grad_norm", "eval_loss") if name in row
    }


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max(abs(found[key] - expected[key]) for key in expected)


def checkpoint(folder, **pools):
    """A checkpoint that runs start from."""
    preset, output = folder / "preset.json", folder / "run"
    sizes = {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, **pools}
    model = build(**sizes, intermediate_size=32, tie_word_embeddings=True, router_aux_loss_coef=0.0)
    preset.write_text(model.config.to_json_string())
    only_weights = ["--max_steps", "1", "--save_strategy", "no", "--use_cpu", "true"]
    run(
        command([sys.executable], preset, output, 1, *only_weights, script=["train/pretrain.py"]),
        output.with_suffix(".log"),
    )
    return output


def curve_of_one_process(start, output):
    alone = command([sys.executable], start, output, 4, "--use_cpu", "true", script=["train/pretrain.py"])
    run(alone, output.with_suffix(".log"))
    return curve(output)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def one_process(start, tmp_path_factory):
    return curve_of_one_process(start, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """A checkpoint whose layers share pools, and the loss curve of one process."""
    folder = tmp_path_factory.mktemp("pools")
    start = checkpoint(folder, num_hidden_layers=4, layers_per_pool=2)
    return start, curve_of_one_process(start, folder / "one")


@pytest.mark.parametrize("file", FILES)
def test_accelerate_files_have_only_keys_that_accelerate_knows(file):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / f"configuration/accelerate/{file}.yaml"
    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]
    first_line = path.read_text().splitlines()[0]
    assert first_line.startswith(f"# accelerate launch --config_file configuration/accelerate/{file}.yaml train/")


LEAST_MEMORY = """
import torch
from accelerate import PartialState
from modeling_coe.train.arguments import free_memory

rank = PartialState(cpu=True).process_index
torch.cuda.mem_get_info = lambda device: ((3 - rank) * 2**30, 4 * 2**30)
assert free_memory(torch.device("cuda")) == 2 * 2**30 - 2**29, rank
"""


def test_all_ranks_fit_their_batch_to_the_one_with_the_least_memory(tmp_path):
    script = tmp_path / "least_memory.py"
    script.write_text(LEAST_MEMORY)
    run([*torchrun(), str(script)], tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts)
def test_two_ranks_have_the_loss_curve_of_one_process(layout, start, one_process, tmp_path):
    file, options, rows = LAYOUTS[layout]
    if file is None:
        arguments = command(
            torchrun(), start, tmp_path / "run", rows, "--use_cpu", "true", script=["train/pretrain.py"]
        )
    else:
        arguments = command(accelerate(file), start, tmp_path / "run", rows, *options)
    run(arguments, tmp_path / "log")
    assert largest_difference(curve(tmp_path / "run"), one_process) <= 1e-5
    # The checkpoint is the usual one: whole safetensors, the model's own code, loadable by one process.
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_coe.CoEForCausalLM"
    assert (tmp_path / "run/modeling_coe.py").is_file()
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = [CoEForCausalLM.from_pretrained(path).eval()(ids).logits for path in (tmp_path / "run", start)]
    assert not torch.equal(*logits)


@pytest.mark.slow
def test_layers_that_share_a_pool_have_the_loss_curve_of_one_process(pools, tmp_path):
    file, options, rows = LAYOUTS["FSDP2"]
    start, expected = pools
    run(command(accelerate(file), start, tmp_path / "run", rows, *options), tmp_path / "log")
    assert largest_difference(curve(tmp_path / "run"), expected) <= 1e-5


@pytest.mark.slow
def test_fine_tuning_under_fsdp2_has_the_loss_curve_of_one_process(start, tmp_path):
    # It scores the checkpoint before it trains: a forward pass that must not leave the optimizer gathered weights.
    scores = ["--scored_problems", "2", "--eval_strategy", "no"]
    alone = command(
        [sys.executable], start, tmp_path / "one", 4, *scores, "--use_cpu", "true", script=["train/finetune.py"]
    )
    run(alone, tmp_path / "one.log")
    script = ("tests/gloo_ranks.py", "train/finetune.py")
    run(command(accelerate("fsdp2"), start, tmp_path / "two", 2, *scores, script=script), tmp_path / "two.log")
    assert largest_difference(curve(tmp_path / "two"), curve(tmp_path / "one")) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["FSDP2", "FSDP2 + EP"])
def test_a_run_whose_rank_was_killed_has_the_curve_of_an_uninterrupted_one(layout, start, tmp_path):
    # Not ZeRO-3: once restarted, DeepSpeed 0.19.8 could not connect a second gloo group (connection refused).
    file, options, rows = LAYOUTS[layout]
    longer = ["--max_steps", "24", *options]
    run(command(accelerate(file), start, tmp_path / "whole", rows, *longer), tmp_path / "whole.log")
    output = tmp_path / "killed"
    process = start_process(
        command([*accelerate(file), "--max_restarts", "1"], start, output, rows, *longer), tmp_path / "log"
    )
    victim = kill_one_rank(process, output)
    assert process.wait(timeout=800) == 0, (tmp_path / "log").read_text()[-3000:]
    assert not psutil.pid_exists(victim)
    facts = json.loads((output / "facts.json").read_text())
    assert facts["steps"] == 24 and facts["resumed_from"] is not None
    assert largest_difference(curve(output), curve(tmp_path / "whole")) == 0


def kill_one_rank(process, output):
    """SIGKILL rank 1 as soon as there is a checkpoint to continue from."""
    while not list(output.glob("checkpoint-*")):
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.02)
    ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("LOCAL_RANK") == "1"]
    os.kill(ranks[0].pid, signal.SIGKILL)
    return ranks[0].pid


@pytest.mark.slow
def test_two_nodes_have_the_loss_curve_of_one_process(start, one_process, tmp_path):
    port = free_port()
    nodes = []
    for node in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "two-nodes"]
        arguments = command([*launcher, *meeting], start, tmp_path / "run", 2, "--fsdp_size", "2", "--ep_size", "2")
        nodes.append(start_process(arguments, tmp_path / f"log{node}"))
    for node, process in enumerate(nodes):
        assert process.wait(timeout=800) == 0, (tmp_path / f"log{node}").read_text()[-3000:]
    assert largest_difference(curve(tmp_path / "run"), one_process) <= 1e-5

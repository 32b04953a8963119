# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for its reader: progress, `loss_curve.jsonl`, `loss_curve.png`, and the facts of its machine."""

import io
import json
import math
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging

from modeling_coe.folders import facts_of
from modeling_coe.modeling_coe import routed_tokens
from modeling_coe.routing import watched_choices
from modeling_coe.train.runs import write_json


matplotlib.use("Agg")
import matplotlib.pyplot as plt


CURVE = "loss_curve.jsonl"
# How the names of `routing_health`'s values begin in the metrics of an evaluation.
ROUTING_HEALTH = tuple(f"eval_{name}" for name in ("router_entropy", "dead", "load_", "pool_", "experts_per_token"))
ROUTED_INPUTS = ("input_ids", "attention_mask", "position_ids")


def keep_output_short():
    """What a person reads in the terminal is the run: no bars of files that load and save in a moment."""
    logging.disable_progress_bar()
    # PEFT (0.21) asks the model by the name that transformers (5.23) has deprecated.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


class Progress(ProgressCallback):
    """A bar with loss, tokens per second and memory; evaluations get a line of their own."""

    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            speed = f"{logs['train_tokens_per_second']:,.0f} tokens/s, " if "train_tokens_per_second" in logs else ""
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed}{peak_memory(args.device):.2f} GiB")
        elif "eval_loss" in logs:
            solved = f", solved {logs['eval_solved']:.1%}" if "eval_solved" in logs else ""
            self.training_bar.write(f"step {state.global_step}: {self.label} {logs['eval_loss']:.4f}{solved}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:  # not even begun: interrupted while loading a checkpoint
            super().on_train_end(args, state, control, **kwargs)


def show_progress(trainer: Trainer, label: str = "validation loss"):
    """Put `Progress` in the place of Trainer's own bar, unless bars are off; `label` says what `eval_loss` is."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(label))


class Curve(TrainerCallback):
    """Keeps `loss_curve.jsonl`; a resumed run first goes back to what its checkpoint had logged.

    Every row has `train_seconds`, those of all legs of the run together, with the steps that a kill undid.
    """

    before, start = 0.0, None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            last_leg = read_curve(Path(args.output_dir)) if state.log_history else []
            self.before = seconds_trained([*state.log_history, *last_leg])
            self.start = time.monotonic()
            self._write(args, state.log_history, "w")

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            if self.start is not None:
                seconds = self.before + time.monotonic() - self.start
                state.log_history[-1]["train_seconds"] = round(seconds, 1)
            self._write(args, state.log_history[-1:], "a")

    def _write(self, args, rows: list[dict], mode: str):
        with open(Path(args.output_dir) / CURVE, mode) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if "loss" in row or "eval_loss" in row)


def read_curve(folder: Path) -> list[dict]:
    """The rows of a run's `loss_curve.jsonl`, without a last one that a kill cut short; none if there is no file."""
    lines = (folder / CURVE).read_text().splitlines(keepends=True) if (folder / CURVE).is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def seconds_trained(rows: list[dict]) -> float:
    return max((row.get("train_seconds", 0.0) for row in rows), default=0.0)


class RoutingHealth:
    """For a `Trainer` subclass, in front of it: every evaluation sees all documents, and also logs how its first batch
    was routed."""

    def get_eval_dataloader(self, *args, **kwargs):
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(self, dataloader, *args, **kwargs):
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        # A dataloader left half-way would stay the active one of Accelerate.
        rows = [dataloader.dataset[row] for row in range(min(self.args.eval_batch_size, len(dataloader.dataset)))]
        batch = self._prepare_inputs(self.data_collator(rows))
        health = routing_health(self.model, batch)
        output.metrics.update({f"eval_{name}": value for name, value in health.items()})
        return output


@torch.no_grad()
def routing_health(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each iteration t, averaged over the layers, without padding:

    `router_entropy_t`, of a token's softmax, as a share of the log of its outputs; `dead_experts_t`, the share of
    experts that no token chose; `load_imbalance_t`, the busiest expert's load over the mean. With null experts also
    `experts_per_token_t`, how many experts a token computes. Where layers share pools also `dead_pool_experts`, the
    share that no token chose in any visit, and `pool_imbalance`.
    """
    config = model.config
    inputs = {name: batch[name] for name in ROUTED_INPUTS if name in batch}
    with watched_choices(model) as choices:
        logits = model(**inputs, use_cache=False, output_router_logits=True).router_logits
    is_token = routed_tokens(config, *(batch.get(name) for name in (*ROUTED_INPUTS, "labels")))
    keep = torch.ones_like(logits[0][:, 0], dtype=torch.bool) if is_token is None else is_token.reshape(-1).bool()
    chain, N = config.num_iterations, config.num_local_experts
    health, all_loads = {}, []
    for iteration in range(chain):
        probs = [layer[keep].softmax(-1) for layer in logits[iteration::chain]]
        chosen = [layer[keep].flatten().bincount(minlength=N + 1)[:N] for layer in choices[iteration::chain]]
        loads = torch.stack(chosen).float()
        all_loads.append(loads)
        outputs = math.log(max(N + config.num_null_experts, 2))
        entropy = torch.stack([torch.special.entr(layer).sum(-1).mean() for layer in probs]).mean() / outputs
        health |= {
            f"router_entropy_{iteration + 1}": round(entropy.item(), 4),
            f"dead_experts_{iteration + 1}": round(loads.eq(0).float().mean().item(), 4),
            f"load_imbalance_{iteration + 1}": round(_imbalance(loads), 3),
        }
        if config.num_null_experts > 0:
            mean = loads.sum(-1).mean() / keep.sum()
            health[f"experts_per_token_{iteration + 1}"] = round(mean.item(), 3)
    if config.layers_per_pool > 1:
        pools = torch.stack(all_loads).sum(0).unflatten(0, (-1, config.layers_per_pool)).sum(1)
        health["dead_pool_experts"] = round(pools.eq(0).float().mean().item(), 4)
        health["pool_imbalance"] = round(_imbalance(pools), 3)
    return health


def _imbalance(loads: torch.Tensor) -> float:
    """The busiest expert's load over the mean, of `[..., N]`; 0 where all tokens chose null experts."""
    return (loads.amax(-1) / loads.mean(-1).clamp(min=1 / loads.shape[-1])).mean().item()


def plot_curve(rows: list[dict], path: Path, title: str):
    """Training and validation loss over the training tokens, and the share of validation problems solved, as PNG."""
    train = [(row["num_input_tokens_seen"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["num_input_tokens_seen"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    solved = [(row["num_input_tokens_seen"], 100 * row["eval_solved"]) for row in rows if "eval_solved" in row]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        style = {"color": "#9ecae1", "linewidth": 1.5, "marker": "." if len(train) == 1 else None}
        axis.plot(*zip(*train, strict=True), **style, label="training loss")
    if validation:
        axis.plot(*zip(*validation, strict=True), "o-", color="#08519c", markersize=4, label="validation loss")
    axis.set(xlabel="training tokens", ylabel="loss (nats per token)", title=title, xlim=(0, None))
    losses = [loss for _, loss in (*train, *validation)]
    if losses and min(losses) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)))
        axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=" "))
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    lines = axis.get_lines()
    if solved:
        share = axis.twinx()
        style = {"color": "#d94801", "markersize": 4, "clip_on": False, "label": "validation problems solved"}
        share.plot(*zip(*solved, strict=True), "s--", **style)
        share.set(ylabel="solved (%)", ylim=(0, 100))
        share.spines["top"].set_visible(False)
        lines = [*lines, *share.get_lines()]
    labels = [line.get_label() for line in lines]
    if lines:
        figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=len(lines))
    save_picture(figure, path)


def save_picture(figure: plt.Figure, path: Path):
    """PNG with a palette of 32 colours, a quarter of the usual size; closes the figure."""
    with io.BytesIO() as file:
        figure.savefig(file, dpi=110)
        Image.open(file).convert("RGB").quantize(32).save(path, optimize=True)
    plt.close(figure)


def draw(plot: Callable, *arguments):
    """`plot(*arguments)`; a picture that cannot be drawn costs itself and nothing else."""
    try:
        plot(*arguments)
    except Exception as error:  # matplotlib has no common ancestor for what it raises
        print(f"No picture from {plot.__name__}: {error}")


def peak_memory(device: torch.device) -> float:
    """GiB: the most this process held, of the accelerator if there is one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes of torch's allocator in use during `step`, beyond those in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def environment(device: torch.device) -> dict:
    """Device, versions of what is installed, and commit, for the record of a result; None outside a git checkout."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "trl")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} (CPU)",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names if find_spec(name)},
        "commit": _commit(),
    }


def facts_of_training(output: Path, steps: int) -> dict:
    """Of a finished run that was only scored again: what its facts.json says of the training, if it is of these steps.

    When, where and with which versions it trained stays on record, not where it was looked at.
    """
    facts = facts_of(str(output)) or {}
    names = ("train_seconds", "resumed_from", "peak_memory_gib", "device", "threads", "python", "versions", "commit")
    return {name: facts[name] for name in names if facts.get("steps") == steps}


def facts_of_run(trainer: Trainer, checkpoint: Path | None, has_trained: bool) -> dict:
    """How far a run came, in what time, from which checkpoint, on which machine.

    Those of its training if this process only scored it again.
    """
    facts = {
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "train_seconds": seconds_trained(trainer.state.log_history),
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "peak_memory_gib": round(peak_memory(trainer.args.device), 3),
        "learning_rate": trainer.args.learning_rate,
        "seed": trainer.args.seed,
        **environment(trainer.args.device),
    }
    return facts if has_trained else facts | facts_of_training(Path(trainer.args.output_dir), facts["steps"])


def save_model(trainer: Trainer, has_trained: bool):
    """The final model; the facts of other weights, which a run had that was prolonged, go before it comes."""
    if has_trained and trainer.is_world_process_zero():
        (Path(trainer.args.output_dir) / "facts.json").unlink(missing_ok=True)
    trainer.save_model()


def write_results(trainer: Trainer, facts: dict, answers: list[dict], title: str):
    """samples.json and facts.json, and then the picture of the loss, which may fail."""
    output = Path(trainer.args.output_dir)
    write_json(output / "samples.json", answers)
    write_json(output / "facts.json", facts)
    draw(plot_curve, trainer.state.log_history, output / "loss_curve.png", f"{output.name}: {title}")


def print_result(facts: dict, output: Path):
    """The result in three lines; facts.json has all of it."""
    share = facts["share_solved"]
    solved = "" if share is None else f"; {share:.1%} of {facts['scored_problems']} validation problems solved"
    memory = f"{facts['peak_memory_gib']:.2f} GiB"
    print(f"\n{facts['steps']} steps, {facts['tokens']:,} tokens, {facts['train_seconds']:.0f} s, {memory}")
    answers = "" if facts.get("answer_loss") is None else f" (of the answers {_change(facts, 'answer_loss')})"
    print(f"validation loss {_change(facts, 'validation_loss')}{answers}{solved}")
    print(f"model, facts.json and samples.json in {output}; picture of the loss: {output / 'loss_curve.png'}")


def _change(facts: dict, name: str) -> str:
    before = facts[f"{name}_before"]
    return ("" if before is None else f"{before:.4f} before, now ") + f"{facts[name]:.4f}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed package may lie inside someone else's checkout.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        return subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

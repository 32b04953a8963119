# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete or not there, and the record of a run that a resumed one must match.

A checkpoint is written to `.partial/checkpoint-N`, flushed to disk, listed with the size of each file, and only then
renamed to `checkpoint-N`. Whatever kills the process, a folder called `checkpoint-N` was whole when it got its name.
"""

import json
import math
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerState
from transformers.distributed import load_optimizer_distributed, save_optimizer_distributed
from transformers.trainer import SCHEDULER_NAME


PARTIAL = ".partial"
MANIFEST = "files.json"
RECORD = "run.json"
OPTIMIZER = "optimizer"


class AtomicCheckpoints:
    """For a `Trainer` subclass, in front of it: `class Mine(AtomicCheckpoints, Trainer)`.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; nothing after the last good checkpoint is saved.
        OSError: a checkpoint could not be written, for instance on a full disk; earlier ones are untouched.
    """

    _is_saving = False

    def train(self, *args, **kwargs):
        with self._interruptible():
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        with self._interruptible():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _interruptible(self):
        try:
            yield
        except KeyboardInterrupt:
            if self.is_world_process_zero():
                start = newest_checkpoint(Path(self.args.output_dir)) or "the start, there is no checkpoint yet"
                step = self.state.global_step
                print(f"\nInterrupted at step {step}. The same command continues from {start}.", file=sys.stderr)
            raise SystemExit(130) from None

    def _issue_warnings_after_load(self, load_result):
        # Private in Trainer (5.23), which reports the second name of a tied weight as missing from the file.
        tied = self.model.all_tied_weights_keys
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def log(self, logs: dict[str, float], start_time: float | None = None):
        # fp16's loss scaler meets infinite gradients as a matter of course and skips those updates.
        watched = ("loss", "eval_loss") if self.args.fp16 else ("loss", "grad_norm", "eval_loss")
        bad = {name: logs[name] for name in watched if name in logs and not math.isfinite(logs[name])}
        if bad:
            good = newest_checkpoint(Path(self.args.output_dir))
            raise FloatingPointError(
                f"{bad} at step {self.state.global_step}: training stops. The last good checkpoint is {good}; lower "
                "`learning_rate`, or look at the data of the last steps."
            )
        super().log(logs, start_time)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._is_saving else folder

    def _save_checkpoint(self, model, trial):
        folder, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                complete(folder, name, self.args.save_total_limit)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(
                f"Could not write {folder / name} ({free:.0f} MiB free): {error}. Make room or choose another "
                f"`output_dir`; the same command then continues from {newest_checkpoint(folder) or 'the start'}."
            ) from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()


class ShardedCheckpoints:
    """For a `Trainer` subclass, between `AtomicCheckpoints` and `Trainer`: a model sharded at load time resumes too.

    Trainer (5.23) cannot save the optimizer of `from_pretrained(distributed_config=...)`, and refuses. Here each
    rank writes its part with torch's distributed checkpoint, which any number of ranks can read. The weights are the
    usual safetensors; whoever resumes builds the model from them.
    """

    def __init__(self, *args, **kwargs):
        self.is_sharded_at_load = any(isinstance(weight, DTensor) for weight in kwargs["model"].parameters())
        wanted = kwargs["args"].save_only_model
        kwargs["args"].save_only_model = wanted or self.is_sharded_at_load
        super().__init__(*args, **kwargs)
        self.args.save_only_model = wanted

    def create_optimizer(self, *args, **kwargs):
        # A forward pass before training leaves the last weights gathered; the optimizer has to hold the shards.
        if self.is_sharded_at_load:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return super().create_optimizer(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        if not self.is_sharded_at_load:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer_distributed(self.model, self.optimizer, os.path.join(output_dir, OPTIMIZER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        if not self.is_sharded_at_load:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        if not self.is_sharded_at_load or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer_distributed(self.model, self.optimizer, os.path.join(checkpoint, OPTIMIZER))
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))


def train(trainer: Trainer, checkpoint: Path | None) -> bool:
    """Train to the end, from the checkpoint if there is one; False if that is the end, and was only loaded."""
    if checkpoint is None:
        trainer.train()
        return True
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    arguments = trainer.args
    by_steps = arguments.max_steps > 0
    if state.global_step < arguments.max_steps if by_steps else state.epoch < arguments.num_train_epochs:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return True
    # Trainer (5.23) would go on for one more step.
    trainer.state = state
    trainer._load_from_checkpoint(str(checkpoint))
    return False


def complete(folder: Path, name: str, keep: int | None):
    """Flush and rename `.partial/name` to `name`, then drop all but the newest `keep` checkpoints."""
    partial = folder / PARTIAL / name
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    write_json(partial / MANIFEST, {str(path.relative_to(partial)): path.stat().st_size for path in files})
    for path in [*files, *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        flush(path)
    discard(folder / name)
    os.replace(partial, folder / name)
    flush(folder)
    if keep is not None and keep > 0:
        for path in checkpoints(folder)[:-keep]:
            discard(path)
    shutil.rmtree(folder / PARTIAL)


def flush(path: Path):
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path):
    """Remove a checkpoint that may exist; it loses its name first, so a half-removed one is never found."""
    if path.exists():
        condemned = path.parent / PARTIAL / f"discarded-{path.name}"
        condemned.parent.mkdir(exist_ok=True)
        os.replace(path, condemned)
        shutil.rmtree(condemned)


def checkpoints(folder: Path) -> list[Path]:
    """The folders called `checkpoint-N`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files all have their recorded size; warns of the damaged ones it passes over."""
    for path in reversed(checkpoints(folder)):
        manifest = path / MANIFEST
        sizes = json.loads(manifest.read_text()) if manifest.is_file() else {}
        damaged = [name for name, size in sizes.items() if not _has_size(path / name, size)]
        if sizes and not damaged:
            return path
        warnings.warn(
            f"{path} is incomplete ({', '.join(damaged) or MANIFEST}) and is not resumed from.", stacklevel=2
        )
    return None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def prepare_output(folder: Path):
    """Create `folder`, show that it takes files, and remove what a killed run left half-written.

    Raises:
        OSError: the folder cannot be created or written.
    """
    try:
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        (folder / PARTIAL).mkdir(parents=True)
        (folder / PARTIAL / "probe").write_text("probe")
        shutil.rmtree(folder / PARTIAL)
    except OSError as error:
        raise OSError(f"Cannot write to `output_dir={folder}`: {error}. Choose a folder you can write to.") from error


def match_record(folder: Path, record: dict, is_resumed: bool):
    """Keep `record` in the folder; if the run is a resumed one, it must be the record already there.

    Raises:
        ValueError: naming the first field that differs.
    """
    path = folder / RECORD
    if is_resumed and path.is_file():
        before, now = _flatten(json.loads(path.read_text())), _flatten(json.loads(json.dumps(record)))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{folder} holds a run with `{key}={before.get(key)!r}`, this one has `{now.get(key)!r}`. Restore "
                    "the value to continue that run, or choose another `output_dir` for a new one."
                )
    else:
        write_json(path, record)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def write_json(path: Path, content):
    """Write JSON, short lists and objects on one line; a reader sees the old file or the new one, never half of it."""
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", _one_line, json.dumps(content, indent=2))
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text + "\n")
    flush(temporary)
    os.replace(temporary, path)


def _one_line(innermost: re.Match) -> str:
    line = re.sub(r"\n *", " ", innermost[0])
    return line if len(line) < 200 else innermost[0]

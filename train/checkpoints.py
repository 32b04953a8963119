# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete or not there.

A checkpoint is written to `.partial/checkpoint-N`, flushed to disk, listed with the digest of each file, and only then
renamed to `checkpoint-N`. Whatever kills the process, a folder called `checkpoint-N` was whole when it got its name.
"""

import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerState
from transformers.distributed import load_optimizer_distributed, save_optimizer_distributed
from transformers.trainer import SCHEDULER_NAME

from modeling_coe.train.runs import PARTIAL, digest, flush, read_json, write_json


MANIFEST = "files.json"
OPTIMIZER = "optimizer"


class AtomicCheckpoints:
    """For a `Trainer` subclass, in front of it: `class Mine(AtomicCheckpoints, Trainer)`.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; nothing after the last good checkpoint is saved.
        OSError: a checkpoint could not be written, for instance on a full disk; earlier ones are untouched.
    """

    _is_saving = False
    _sum_of_losses = 0.0

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        warmup = self.args.get_warmup_steps(num_training_steps)
        decay = (self.args.lr_scheduler_kwargs or {}).get("num_decay_steps") or 0
        if warmup + decay > num_training_steps:
            warnings.warn(
                f"`warmup_steps={warmup}`{f' and `num_decay_steps={decay}`' if decay else ''} are more than the "
                f"{num_training_steps} steps of this run: the learning rate does not go through its schedule.",
                stacklevel=2,
            )
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        # A sum on the device shows at the next save that one of them was not finite, without waiting for each.
        self._sum_of_losses = self._sum_of_losses + loss.detach()
        return loss

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
            if self.is_in_train:
                self.callback_handler.on_train_end(self.args, self.state, self.control)  # closes the bar
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
        if bad := {name: logs[name] for name in watched if name in logs and not math.isfinite(logs[name])}:
            self._stop(str(bad))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        losses = torch.as_tensor(self._sum_of_losses, device=self.args.device).float()
        bad = ["loss"] if not losses.isfinite() else []
        for name, weight in self.model.named_parameters():
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            if weight.requires_grad and not local.isfinite().all():
                bad.append(name)
        # A rank may hold a part of the weights; all of them stop together.
        if self.accelerator.reduce(torch.tensor(float(len(bad)), device=self.args.device)) > 0:
            self._stop(f"not finite: {', '.join(bad[:3]) or 'a loss or weights of another rank'}")
        folder = Path(output_dir or self.args.output_dir)
        with nullcontext() if self._is_saving else self._writing(folder):
            super().save_model(output_dir, _internal_call)

    def _stop(self, reason: str):
        good = newest_checkpoint(Path(self.args.output_dir))
        raise FloatingPointError(
            f"{reason} at step {self.state.global_step}: training stops. The last good checkpoint is {good}; lower "
            "`learning_rate`, or look at the data of the last steps."
        )

    @contextmanager
    def _writing(self, target: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = Path(self.args.output_dir)
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(
                f"Could not write {target} ({free:.0f} MiB free): {error}. Make room or choose another "
                f"`output_dir`; the same command then continues from {newest_checkpoint(folder) or 'the start'}."
            ) from error

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._is_saving else folder

    def _save_checkpoint(self, model, trial):
        folder, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        self._is_saving = True
        try:
            with self._writing(folder / name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    complete(folder, name, self.args.save_total_limit)
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()


class ShardedCheckpoints:
    """For a `Trainer` subclass, between `AtomicCheckpoints` and `Trainer`: a model sharded at load time resumes too.

    Trainer (5.23) cannot save the optimizer of `from_pretrained(distributed_config=...)`, and refuses. Here each
    rank writes its part with torch's distributed checkpoint, which any number of ranks can read. The weights are the
    usual safetensors; whoever resumes builds the model from them. And an evaluation counts every row once.
    """

    def __init__(self, *args, **kwargs):
        self.is_sharded_at_load = any(isinstance(weight, DTensor) for weight in kwargs["model"].parameters())
        wanted = kwargs["args"].save_only_model
        kwargs["args"].save_only_model = wanted or self.is_sharded_at_load
        super().__init__(*args, **kwargs)
        self.args.save_only_model = wanted

    def evaluation_loop(self, *args, **kwargs):
        self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)

    def _gather_once(self, rows: torch.Tensor) -> torch.Tensor:
        """`Accelerator.gather_for_metrics` (1.15), without the copies of the ranks that share matrices and rows."""
        mesh, state = self.accelerator.torch_device_mesh, self.accelerator.gradient_state
        copies = mesh["tp"].size() if mesh is not None and "tp" in mesh.mesh_dim_names else 1
        gathered = self.accelerator.gather(rows)
        if copies > 1:
            gathered = gathered.unflatten(0, (self.args.world_size, -1))[::copies].flatten(0, 1)
        return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered

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


def train_from(trainer: Trainer, checkpoint: Path | None) -> bool:
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
    write_json(partial / MANIFEST, {str(path.relative_to(partial)): digest(path) for path in files})
    for path in [*files, *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        flush(path)
    discard(folder / name)
    os.replace(partial, folder / name)
    flush(folder)
    if keep is not None and keep > 0:
        for path in checkpoints(folder)[:-keep]:
            discard(path)
    shutil.rmtree(folder / PARTIAL)


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


def checkpoint_to_resume(folder: Path, wanted: str | None) -> Path | None:
    """The checkpoint that a run in `folder` continues from: the `wanted` one, or the newest.

    All processes get what the main one found.

    Raises:
        ValueError: no whole checkpoint of this folder is called `wanted`.
    """
    found = [None]
    if PartialState().is_main_process:
        found = [newest_checkpoint(folder) if wanted is None else Path(wanted)]
        if wanted is not None and found[0].resolve() not in [path.resolve() for path in checkpoints(folder)]:
            names = ", ".join(path.name for path in checkpoints(folder)) or "none"
            raise ValueError(
                f"`resume_from_checkpoint={wanted}` is no checkpoint of `output_dir={folder}`, which has {names}; "
                "leave it out to continue from the newest, or to start."
            )
        if wanted is not None and (damaged := damaged_files(found[0])):
            raise ValueError(f"`resume_from_checkpoint={wanted}` is damaged: {', '.join(damaged)}; leave it out.")
    return broadcast_object_list(found)[0]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; warns of the damaged ones it passes over."""
    for path in reversed(checkpoints(folder)):
        if not (damaged := damaged_files(path)):
            return path
        warnings.warn(
            f"{path} is incomplete ({', '.join(damaged)}): not as written. The run continues from an older one.",
            stacklevel=2,
        )
    return None


def damaged_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that are not as they were written; the list of them, if that is damaged itself."""
    try:
        written = read_json(checkpoint / MANIFEST)
    except (OSError, ValueError):
        return [MANIFEST]
    if not isinstance(written, dict) or not written:
        return [MANIFEST]
    files = {name: checkpoint / name for name in written}
    return [name for name, path in files.items() if not path.is_file() or digest(path) != written[name]]

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The folder that a script writes to: one process at a time, nothing of anybody else's, and the record of its run.

with run_folder(output, model, dataset):  # or result_folder(...), for a script that writes no model
    match_record(output, record)          # the run in this folder is the one that goes on
"""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from modeling_coe.folders import read_object


PARTIAL = ".partial"
LOCK = ".lock"
RECORD = "run.json"
BEFORE = "before.json"
PARTS = 64
# What a killed run of ours leaves: these names, and nothing that a link leads to.
HALF_WRITTEN = re.compile(r"(discarded-)?checkpoint-\d+")
HALF_WRITTEN_JSON = tuple(f".{name}.json.partial" for name in ("before", "facts", "routing", "run", "samples"))


@contextmanager
def run_folder(folder: Path, model: str, dataset: str = "") -> Iterator[None]:
    """Hold `folder` for a training run that starts from `model`; leftovers of a killed one are named and removed.

    Raises:
        ValueError: the folder holds something else than a run, lies around or inside the model it would start from,
            or inside the folder of its documents.
        OSError: the folder cannot be created or written, or another process has it.
    """
    source, target = Path(model).resolve(), folder.resolve()
    is_above, is_inside = source.is_relative_to(target), target.is_relative_to(source)
    if source.is_dir() and (is_above or is_inside):
        raise ValueError(
            f"`output_dir={folder}` {'is or holds' if is_above else 'is inside'} `model={model}`, and a run needs a "
            "folder of its own; choose another one."
        )
    _refuse_data_folder(folder, dataset)
    ours = (PARTIAL, LOCK, *HALF_WRITTEN_JSON)
    others = [path.name for path in folder.glob("*") if path.name not in ours] if folder.is_dir() else []
    if others and not _is_record(folder / RECORD):
        names = ", ".join(sorted(others)[:3])
        raise ValueError(
            f"`output_dir={folder}` holds {names}{', ...' if len(others) > 3 else ''} and no {RECORD}: it is no run "
            f"of this script. Please choose a new or empty folder; to continue a run, restore its {RECORD}."
        )
    with _held(folder):
        yield


@contextmanager
def result_folder(folder: Path, written: tuple[str, ...], dataset: str = "") -> Iterator[None]:
    """Hold `folder` for the results of a script that writes no model, but the files `written`.

    Raises:
        ValueError: the folder holds a model, whose facts would be overwritten, or files of these names that are no
            earlier results: the first, which is written first, is JSON that says with which `versions`. Or it lies in
            the folder of the documents.
        OSError: as `run_folder`.
    """
    _refuse_data_folder(folder, dataset)
    in_the_way = [name for name in written if (folder / name).exists()]
    if in_the_way and "versions" not in read_object(folder / written[0]):
        raise ValueError(
            f"`output_dir={folder}` holds {', '.join(in_the_way)}, which no earlier run of this script wrote and this "
            "one would overwrite; choose another folder."
        )
    for name in (RECORD, "config.json", "adapter_config.json"):
        if (folder / name).is_file():
            raise ValueError(
                f"`output_dir={folder}` holds a model ({name}), whose facts would be overwritten; choose another "
                f"folder, for instance {folder / 'evaluation'}."
            )
    with _held(folder):
        yield


def _refuse_data_folder(folder: Path, dataset: str):
    """What is written into a folder of documents would be read with them the next time."""
    if (
        dataset not in ("", "word_problems")
        and Path(dataset).is_dir()
        and folder.resolve().is_relative_to(Path(dataset).resolve())
    ):
        raise ValueError(
            f"`output_dir={folder}` is or is inside `dataset={dataset}`, and its files would be read as documents the "
            "next time; choose another folder."
        )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    is_ours = not folder.exists() or (folder / LOCK).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder)
    except OSError as error:
        raise OSError(f"Cannot write to `output_dir={folder}`: {error}. Choose a folder you can write to.") from error
    try:
        # Whoever wrote these is dead, or it would hold the lock.
        for path in _left_half_written(folder):
            print(f"Removing {path}, which a killed run left half-written.")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if (folder / PARTIAL).is_dir():
            (folder / PARTIAL).rmdir()
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        if is_ours and not any(folder.iterdir()):
            folder.rmdir()


def _left_half_written(folder: Path) -> list[Path]:
    """What a killed run left in its folder.

    Raises:
        OSError: `.partial` is a link, or holds what no run writes there.
    """
    partial = folder / PARTIAL
    inside = sorted(partial.glob("*")) if partial.is_dir() else []
    strange = [path for path in inside if path.is_symlink() or not HALF_WRITTEN.fullmatch(path.name)]
    if partial.is_symlink() or strange or (partial.exists() and not partial.is_dir()):
        raise OSError(f"{(strange or [partial])[0]} is not of this project and stands in the way; move it away.")
    files = [folder / name for name in HALF_WRITTEN_JSON]
    return [*inside, *(path for path in files if path.is_file() and not path.is_symlink())]


def _is_record(path: Path) -> bool:
    """Whether the file is a run's record; a damaged one is, and is named when it is read."""
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return isinstance(record, dict) and {"data", "training"} <= record.keys()


def _lock(folder: Path) -> int:
    """The descriptor of the lock file, locked. The system frees it when the process ends, however that comes about.

    Raises:
        BlockingIOError: another process has it; what that wrote into the file says which.
    """
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            # Unlike those of flock, these locks do not live on in forked workers that outlast a killed run.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                warnings.warn(f"{folder} cannot be locked ({error}): start no second run in it.", stacklevel=4)
                return descriptor
            owner = os.read(descriptor, 1000).decode() or "another process"
            os.close(descriptor)
            raise BlockingIOError(f"{owner} is writing there; wait for it, or end it") from None
        if path.is_file() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # the owner removed the file between our two calls
    if os.read(descriptor, 8) not in (b"", b"process "):
        os.close(descriptor)
        raise OSError(f"{path} is not of this project and stands in the way; move it away")
    os.truncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    started = datetime.now().strftime("%Y-%m-%d %H:%M")
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}, since {started},".encode())
    return descriptor


def match_record(folder: Path, record: dict):
    """Keep `record` in the folder; where checkpoints or a model are, it must be the record of their run.

    Raises:
        ValueError: naming the first field that differs, or the documents that changed.
    """
    path = folder / RECORD
    if path.is_file() and (any(folder.glob("checkpoint-*")) or any(folder.glob("*.safetensors"))):
        before, now = _flatten(read_json(path)), _flatten(json.loads(json.dumps(record)))
        for key in [*now, *(before.keys() - now.keys())]:
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{folder} holds a run with {_difference(key, before.get(key), now.get(key), now)}. Restore it to "
                    "continue that run, or choose another `output_dir` for a new one."
                )
    else:
        write_json(path, record)


def _difference(key: str, before, now, record: dict) -> str:
    name, _, field = key.rpartition(".")
    if field == "rows":
        return f"`{name}={before} documents`, this one has `{now}`"
    if field != "parts" or not isinstance(before, list):
        return f"`{key}={before!r}`, this one has `{now!r}`"
    changed = [index for index, pair in enumerate(itertools.zip_longest(before, now)) if pair[0] != pair[1]]
    rows = record[f"{name}.rows"]
    first, last = rows * changed[0] // PARTS + 1, rows * (changed[0] + 1) // PARTS
    return f"`{name}={rows} documents`, of which others are here, the first between number {first} and {last}"


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# Of the training arguments, those that the trajectory of a run depends on; how long it lasts is not among them.
RECORDED = (
    "adam_beta1 adam_beta2 adam_epsilon assistant_only_loss bf16 completion_only_loss data_seed dataloader_drop_last "
    "fp16 gradient_accumulation_steps label_smoothing_factor learning_rate loss_type lr_scheduler_kwargs "
    "lr_scheduler_type max_grad_norm max_length neftune_noise_alpha optim optim_args packing packing_strategy "
    "per_device_train_batch_size pool_learning_rate_factor router_bias_rate seed warmup_steps weight_decay"
).split()
# Those that earlier records do not have: recorded where they are not what they were for these.
RECORDED_IF_SET = {
    "auto_find_batch_size": False,
    "eos_token": None,
    "padding_free": False,
    "router_aux_loss_coef": None,
    "shuffle_dataset": False,
    "train_sampling_strategy": "random",
    "truncation_mode": "keep_start",
}


def record_of(
    model: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    training: TrainingArguments,
    documents: Dataset,
    **settings,
) -> dict:
    """What the trajectory of a run depends on, except how long it lasts."""
    volatile = ("transformers_version", "_name_or_path")
    arguments = training.to_dict() | {"world_size": training.world_size}
    is_set = [name for name, default in RECORDED_IF_SET.items() if arguments.get(name, default) != default]
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return {
        "data": {"columns": documents.column_names, **_digests(documents)},
        "tokenizer": hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest(),
        "model": {name: value for name, value in config.to_dict().items() if name not in volatile},
        "weights": weights_of(model),
        "training": {name: arguments[name] for name in [*RECORDED, "world_size", *is_set] if name in arguments},
        **settings,
    }


def keep_scores(folder: Path, documents: Dataset, settings: dict, scores: dict | None) -> dict | None:
    """What a model scored before its training, for the legs of its run that cannot score it any more.

    `scores` is kept in the folder. None asks for what an earlier leg kept there of the same documents and settings,
    and is the answer if there is no such thing.
    """
    path, of = folder / BEFORE, {"documents": _digests(documents), **settings}
    if scores is not None:
        write_json(path, {"of": of, "scores": scores})
    elif path.is_file() and (kept := read_json(path))["of"] == of:
        return kept["scores"]
    return scores


def weights_of(model: str) -> str | None:
    """The digest of the weights in a folder, the name of a model on the Hub, None for a preset."""
    files = sorted(Path(model).glob("*.safetensors"))
    if Path(model).exists():
        return hashlib.blake2b("".join(map(digest, files)).encode()).hexdigest()[:32] if files else None
    return model


def digest(path: Path) -> str:
    """Of a file's content. One core reads a GiB in about a second: a small part of what it costs to write it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digests(rows: Dataset) -> dict:
    """One digest for each of `PARTS` equal parts, so that a change can be found."""
    parts = []
    for part in range(PARTS):
        span = rows.select(range(len(rows) * part // PARTS, len(rows) * (part + 1) // PARTS))
        state = hashlib.blake2b(digest_size=8)
        for batch in span.iter(1000):
            state.update(json.dumps(batch).encode())
        parts.append(state.hexdigest())
    return {"rows": len(rows), "parts": parts}


def read_json(path: Path):
    """What a JSON file holds.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it holds no JSON: {error}. Restore it, or remove it.") from error


def write_json(path: Path, content):
    """Write JSON, short lists and objects on one line; a reader sees the old file or the new one, never half of it."""
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", _one_line, json.dumps(content, indent=1))
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text + "\n")
    flush(temporary)
    os.replace(temporary, path)


def _one_line(innermost: re.Match) -> str:
    # A line break is never part of a string, which has it escaped; a space or a bracket may be.
    line = re.sub(r"(?<=^.)\n *|\n *(?=.$)", "", innermost[0])
    line = re.sub(r"\n *", " ", line)
    return line if len(line) < 500 else innermost[0]


def flush(path: Path):
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

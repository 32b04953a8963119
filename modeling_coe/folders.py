# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Folders that are named at once when they are not there, appear whole or not at all, and replace only their own kind.

A folder is written under the hidden name `.<name>.incomplete` beside its final place, together with a lock and the
process id of its writer. `written.json` in the finished folder lists its files: only a folder that still holds exactly
these is ever replaced.
"""

import difflib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING
from transformers.utils import find_adapter_config_file, logging


logger = logging.get_logger(__name__)

WRITTEN = "written.json"
# What a model is read from beside its weights, and the keys that transformers and PEFT expect there.
JSON_FILES = {
    "config.json": (),
    "generation_config.json": (),
    "tokenizer_config.json": (),
    "tokenizer.json": ("added_tokens", "model"),
    "model.safetensors.index.json": ("weight_map",),
    "adapter_config.json": ("peft_type", "base_model_name_or_path"),
}


def require_model(option: str, name: str | os.PathLike, file: str = "config.json", *, adapters: tuple[Path, ...] = ()):
    """Fails at once where `name` is no model: nothing of this machine or the Hub, or a folder with damaged files.

    `file` is the one that such a repository usually has, and that is asked for; `adapters` are the folders that were
    read on the way to this base model.

    Raises:
        ValueError: naming the option, its value and the nearest name there is, or the damaged file.
    """
    name = os.fspath(name)
    path = Path(name)
    if not name:
        raise ValueError(f"`{option}` is empty; name a folder or a repository of the Hub.")
    if path.exists():
        _require_readable(option, path, file, adapters)
        return
    suggestion = _suggestion(path)
    if path.suffix == ".json" or name.startswith((".", "~")) or not _may_be_on_the_hub(name):
        raise ValueError(f"`{option}={name}`: no such folder or file.{suggestion}")
    # An adapter has no configuration of a model, and a tokenizer may have none of its own.
    known = (file, "adapter_config.json", "tokenizer.json")
    if any(isinstance(try_to_load_from_cache(name, one), str) for one in known):
        return
    try:
        # One question. What transformers asks is repeated for half a minute where there is no network.
        get_hf_file_metadata(hf_hub_url(name, file), timeout=5)
    except RemoteEntryNotFoundError:
        return  # the repository is there, and transformers says what it needs of it
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"`{option}={name}`: no such folder, and the Hub gives no model of that name ({reason}).{suggestion}"
        ) from error


def refuse_adapter(option: str, name: str | os.PathLike):
    """Fails where a folder or a repository of the Hub holds an adapter, which its weights alone do not tell of.

    Raises:
        ValueError: naming the option, its value and how to merge.
    """
    if find_adapter_config_file(os.fspath(name)):
        raise ValueError(
            f"`{option}={name}` holds an adapter; merge it first: move its files (adapter_config.json, "
            "adapter_model.safetensors) into a folder of their own, and `AutoPeftModelForCausalLM.from_pretrained("
            "that_folder).merge_and_unload().save_pretrained(another)`."
        )


def _require_readable(option: str, path: Path, file: str, adapters: tuple[Path, ...]):
    """Raise ValueError where the JSON files would end the loading in an error that names none of them."""
    if path.is_file():
        if path.suffix != ".json":
            raise ValueError(f"`{option}={path}` is a file; name the folder that it is in.")
        _check_config(path, _read_object(path))
        return
    if file == "config.json" and not any((path / name).is_file() for name in (file, "adapter_config.json")):
        raise ValueError(
            f"`{option}={path}` holds no model: neither config.json nor adapter_config.json; name the folder of one."
        )
    contents = {name: _read_object(path / name, *keys) for name, keys in JSON_FILES.items() if (path / name).is_file()}
    if "config.json" in contents:
        _check_config(path / "config.json", contents["config.json"])
    if "generation_config.json" in contents:
        _check_token_ids(path / "generation_config.json", contents["generation_config.json"])
    if "adapter_config.json" in contents:
        base, adapters = contents["adapter_config.json"]["base_model_name_or_path"], (*adapters, path.resolve())
        # An adapter may lie in the folder of its base.
        if base and Path(base).resolve() in adapters:
            return
        try:
            require_model("base_model_name_or_path", base or "", adapters=adapters)
        except ValueError as error:
            raise ValueError(f"{path / 'adapter_config.json'}: {error} An adapter needs its base model.") from error


def _read_object(path: Path, *keys: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it holds no JSON: {error}. Download or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is damaged: it holds {content!r:.60}, no names and values. Download or save it again."
        )
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{path} is damaged: it lacks `{missing[0]}`. Download or save it again.")
    return content


def _check_config(path: Path, content: dict):
    """Build the configuration once, if its type is known here: transformers does not say which file is wrong."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return
    try:
        CONFIG_MAPPING[kind].from_dict(content)
    except (StrictDataclassError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason}. Correct it, or download or save it again.") from error


def _check_token_ids(path: Path, content: dict):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(name)
        ids = value if isinstance(value, list) else [value]
        if not all(one is None or isinstance(one, int) for one in ids):
            raise ValueError(f"`{name}={value!r}` in {path} must be the number of a token; correct it.")


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _suggestion(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir() if sibling.exists()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, siblings, n=1)
    return f" Did you mean {path.with_name(nearest[0])}?" if nearest else ""


def facts_of(model: str) -> dict | None:
    """What a model's folder says it was made of; None for a preset, a Hub id or a folder that says nothing.

    Raises:
        ValueError: its facts.json is damaged.
    """
    path = Path(model) / "facts.json"
    if not model or not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or remove it to go on without.") from error


@contextmanager
def whole_or_nothing(output: Path, overwrite: bool = False, **about) -> Iterator[Path]:
    """A folder to fill, which takes the name `output` if the block ends well and is removed if it does not.

    A killed process leaves `.<name>.incomplete`, which the next one names and removes. If it was killed between the
    two renames that replace `output`, the next one first puts the old folder back.

    Raises:
        FileExistsError: `output` exists and may not be replaced, or another process is writing it.
        OSError: it could not be written, for instance on a full disk.
    """
    output = output.resolve()
    with _alone(output) as hidden:
        new, old = hidden / "new", hidden / "old"
        check_replaceable(output, overwrite)
        try:
            new.mkdir()
            yield new
            _list_files(new, about)
            if output.exists():
                output.rename(old)
            new.rename(output)
            if old.exists():
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(hidden).free / 2**20
            raise OSError(f"{output} was not written ({free:,.0f} MiB free on its disk): {error}") from error


def check_replaceable(output: Path, overwrite: bool):
    """Raises FileExistsError unless `output` is free, or may be replaced and holds what was written there, no more."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"`output={output}` is a file; name a folder.")
    if not overwrite:
        raise FileExistsError(f"`output={output}` exists; choose another folder or pass `overwrite=True`.")
    if any(output.iterdir()) and (others := changes_since_written(output)):
        raise FileExistsError(
            f"`output={output}` is not replaced: {others[0]}. Move the folder away, or choose another one."
        )


def changes_since_written(folder: Path) -> list[str]:
    """What tells a folder from the one that was written there: files that came, went or changed; empty for none."""
    listed, found = written_files(folder), _files_of(folder)
    if listed is None:
        return [f"it holds no {WRITTEN}, so it was not written by this command"]
    changes = [(found.keys() - listed.keys(), "was added to it"), (listed.keys() - found.keys(), "is gone from it")]
    changes.append(({name for name in found.keys() & listed.keys() if found[name] != listed[name]}, "was changed"))
    return [f"{name} {change}" for names, change in changes for name in sorted(names)]


def written_about(folder: Path) -> dict:
    """What `written.json` says of a folder; empty where there is none, or a damaged one."""
    return read_object(folder / WRITTEN)


def read_object(path: Path) -> dict:
    """A JSON object; empty if the file holds none, or is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def written_files(folder: Path) -> dict[str, list[int]] | None:
    """The files that were written into a folder, with size and time; None where it does not say."""
    files = written_about(folder).get("files")
    return files if isinstance(files, dict) else None


def _files_of(folder: Path) -> dict[str, list[int]]:
    """Everything but folders and the list itself. A link is what it is, not what it points to."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    status = {path.relative_to(folder).as_posix(): path.lstat() for path in paths if path != folder / WRITTEN}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in sorted(status.items())}


def _list_files(folder: Path, about: dict):
    """Wait until all files are on disk, and list them, with what else is to be known; the list comes last."""
    for path in filter(Path.is_file, folder.rglob("*")):
        _flush(path)
    listed = folder / WRITTEN
    listed.write_text(json.dumps({**about, "files": _files_of(folder)}, indent=2) + "\n", encoding="utf-8")
    _flush(listed)


def _flush(path: Path):
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _alone(output: Path) -> Iterator[Path]:
    """The hidden folder of the only process that writes `output`; its lock dies with that process."""
    hidden = output.with_name(f".{output.name}.incomplete")
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        if strangers := sorted({path.name for path in hidden.iterdir()} - {"lock", "pid", "new", "old"}):
            raise FileExistsError(f"{hidden} holds {strangers[0]}, which is not of this project; move it away")
        folders = [path for path in (hidden / "new", hidden / "old") if path.exists() or path.is_symlink()]
        if links := [path for path in (hidden, *folders) if path.is_symlink() or not path.is_dir()]:
            raise FileExistsError(f"{links[0]} is a link or a file, which is not of this project; move it away")
        lock, writer = FileLock(hidden / "lock"), hidden / "pid"
        lock.acquire(blocking=False)
        writer.write_text(str(os.getpid()))
    except Timeout as error:
        raise FileExistsError(
            f"Process {writer.read_text() if writer.exists() else '?'} is writing `output={output}`; wait for it, or "
            "choose another folder."
        ) from error
    except OSError as error:
        raise OSError(f"`output={output}` cannot be written: {error}.") from error
    if (hidden / "old").exists() and output.exists() and changes_since_written(output):
        lock.release()
        raise FileExistsError(
            f"{hidden / 'old'} is what `output={output}` was before a killed run, and another folder has that name "
            "now; move one of them away."
        )
    try:
        _clear(hidden, output)
        yield hidden
    finally:
        _clear(hidden, output)
        shutil.rmtree(hidden)
        lock.release()


def _clear(hidden: Path, output: Path):
    """Put back a folder that was to be replaced and is not, and remove what else is left."""
    new, old = hidden / "new", hidden / "old"
    if old.exists() and not output.exists():
        logger.warning(f"{output} was about to be replaced when its replacement stopped; it is put back.")
        old.rename(output)
    for path in filter(Path.exists, (new, old)):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20
        logger.warning(f"Removing the unfinished {path} ({size:,.1f} MiB).")
        shutil.rmtree(path)

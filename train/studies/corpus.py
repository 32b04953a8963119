# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A corpus on which the number of experts counts: the Python sources of the packages that constraints.txt pins.

    python train/studies/corpus.py --output runs/corpus

Needs no network and gives the same documents wherever the same versions are installed. Writes train.parquet,
validation.parquet (other files of the same packages), test.parquet (packages that training never sees), a tokenizer
trained on the training files, and corpus.json with the counts and a hash of all documents, which every result quotes.
"""

import hashlib
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from datasets import Dataset, DatasetDict

from modeling_coe.train.arguments import parse
from modeling_coe.train.checkpoints import write_json
from modeling_coe.train.data import load_tokenizer


ROOT = Path(__file__).parents[2]
# Every package of `pip install ".[train]"` with at least 1.5 MB of Python, and the few that are kept for the test.
TRAINED_ON = (
    "transformers torch sympy pandas numpy matplotlib fonttools huggingface_hub peft pyarrow datasets setuptools "
    "tensorboard mpmath accelerate"
).split()
HELD_OUT = ("networkx", "trl")
# Written by the build, so they differ between two wheels of one version.
GENERATED = {"version.py", "_version.py", "__config__.py", "_build_config.py"}
# Longer files are tables of data, shorter ones are empty `__init__.py`s.
SHORTEST, LONGEST = 200, 200_000
VALIDATION_SHARE = 0.02


@dataclass
class CorpusArguments:
    """Where the corpus goes, and how many tokens its vocabulary has."""

    output: str = field(default="runs/corpus", metadata={"help": "Folder for the splits, tokenizer and corpus.json."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the byte-level BPE."})


def main(arguments: list[str] | None = None):
    (options,) = parse(CorpusArguments, arguments=arguments, description=__doc__)
    output = Path(options.output)
    pins = read_pins(ROOT / "constraints.txt")
    splits = collect(pins, TRAINED_ON, HELD_OUT)
    output.mkdir(parents=True, exist_ok=True)
    for name, documents in splits.items():
        documents.to_parquet(output / f"{name}.parquet")
    tokenizer = load_tokenizer(None, splits["train"].select_columns("text"), options.vocab_size)
    tokenizer.save_pretrained(output / "tokenizer")
    record = describe(splits, pins) | {"vocab_size": len(tokenizer)}
    write_json(output / "corpus.json", record)
    print(f"{output}: {record['files']} files, {record['characters']} characters, hash {record['hash']}")


def read_pins(constraints: Path) -> dict[str, str]:
    """`name==version` lines as a dict."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def collect(pins: dict[str, str], trained_on: list[str], held_out: tuple[str, ...]) -> DatasetDict:
    """The splits `train`, `validation` and `test`, columns `text`, `package` and `path`, in an order fixed by hashes.

    The first n documents of a split are therefore a random sample of it, the same everywhere.

    Raises:
        ValueError: a package that is not installed, or in another version than the pinned one.
    """
    seen, rows = set(), {"train": [], "validation": [], "test": []}
    for package in (*trained_on, *held_out):
        for path, text in sources(package, pins):
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            place = hashlib.sha256(f"{package}/{path}".encode()).hexdigest()
            chosen = int(place[:8], 16) / 16**8 < VALIDATION_SHARE
            split = "test" if package in held_out else "validation" if chosen else "train"
            rows[split].append((place, {"text": text, "package": package, "path": path}))
    return DatasetDict({name: Dataset.from_list([row for _, row in sorted(found)]) for name, found in rows.items()})


def sources(package: str, pins: dict[str, str]) -> list[tuple[str, str]]:
    """Path and text of the package's Python files, sorted by path."""
    try:
        installed = distribution(package)
    except PackageNotFoundError as error:
        raise ValueError(f"`{package}` is not installed; the corpus needs `pip install '.[train]'`.") from error
    if installed.version.partition("+")[0] != pins[package]:
        raise ValueError(
            f"`{package}` is installed in version {installed.version}, constraints.txt pins {pins[package]}: the "
            "corpus would be another one. Install with `--constraint constraints.txt`."
        )
    files = {}
    for file in installed.files:
        if file.suffix == ".py" and file.name not in GENERATED and ".." not in file.parts:
            text = file.locate().read_bytes().decode("utf-8", errors="replace")
            if SHORTEST <= len(text) <= LONGEST:
                files[file.as_posix()] = text
    return sorted(files.items())


def describe(splits: DatasetDict, pins: dict[str, str]) -> dict:
    """Counts of every split and one hash over all documents in their order."""
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        for row in splits[name]:
            digest.update(f"{name}\0{row['package']}\0{row['path']}\0{row['text']}\0".encode())
    return {
        "hash": digest.hexdigest()[:16],
        "packages": {name: pins[name] for name in TRAINED_ON},
        "held_out_packages": {name: pins[name] for name in HELD_OUT},
        "files": {name: len(rows) for name, rows in splits.items()},
        "characters": {name: sum(map(len, rows["text"])) for name, rows in splits.items()},
    }


if __name__ == "__main__":
    main()

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Worked maths word problems without end: a question, its steps and `#### answer`, the layout of GSM8K.

Nothing is stored: the same arguments give the same problems on every machine. A problem is a short story about a
running total; its *plan* is the story without names, objects and verbs. A hash of the plan decides the split, so no
plan of a validation problem is ever in training, whatever the seeds, sizes and levels.

    python train/word_problems.py          # prints one problem of each level
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass


NAMES = "Ada Ben Carla Dina Emil Fatma Goran Hana Ivan Jing Kofi Lena Mia Noor Otto Priya Rosa Sami Tom Uma".split()
OBJECTS = "apples books cards coins eggs marbles pens plums shells stamps stickers stones".split()
EVENTS = {
    "+": ("{name} buys {n} more.", "{name} finds {n} more.", "A friend gives {name} {n} more."),
    "-": ("{name} gives away {n}.", "{name} loses {n}.", "{name} sells {n}."),
    "*": ("Soon {name} has {n} times as many.", "Then the number grows to {n} times as many."),
    "/": ("{name} shares them equally in {n} boxes and keeps one box.", "{name} keeps only one part out of {n}."),
}


@dataclass(frozen=True)
class Level:
    """The operations of a problem, how many steps it takes, and the largest number that occurs in it."""

    operations: str
    steps: tuple[int, int]
    largest: int


LEVELS = {
    # One digit, so that nothing is carried; no single step, whose few plans a model would remember one by one.
    1: Level("+-", (2, 3), 9),
    2: Level("+-*/", (1, 3), 20),
    3: Level("+-*/", (2, 4), 100),
    4: Level("+-*/", (3, 6), 1000),
}

Plan = tuple[int, tuple[tuple[str, int], ...]]


def word_problems(split: str, count: int, level: int = 1, seed: int = 0) -> Iterator[dict[str, str]]:
    """`count` problems of the split `"train"` or `"validation"`, each a dict with `question` and `answer`.

    Questions may repeat in training once a level's supply is short; those of the validation split are all different.

    Raises:
        ValueError: an unknown level, or more validation problems than there are.
    """
    if level not in LEVELS:
        raise ValueError(f"`level={level}` is unknown; choose one of {sorted(LEVELS)}.")
    rng = random.Random(f"{split}/{level}/{seed}")
    seen: set[str] = set()
    draws_in_vain = 0
    while count > 0:
        plan = draw_plan(rng, LEVELS[level])
        problem = tell(plan, rng)
        if split_of(plan) != split or problem["question"] in seen:
            draws_in_vain += 1
            if draws_in_vain > 10_000:
                raise ValueError(f"Level {level} has hardly more than {len(seen)} {split} problems; ask for fewer.")
            continue
        draws_in_vain = 0
        if split == "validation":
            seen.add(problem["question"])
        count -= 1
        yield problem


def split_of(plan: Plan) -> str:
    """`"validation"` for one plan in ten, by hash; `"train"` for the others."""
    return "validation" if hashlib.sha256(repr(plan).encode()).digest()[0] < 26 else "train"


def draw_plan(rng: random.Random, level: Level) -> Plan:
    """The first number and the (operation, number) of each step; every total is an integer in [1, largest]."""
    start = total = rng.randint(2, level.largest)
    steps = []
    for _ in range(rng.randint(*level.steps)):
        choices = {
            "+": range(1, level.largest - total + 1),
            "-": range(1, total),
            "*": range(2, min(9, level.largest // total) + 1),
            "/": [n for n in range(2, 10) if total % n == 0 and n < total],
        }
        operation = rng.choice([operation for operation in level.operations if choices[operation]])
        number = rng.choice(choices[operation])
        total = apply(operation, total, number)
        steps.append((operation, number))
    return start, tuple(steps)


def apply(operation: str, total: int, number: int) -> int:
    return {"+": total + number, "-": total - number, "*": total * number, "/": total // number}[operation]


def tell(plan: Plan, rng: random.Random) -> dict[str, str]:
    """The plan in words, and its solution step by step."""
    total, steps = plan
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    sentences, lines = [f"{name} has {total} {thing}."], []
    for operation, number in steps:
        sentences.append(rng.choice(EVENTS[operation]).format(name=name, n=number))
        result = apply(operation, total, number)
        lines.append(f"{total}{operation}{number}={result}")
        total = result
    sentences.append(f"How many {thing} does {name} have now?")
    return {"question": " ".join(sentences), "answer": "\n".join([*lines, f"#### {total}"])}


if __name__ == "__main__":
    for level in LEVELS:
        problem = next(word_problems("train", 1, level))
        print(f"level {level}\n{problem['question']}\n{problem['answer']}\n")

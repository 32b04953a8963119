# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Word problems of all four levels in one data set, in which some tokens are harder than others:

python train/studies/mixed_problems.py --output runs/problems
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from modeling_coe.train.arguments import parse
from modeling_coe.train.word_problems import LEVELS, word_problems


PROBLEMS = {"train": 5000, "validation": 50}


@dataclass
class MixedArguments:
    """Where the data set goes."""

    output: str = field(default="runs/problems", metadata={"help": "Folder for train.parquet and validation.parquet."})


def main(arguments: list[str] | None = None):
    (options,) = parse(MixedArguments, arguments=arguments, description=__doc__)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    for split, count in PROBLEMS.items():
        problems = [problem for level in LEVELS for problem in word_problems(split, count, level)]
        random.Random(0).shuffle(problems)
        Dataset.from_list(problems).to_parquet(output / f"{split}.parquet")


if __name__ == "__main__":
    main()

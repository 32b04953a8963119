# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Made-up tasks for reproduce.py: two need several steps of reasoning on facts in the weights, one needs room for
facts, one needs neither.

    python train/studies/tasks.py --task hops --output runs/hops

hops    two hops over facts in the weights: `e7 r1 r3 #### e22`. Some facts are only ever seen alone, and the questions
        of the validation join two of those: out of distribution (Wang et al., arXiv 2405.15071).
mano    arithmetic modulo 23 in one go, `+ * 3 5 7 #### 22`: three tables in the weights, several look-ups (Mano of
        Physics of Language Models, part 4.1).
capo    records of people who do not exist, `f3 l9 v4 v71 v8 v2 v60`: knowledge to store, nothing to infer. The
        validation records are training records, so its loss says how many bits are stored (Capo, part 3.3).
recall  values of keys in the context, `k5 v1 k2 v9 k2 v9 k5 #### v1`: attention alone can do it (MQAR, arXiv
        2312.04927).

Writes train.parquet, validation.parquet, a tokenizer of whole words, and corpus.json with a hash, which every result
quotes. The same on every machine, for the seed is fixed.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_coe.train.arguments import parse
from modeling_coe.train.checkpoints import write_json


Document = dict[str, str]
Splits = dict[str, list[Document]]
SPECIALS = ("<pad>", "<bos>", "<eos>")


@dataclass
class TaskArguments:
    """Which task, and where it goes."""

    task: str = field(default="hops", metadata={"help": "`hops`, `mano`, `capo` or `recall`."})
    output: str = field(default="runs/hops", metadata={"help": "Folder for the splits, tokenizer and corpus.json."})

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"`task={self.task}` is unknown; choose one of {list(TASKS)}.")


def main(arguments: list[str] | None = None):
    (options,) = parse(TaskArguments, arguments=arguments, description=__doc__)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    splits = TASKS[options.task](random.Random(0))
    for name, documents in splits.items():
        Dataset.from_list(documents).to_parquet(output / f"{name}.parquet")
    tokenizer = words_as_tokens(splits["train"])
    tokenizer.save_pretrained(output / "tokenizer")
    record = {"task": options.task, "hash": hash_of(splits), "vocab_size": len(tokenizer)}
    write_json(output / "corpus.json", record | {"documents": {name: len(rows) for name, rows in splits.items()}})
    print(f"{output}: {len(splits['train'])} documents, {len(tokenizer)} words, hash {record['hash']}")


def question(*words, answer) -> Document:
    return {"prompt": " ".join(map(str, words)), "completion": f" #### {answer}"}


def hops(draw: random.Random, entities: int = 50, relations: int = 10, seen_alone: float = 0.2) -> Splits:
    """Training: every fact, and all two hops over the facts that are not `seen_alone`. Validation: two hops over two
    facts that are."""
    facts = {key: draw.randrange(entities) for key in product(range(entities), range(relations))}
    alone = set(draw.sample(sorted(facts), round(seen_alone * len(facts))))
    train = [question(f"e{start}", f"r{first}", answer=f"e{end}") for (start, first), end in facts.items()]
    validation = []
    for (start, first), second in product(facts, range(relations)):
        bridge = (facts[start, first], second)
        document = question(f"e{start}", f"r{first}", f"r{second}", answer=f"e{facts[bridge]}")
        number_alone = ((start, first) in alone) + (bridge in alone)
        if number_alone != 1:
            (validation if number_alone else train).append(document)
    draw.shuffle(train)
    draw.shuffle(validation)
    return {"train": train, "validation": validation}


def mano(
    draw: random.Random, operations: int = 3, train: int = 400_000, validation: int = 500, modulus: int = 23
) -> Splits:
    """Expressions in prefix notation of one to `operations` operations; in the validation split of the most, and none
    that is in training."""
    unseen = [expression(draw, operations, modulus) for _ in range(validation)]
    kept = {words for words, _ in unseen}
    seen = (expression(draw, draw.randint(1, operations), modulus) for _ in range(train))
    return {
        "train": [question(words, answer=value) for words, value in seen if words not in kept],
        "validation": [question(words, answer=value) for words, value in unseen],
    }


def expression(draw: random.Random, operations: int, modulus: int) -> tuple[str, int]:
    """Words of an expression and its value by the modulus."""
    if operations == 0:
        value = draw.randrange(modulus)
        return str(value), value
    left = draw.randrange(operations)
    words, a = expression(draw, left, modulus)
    others, b = expression(draw, operations - 1 - left, modulus)
    sign = draw.choice("+-*")
    return f"{sign} {words} {others}", {"+": a + b, "-": a - b, "*": a * b}[sign] % modulus


def capo(draw: random.Random, people: int = 10_000, attributes: int = 5, values: int = 128) -> Splits:
    """Every person's record; the validation split has a tenth of the same records."""
    side = math.isqrt(2 * people)

    def record(name: int) -> Document:
        words = [f"f{name // side}", f"l{name % side}", *(f"v{draw.randrange(values)}" for _ in range(attributes))]
        return {"text": " ".join(words)}

    records = [record(name) for name in draw.sample(range(side * side), people)]
    return {"train": records, "validation": records[: people // 10]}


def stored_bits(validation_loss: float, people: int = 10_000, attributes: int = 5, values: int = 128) -> float:
    """Bits about the people of `capo` that a model with this loss holds, at least: as if it knew which names occur.

    A record has its words and its end as targets: who knows no value spends ln(people) + attributes * ln(values) nats
    on it.
    """
    spent = (2 + attributes + 1) * validation_loss
    return people * (math.log(people) + attributes * math.log(values) - spent) / math.log(2)


def recall(
    draw: random.Random, pairs: int = 8, words: int = 64, train: int = 150_000, validation: int = 500
) -> Splits:
    """Pairs of keys and values, then every key once more, in another order, with its value."""

    def document() -> Document:
        values = {key: draw.randrange(words) for key in draw.sample(range(words), pairs)}
        said = list(values.items())
        asked = draw.sample(said, pairs)
        shown = [word for key, value in said + asked[:-1] for word in (f"k{key}", f"v{value}")]
        return question(*shown, f"k{asked[-1][0]}", answer=f"v{asked[-1][1]}")

    return {"train": [document() for _ in range(train)], "validation": [document() for _ in range(validation)]}


TASKS = {"hops": hops, "mano": mano, "capo": capo, "recall": recall}


def texts(documents: list[Document]) -> Iterator[str]:
    return ("".join(document.values()) for document in documents)


def words_as_tokens(documents: list[Document]) -> PreTrainedTokenizerFast:
    """A word between two spaces is a token; `<bos>` starts what is encoded."""
    words = sorted({word for text in texts(documents) for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def hash_of(splits: Splits) -> str:
    digest = hashlib.sha256()
    for name, documents in splits.items():
        for text in texts(documents):
            digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The made-up tasks: right answers, the same everywhere, and a validation that asks what it says it asks."""

import json
import math
import random

import pytest
import torch
from transformers import AutoTokenizer

from modeling_coe.train.arguments import DataArguments
from modeling_coe.train.data import collate, final_answer, load_documents, pack
from modeling_coe.train.studies import tasks


SMALL = {
    "hops": {"entities": 12, "relations": 4},
    "mano": {"train": 300, "validation": 20},
    "capo": {"people": 60},
    "recall": {"train": 50, "validation": 10},
}


def draw(task):
    return tasks.TASKS[task](random.Random(0), **SMALL[task])


def test_a_two_hop_question_of_the_validation_joins_facts_that_are_seen_alone_and_no_other_is_left_out():
    splits = draw("hops")
    facts, joined = {}, {}
    for document in splits["train"]:
        words = tuple(document["prompt"].split())
        (facts if len(words) == 2 else joined)[words] = final_answer(document["completion"])
    assert len(facts) == 12 * 4
    used = set()
    for (start, first, second), end in joined.items():
        assert facts[facts[start, first], second] == end
        used |= {(start, first), (facts[start, first], second)}
    alone = facts.keys() - used
    assert len(alone) == round(0.2 * len(facts)) and splits["validation"]
    for document in splits["validation"]:
        start, first, second = document["prompt"].split()
        bridge = facts[start, first]
        assert {(start, first), (bridge, second)} <= alone
        assert facts[bridge, second] == final_answer(document["completion"])


def value(words):
    word = next(words)
    if word not in "+-*":
        return int(word)
    left, right = value(words), value(words)
    return {"+": left + right, "-": left - right, "*": left * right}[word]


def test_an_expression_has_the_value_of_its_answer_and_none_of_the_validation_is_in_training():
    splits = draw("mano")
    for document in splits["train"] + splits["validation"]:
        assert value(iter(document["prompt"].split())) % 23 == int(final_answer(document["completion"]))
    lengths = {split: {len(row["prompt"].split()) for row in rows} for split, rows in splits.items()}
    assert lengths == {"train": {3, 5, 7}, "validation": {7}}
    seen = {row["prompt"] for row in tasks.mano(random.Random(0), 1, 20_000, 300)["train"]}
    assert seen.isdisjoint(row["prompt"] for row in tasks.mano(random.Random(0), 1, 20_000, 300)["validation"])
    assert len(seen) > 700  # of 3 * 23 * 23, less those kept


def test_a_key_s_value_is_in_its_context():
    orders = set()
    for document in draw("recall")["train"]:
        words = document["prompt"].split()
        shown = dict(zip(words[:16:2], words[1:16:2], strict=True))
        again = dict(zip(words[16:-1:2], words[17:-1:2], strict=True))
        assert len(shown) == 8 and again.items() < shown.items() and words[-1] not in again
        assert shown[words[-1]] == final_answer(document["completion"])
        orders.add(tuple([*shown].index(key) for key in [*again, words[-1]]))
    assert len(orders) == 50  # another one in every context


def test_a_person_has_one_record_and_the_validation_is_a_part_of_them():
    splits = draw("capo")
    names = [tuple(row["text"].split()[:2]) for row in splits["train"]]
    assert len(set(names)) == 60 and splits["validation"] == splits["train"][:6]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_task_is_the_same_whenever_it_is_made(task):
    assert draw(task) == draw(task)


def test_bits_are_none_for_who_knows_the_names_alone_and_all_for_who_knows_the_values():
    people, values = 10_000, 128
    nothing = (math.log(people) + 5 * math.log(values)) / 8
    assert tasks.stored_bits(nothing) == pytest.approx(0, abs=1e-6)
    assert tasks.stored_bits(math.log(people) / 8) == pytest.approx(people * 5 * 7)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_word_is_a_token_and_a_document_comes_back_from_its_tokens(task, tmp_path, monkeypatch):
    splits, seed = draw(task), random.Random(0).getstate()
    monkeypatch.setitem(tasks.TASKS, task, lambda draw: splits if draw.getstate() == seed else None)
    for folder in (tmp_path, tmp_path / "again"):
        tasks.main(["--task", task, "--output", str(folder)])
    record = json.loads((tmp_path / "corpus.json").read_text())
    assert record == json.loads((tmp_path / "again" / "corpus.json").read_text())
    assert record["hash"] == tasks.hash_of(splits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert record["vocab_size"] == len(tokenizer)
    documents = load_documents(DataArguments(dataset=str(tmp_path)))
    rows = pack(documents["train"], tokenizer, 128)
    batch = collate([rows[0]], tokenizer.pad_token_id)
    first = batch["input_ids"][0, : rows[0]["seq_lengths"][0]]
    assert first[0] == tokenizer.bos_token_id and first[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in torch.tensor(rows[0]["input_ids"])
    wanted = {"".join(document.values()) for document in splits["train"]}
    assert tokenizer.decode(first[1:-1]) in wanted


def test_a_hash_knows_where_a_document_and_a_split_end():
    def hash_of(**splits):
        return tasks.hash_of({name: [{"text": text} for text in texts] for name, texts in splits.items()})

    others = [
        {"train": ["ab", "c"], "validation": []},
        {"train": ["abc"], "validation": []},
        {"train": ["a"], "validation": ["bc"]},
    ]
    assert hash_of(train=["a", "bc"], validation=[]) not in [hash_of(**other) for other in others]


def test_an_unknown_task_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`task=hop` is unknown; choose one of \['hops'"):
        tasks.main(["--task", "hop", "--output", str(tmp_path)])

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The corpus of the studies: the same documents everywhere, none twice, and packages that training never sees."""

from importlib.metadata import version

import pytest

from modeling_coe.train.studies import corpus


PINS = {name: version(name) for name in ("safetensors", "tqdm")}


@pytest.fixture(scope="module")
def splits():
    return corpus.collect(PINS, ["tqdm"], ("safetensors",))


def test_no_document_is_in_two_splits_or_twice_in_one(splits):
    texts = [text for rows in splits.values() for text in rows["text"]]
    assert len(texts) == len(set(texts)) > 20


def test_the_same_packages_give_the_same_hash_and_another_document_another(splits, monkeypatch):
    monkeypatch.setattr(corpus, "TRAINED_ON", ["tqdm"])
    monkeypatch.setattr(corpus, "HELD_OUT", ("safetensors",))
    again = corpus.collect(PINS, ["tqdm"], ("safetensors",))
    assert corpus.describe(again, PINS)["hash"] == corpus.describe(splits, PINS)["hash"]
    again["train"] = again["train"].select(range(1, len(again["train"])))
    assert corpus.describe(again, PINS)["hash"] != corpus.describe(splits, PINS)["hash"]


def test_a_held_out_package_is_in_the_test_split_alone(splits):
    assert set(splits["test"]["package"]) == {"safetensors"}
    assert set(splits["train"]["package"]) == {"tqdm"}


def test_another_version_than_the_pinned_one_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`tqdm` is installed in version .*, constraints\.txt pins 0\.1"):
        corpus.collect({"tqdm": "0.1"}, ["tqdm"], ())
    with pytest.raises(ValueError, match="`no-such-package` is not installed"):
        corpus.collect({}, ["no-such-package"], ())


def test_every_package_of_the_corpus_is_pinned():
    assert {*corpus.TRAINED_ON, *corpus.HELD_OUT} <= corpus.read_pins(corpus.ROOT / "constraints.txt").keys()

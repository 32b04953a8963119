# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The generated problems, the documents of every source, packing, and the scoring of answers."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import processors

from modeling_coe import CoEConfig, CoEForCausalLM
from modeling_coe.train.arguments import DataArguments
from modeling_coe.train.data import (
    as_problems,
    collate,
    final_answer,
    load_documents,
    load_tokenizer,
    pack,
    share_solved,
    solve,
)
from modeling_coe.train.word_problems import LEVELS, Level, word_problems


@pytest.fixture(scope="module")
def documents():
    return load_documents(DataArguments(train_problems=300, validation_problems=23), seed=3)


@pytest.fixture(scope="module")
def tokenizer(documents):
    return load_tokenizer(None, documents["train"], 320)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = CoEConfig(
        vocab_size=320, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_local_experts=5, num_experts_per_tok=2, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return CoEForCausalLM(config).eval()


def read_story(question: str) -> int:
    """The answer of a generated question from its words alone."""
    first, *events, _ = re.split(r"(?<=[.?]) ", question)
    total = int(re.search(r"\d+", first)[0])
    for event in events:
        number = int(re.search(r"\d+", event)[0])
        if "times as many" in event:
            total *= number
        elif "one box" in event or "one part" in event:
            assert total % number == 0
            total //= number
        elif re.search("buys|finds|gives .* more", event):
            total += number
        elif re.search("gives away|loses|sells", event):
            total -= number
        else:
            raise AssertionError(f"unknown event {event!r}")
    return total


@pytest.mark.parametrize("level", LEVELS)
def test_answers_follow_from_the_words_of_the_question(level):
    for problem in word_problems("train", 400, level, seed=level):
        *steps, last = problem["answer"].split("\n")
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert last == f"#### {read_story(problem['question'])}"
        assert LEVELS[level].steps[0] <= len(steps) <= LEVELS[level].steps[1]


def plan(problem: dict) -> tuple:
    """What a problem computes, names and objects left out; read from the text, not from the generator."""
    return problem["question"].split()[2], tuple(re.findall(r"[-+*/]\d+", problem["answer"]))


def test_no_computation_of_the_validation_problems_occurs_in_training_at_any_seed_or_level():
    train = {plan(p) for level in LEVELS for seed in (0, 1) for p in word_problems("train", 2000, level, seed)}
    unseen = [plan(p) for level in LEVELS for seed in (0, 1) for p in word_problems("validation", 300, level, seed)]
    assert len(set(unseen)) > 500
    assert not train.intersection(unseen)


def test_problems_depend_on_split_level_and_seed_alone():
    first = list(word_problems("train", 50, 2, seed=7))
    assert first == list(word_problems("train", 80, 2, seed=7))[:50]
    assert first != list(word_problems("train", 50, 2, seed=8))
    questions = [problem["question"] for problem in word_problems("validation", 700)]
    assert len(set(questions)) == 700


def test_too_many_different_problems_and_unknown_levels_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"level=9.*choose one of"):
        next(word_problems("train", 1, level=9))
    monkeypatch.setitem(LEVELS, 1, Level("+-", (1, 1), 3))
    with pytest.raises(ValueError, match=r"ask for fewer"):
        list(word_problems("validation", 10**6))


ROWS = [{"question": f"What is {n} + {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(9)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_folder_is_read_by_its_file_names_and_gives_prompts_and_completions(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:6])
    write(tmp_path / "test.jsonl", ROWS[6:])
    (tmp_path / "LICENSE").write_text("no data")
    loaded = load_documents(DataArguments(dataset=str(tmp_path)))
    assert len(loaded["train"]) == 6
    assert loaded["validation"][0] == {
        "prompt": "Question: What is 6 + 6?\nAnswer:",
        "completion": " 6+6=12\n#### 12",
    }


def test_parquet_text_and_renamed_columns_are_read(tmp_path):
    Dataset.from_list([{"body": f"line {n}"} for n in range(10)]).to_parquet(tmp_path / "all.parquet")
    arguments = DataArguments(dataset=str(tmp_path / "all.parquet"), text_column="body", validation_size=3)
    loaded = load_documents(arguments, seed=1)
    assert loaded["train"].column_names == ["text"] and len(loaded["validation"]) == 3
    texts = loaded["train"]["text"][:] + loaded["validation"]["text"][:]
    assert sorted(texts) == [f"line {n}" for n in range(10)]
    assert loaded["validation"]["text"][:] == load_documents(arguments, seed=1)["validation"]["text"][:]


def test_bad_datasets_are_refused_with_the_remedy(tmp_path):
    only_train = write(tmp_path / "a" / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"validation_size=None.*set it"):
        load_documents(DataArguments(dataset=only_train))
    with pytest.raises(ValueError, match=r"columns.*'question', 'answer'.*text_column"):
        load_documents(DataArguments(dataset=only_train, validation_size=2, answer_column="reply"))
    holes = write(tmp_path / "b" / "train.jsonl", [*ROWS, {"question": "And?", "answer": ""}])
    with pytest.raises(ValueError, match=r"holds ''"):
        load_documents(DataArguments(dataset=holes, validation_size=2))
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.json"):
        load_documents(DataArguments(dataset=str(tmp_path / "c")))
    with pytest.raises(ValueError, match=r"no JSON"):
        load_documents(DataArguments(dataset=write(tmp_path / "d.csv", ROWS)))
    with pytest.raises(ValueError, match=r"sequence_length=0"):
        DataArguments(sequence_length=0)


@pytest.mark.parametrize("content", ["", '{"text": "cut of'])
def test_an_empty_or_broken_file_is_refused(tmp_path, content):
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"cannot be read.*Repair"):
        load_documents(DataArguments(dataset=str(tmp_path)))


def test_a_file_of_no_bytes_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl is empty.*Repair or remove"):
        load_documents(DataArguments(dataset=write(tmp_path / "rows.jsonl", []), validation_size=1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "`dataset` is empty; name a file"),
        ("/", "dataset=/` holds no .json"),
        ("deep", "dataset=deep` holds no .json"),
        ("link.jsonl", "link.jsonl` is a link to gone.jsonl, which is not there"),
    ],
)
def test_a_name_that_stands_for_no_documents_is_refused_without_a_search(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "deep/a/b/c/d/train.jsonl", ROWS)
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    monkeypatch.setattr("pathlib.Path.rglob", lambda *_: pytest.fail("searched"))
    with pytest.raises(ValueError, match=message):
        load_documents(DataArguments(dataset=name, validation_size=1))


def test_a_split_limited_to_nothing_is_refused(monkeypatch):
    monkeypatch.setattr("modeling_coe.train.data.word_problems", lambda *_: iter([]))
    with pytest.raises(ValueError, match=r"train split of .* is empty"):
        load_documents(DataArguments())


def test_the_trained_tokenizer_splits_digits_and_returns_every_text(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("1207")["input_ids"]) == ["<bos>", "1", "2", "0", "7"]
    for text in ("Mia has 12 plums.\n#### 12", "  two  spaces, Žofie 漢字 🙂\t"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_tokenizer_the_embedding_cannot_hold_is_refused(tokenizer, documents, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path), documents["train"], len(tokenizer))) == len(tokenizer)
    with pytest.raises(ValueError, match=rf"has {len(tokenizer)} tokens.*`vocab_size`"):
        load_tokenizer(str(tmp_path), documents["train"], len(tokenizer) - 1)
    with pytest.raises(ValueError, match=r"vocab_size=100.*at least 259"):
        load_tokenizer(None, documents["train"], 100)


def test_what_a_call_left_in_a_tokenizer_is_not_loaded_and_answers_leave_nothing(
    tokenizer, documents, model, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "clean")
    called = load_tokenizer(str(tmp_path / "clean"), documents["train"], 320)
    called(["2+2?", "3"], padding=True, truncation=True, max_length=3)
    called.save_pretrained(tmp_path / "called")
    loaded = load_tokenizer(str(tmp_path / "called"), documents["train"], 320)
    solve(model, loaded, as_problems(documents["validation"], 3), max_new_tokens=2)
    loaded.save_pretrained(tmp_path / "again")
    clean, left, again = ((tmp_path / name / "tokenizer.json").read_text() for name in ("clean", "called", "again"))
    assert json.loads(left)["padding"] is not None and again == clean


def test_packing_keeps_every_document_whole_and_once(documents, tokenizer):
    blocks = pack(documents["train"], tokenizer, 200)
    packed = []
    for block in blocks:
        assert len(block["input_ids"]) <= 200
        packed += [ids.tolist() for ids in torch.tensor(block["input_ids"]).split(block["seq_lengths"])]
    whole = [[*tokenizer(row["prompt"] + row["completion"]).input_ids, 2] for row in documents["train"]]
    assert sorted(packed) == sorted(whole)
    assert len(blocks) < 0.5 * len(whole)


def test_a_document_longer_than_a_block_is_refused_or_split(documents, tokenizer):
    with pytest.raises(ValueError, match=r"sequence_length=40.*split_long_documents"):
        pack(documents["train"], tokenizer, 40)
    split = pack(documents["train"], tokenizer, 40, split_long_documents=True)
    whole = pack(documents["train"], tokenizer, 200)
    assert max(map(len, split["input_ids"])) == 40
    assert sum(map(len, split["input_ids"])) == sum(map(len, whole["input_ids"]))


def summed_loss(model, batch) -> float:
    targets = batch["labels"].ne(-100).sum().item()
    return model(**batch, use_cache=False).loss.item() * targets


def test_a_packed_batch_has_the_loss_of_its_documents_one_by_one(documents, tokenizer, model):
    few = documents["train"].select(range(11))
    packed = collate(list(pack(few, tokenizer, 200)), pad_token_id=0)
    alone = [collate([row], pad_token_id=0) for row in pack(few, tokenizer, 100) if len(row["seq_lengths"]) == 1]
    singles = [
        collate([{"input_ids": ids, "seq_lengths": [len(ids)]}], pad_token_id=0)
        for ids in ([*tokenizer(row["prompt"] + row["completion"]).input_ids, 2] for row in few)
    ]
    assert packed["input_ids"].shape[0] < len(singles) and alone
    assert packed["labels"].eq(-100).sum() > len(singles)  # starts and padding
    expected = sum(summed_loss(model, batch) for batch in singles)
    with torch.no_grad():
        assert summed_loss(model, packed) == pytest.approx(expected, rel=1e-5)
        # Without the restarting positions the documents of a block see each other.
        del packed["position_ids"]
        assert summed_loss(model, packed) != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+4=7\n#### 7", "7"),
        ("#### 1\n#### 1,234", "1234"),
        ("no answer", None),
        ("####-5 ", "-5"),
        ("####", None),
        ("##### Notes", None),
    ],
)
def test_the_final_answer_stands_behind_the_last_mark(text, answer):
    assert final_answer(text) == answer


def test_answers_do_not_depend_on_the_batch_they_are_generated_in(documents, tokenizer, model):
    answer_all = partial(solve, model, tokenizer, documents["validation"].select(range(7)), max_new_tokens=9)
    together, alone = answer_all(batch_size=7), answer_all(batch_size=1)
    assert together == alone
    assert len({answer["generated"] for answer in alone}) > 1


def test_only_the_expected_final_answer_counts_as_solved(documents, tokenizer, model, monkeypatch):
    problems = as_problems(documents["validation"], 5)
    right = [final_answer(row["completion"]) for row in problems]
    texts = [f"#### {right[0]}", f"#### {right[1]}0", "no mark", f"#### 99\n#### {right[3]}", f"so #### {right[4]} ."]
    ids = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt").input_ids
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, ids], dim=1))
    assert [a["solved"] for a in solve(model, tokenizer, problems)] == [True, False, False, True, True]


def test_problems_without_a_final_answer_do_not_count():
    answers = [{"expected": " #### 3", "solved": True}, {"expected": " #### 4", "solved": False}]
    assert share_solved([*answers, {"expected": " none", "solved": False}]) == 0.5
    assert share_solved([{"expected": " none", "solved": False}]) is None


def test_the_prompt_of_a_long_text_is_short():
    (row,) = as_problems(Dataset.from_list([{"text": "abcdefgh" * 1000}]), 1)
    assert (len(row["prompt"]), len(row["completion"])) == (200, 7800)


def test_a_tokenizer_that_ends_every_text_itself_is_refused(tokenizer, tmp_path):
    ends = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = ends
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ends every text with <eos>.*`add_eos_token=False`"):
        load_tokenizer(str(tmp_path), None, 320)


@pytest.mark.parametrize(
    "others", [("LICENSE.txt", "notes.txt"), ("a.png", "b.png"), ("README.md", "requirements.txt")]
)
def test_other_files_in_a_folder_are_not_read(others, tmp_path):
    write(tmp_path / "data.jsonl", ROWS)
    for name in others:
        (tmp_path / name).write_text("Permission is hereby granted\n")
    splits = load_documents(DataArguments(dataset=str(tmp_path), validation_size=2))
    assert len(splits["train"]) == 7 and splits["train"].column_names == ["prompt", "completion"]


def test_the_splits_that_a_folder_declares_are_read(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: one.jsonl}\n"
        "  - {split: test, path: two.jsonl}\n---\nNine problems, twice.\n"
    )
    assert len(load_documents(DataArguments(dataset=str(tmp_path)))["validation"]) == 9


def test_a_configuration_that_a_folder_has_not_is_refused(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    with pytest.raises(ValueError, match="'main' not found"):
        load_documents(DataArguments(dataset=str(tmp_path), dataset_config="main"))


def test_a_card_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\nNine problems.\n")
    with pytest.raises(ValueError, match=r"README\.md begins with no YAML that can be read.*Repair or remove it"):
        load_documents(DataArguments(dataset=str(tmp_path), validation_size=2))


def test_files_of_two_formats_are_refused_by_name_unless_they_are_of_no_split(tmp_path):
    for split in ("train", "validation"):
        Dataset.from_list(ROWS).to_parquet(tmp_path / "named" / f"{split}.parquet")
    write(tmp_path / "named" / "facts.json", [{"hash": "abc"}])
    assert len(load_documents(DataArguments(dataset=str(tmp_path / "named")))["train"]) == 9
    write(tmp_path / "mixed" / "one.jsonl", ROWS)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "mixed" / "two.parquet")
    with pytest.raises(ValueError, match=r"one\.jsonl.*two\.parquet|two\.parquet.*one\.jsonl"):
        load_documents(DataArguments(dataset=str(tmp_path / "mixed"), validation_size=2))


def test_a_plain_text_becomes_a_prompt_and_its_continuation():
    texts = Dataset.from_list([{"text": "abcdefgh"}, {"text": "xy"}])
    assert as_problems(texts, 9)[:] == {"prompt": ["ab", "x"], "completion": ["cdefgh", "y"]}


def test_brackets_and_stars_in_a_path_are_letters(tmp_path):
    folder = tmp_path / "run [1]*"
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", ROWS)
    assert len(load_documents(DataArguments(dataset=str(folder)))["validation"]) == 9
    alone = DataArguments(dataset=str(folder / "train.jsonl"), validation_size=2)
    assert len(load_documents(alone)["train"]) == 7


def test_a_line_in_another_encoding_is_named(tmp_path):
    lines = [json.dumps({"text": f"línea {n}"}, ensure_ascii=False) for n in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    content = "\n".join(lines[:3]).encode() + b"\n" + lines[3].encode("latin-1")
    (tmp_path / "test.jsonl").write_bytes(content)
    for dataset in (tmp_path, tmp_path / "test.jsonl"):
        with pytest.raises(ValueError, match=r"Line 4 of .*test.jsonl is not UTF-8.*Save the file as UTF-8"):
            load_documents(DataArguments(dataset=str(dataset), validation_size=1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "no such file or folder"),
        ("data/nope", r"no such file or folder. Did you mean data/nope.jsonl\?"),
        ("data/train.json", "no such file or folder"),
        ("/a/b/c", "no such file or folder"),
        ("word_problem", r"no such file or folder, and the Hub .*Did you mean word_problems\?"),
        ("somebody/nothing", "no such file or folder, and the Hub gives no data set"),
    ],
)
def test_a_mistyped_dataset_is_named_at_once(tmp_path, monkeypatch, name, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nope.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"dataset={name}`: {message}"):
        load_documents(DataArguments(dataset=name))


def load_rows(tmp_path, rows, tokenizer=None, **options):
    path = write(tmp_path / "rows.jsonl", [*rows, *rows])
    return load_documents(DataArguments(dataset=path, validation_size=1, **options), tokenizer=tokenizer)["train"][0]


ALL_KINDS = {"question": "q", "answer": "a", "text": "t", "body": "b", "prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, {"prompt": "Question: q\nAnswer:", "completion": " a"}),
        ({"text_column": "body"}, {"text": "b"}),
        ({"text_column": "text"}, {"text": "t"}),
        ({"answer_column": "body"}, {"prompt": "Question: q\nAnswer:", "completion": " b"}),
    ],
)
def test_the_columns_that_are_named_are_the_ones_that_are_read(tmp_path, columns, expected):
    assert load_rows(tmp_path, [ALL_KINDS], **columns) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text_column": "bodi"}, r"has the columns \['question', .*'body'.*\], not `bodi`"),
        ({"question_column": "ask"}, r"has the columns \['question', .*\], not `ask` and `answer`"),
        ({"text_column": "body", "answer_column": "text"}, "text_column=body` does not go with"),
    ],
)
def test_a_named_column_that_is_not_there_is_refused_whatever_else_is(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path, [ALL_KINDS], **columns)


def test_trl_s_standard_columns_are_taken(tmp_path):
    assert load_rows(tmp_path, [{"prompt": "Sky is", "completion": " blue."}]) == {
        "prompt": "Sky is",
        "completion": " blue.",
    }
    user, reply = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "#### 4"}
    expected = {"prompt": "Question: 2+2?\nAnswer:", "completion": " #### 4"}
    assert load_rows(tmp_path, [{"messages": [user, reply]}]) == expected
    assert load_rows(tmp_path, [{"prompt": [user], "completion": [reply]}]) == expected
    system = {"role": "system", "content": "Be brief."}
    assert load_rows(tmp_path, [{"messages": [system, user, reply, user, reply]}]) == {
        "prompt": "Be brief.\n\nQuestion: 2+2?\nAnswer: #### 4\n\nQuestion: 2+2?\nAnswer:",
        "completion": " #### 4",
    }


OWN_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize("template", ["trained", None, OWN_TEMPLATE], ids=["trained", "none", "own"])
@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "suauaua", "uua", "usua"])
def test_a_conversation_is_asked_in_the_layout_it_was_trained_in(roles, template, tokenizer, tmp_path):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": f"turn {turn},\nof <{role}> "} for turn, role in enumerate(roles)]
    if template != "trained":
        tokenizer = with_template(tokenizer, template)
    document = load_rows(tmp_path, [{"messages": messages}], tokenizer)
    (packed,) = pack(Dataset.from_list([document]), tokenizer, 512)["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert asked == "<bos>" + document["prompt"]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(packed) == whole.removesuffix("\n")
    assert (document == load_rows(tmp_path, [{"messages": messages}])) == (template != OWN_TEMPLATE)


def test_a_tokenizer_that_begins_with_nothing_is_given_a_template_that_does_too(tokenizer, tmp_path):
    bare = with_template(tokenizer, None)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    user, reply = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    document = load_rows(tmp_path, [{"prompt": [user], "completion": [reply]}], bare)
    assert bare.apply_chat_template([user], tokenize=False) == document["prompt"] == "Question: 2+2?\nAnswer:"


def test_only_conversations_go_by_the_template(tokenizer, tmp_path):
    own, none = with_template(tokenizer, OWN_TEMPLATE), with_template(tokenizer, None)
    for row in ({"prompt": "p", "completion": "c"}, {"text": "t"}):
        assert load_rows(tmp_path, [row], own) == load_rows(tmp_path, [row], none) == load_rows(tmp_path, [row])
    assert none.chat_template is None and own.chat_template == OWN_TEMPLATE


@pytest.mark.parametrize("template", [None, OWN_TEMPLATE])
def test_questions_and_answers_are_asked_in_their_own_layout_afterwards(template, tokenizer, tmp_path, capsys):
    other = with_template(tokenizer, template)
    document = load_rows(tmp_path, [{"question": "2+2?", "answer": "4"}], other)
    asked = other.apply_chat_template([{"role": "user", "content": "2+2?"}], tokenize=False)
    assert asked == "<bos>" + document["prompt"]
    assert ("layout of their own, which replaces" in capsys.readouterr().out) == (template is not None)


def test_the_prompt_comes_first_in_whatever_order_the_columns_are(tmp_path):
    row = load_rows(tmp_path, [{"completion": "c", "prompt": "p"}])
    assert list(row.items()) == [("prompt", "p"), ("completion", "c")]


@pytest.mark.parametrize(
    "name, said, nothing",
    [
        ("tool_calls", "add(2, 2)", "[]"),
        ("reasoning_content", "Two twos.", ""),
        ("thinking", "m", None),
    ],
)
def test_what_a_message_says_beside_its_content_is_not_dropped_in_silence(name, said, nothing, tokenizer, tmp_path):
    user, reply = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    with pytest.raises(ValueError, match=re.escape(f"has a message with `{name}={said!r}`")):
        load_rows(tmp_path, [{"messages": [user, reply | {name: said}]}], tokenizer)
    with pytest.raises(ValueError, match="has a column `tools`"):
        load_rows(tmp_path, [{"messages": [user, reply], "tools": [{"name": "add"}]}], tokenizer)
    for none in (None, []):
        assert load_rows(tmp_path, [{"messages": [user, reply | {name: nothing}], "tools": none}], tokenizer)


def test_the_last_answer_is_what_is_trained_whatever_the_weights_say(tokenizer, tmp_path):
    user, reply = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    chat = [user, reply | {"weight": 0}, user | {"weight": 0}, reply | {"weight": 1}]
    assert load_rows(tmp_path, [{"messages": chat}], tokenizer)["completion"] == " 4"
    with pytest.raises(ValueError, match="ends with an answer of `weight=0`"):
        load_rows(tmp_path, [{"messages": [user, reply | {"weight": 0}]}], tokenizer)


def test_what_datasets_saved_to_disk_is_read(tmp_path):
    rows = Dataset.from_list([{"text": f"text {n}"} for n in range(4)])
    rows.save_to_disk(tmp_path / "rows")
    others = {"all": Dataset.from_list([{"number": 1}]), "train-clean": rows}
    DatasetDict({"train": rows, "test": rows.select([0]), **others}).save_to_disk(tmp_path / "splits")
    rows.select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"0 documents|is empty"):
        load_documents(DataArguments(dataset=str(tmp_path / "empty"), validation_size=1))
    with pytest.raises(ValueError, match="`dataset_config=x`"):
        load_documents(DataArguments(dataset=str(tmp_path / "rows"), dataset_config="x"))
    read = load_documents(DataArguments(dataset=str(tmp_path / "rows"), validation_size=1))
    assert {split: len(documents) for split, documents in read.items()} == {"train": 3, "validation": 1}
    assert load_documents(DataArguments(dataset=str(tmp_path / "splits")))["validation"]["text"] == ["text 0"]
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {
        "data-00000-of-00001.arrow", "dataset_info.json", "state.json"
    }  # fmt: skip
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_text('{"epoch": 1}')
        rows.to_json(tmp_path / "other" / "train.jsonl")
        read = load_documents(DataArguments(dataset=str(tmp_path / "other"), validation_size=1))
        assert len(read["train"]) == 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (OWN_TEMPLATE.replace("[assistant] ", "[assistant] <think>"), "is not the beginning of the whole"),
        (OWN_TEMPLATE.removeprefix("{{ bos_token }}"), "begins with .*, and the tokenizer puts '<bos>' in front"),
        ("{{ raise_exception('no system here') }}", r"\(no system here\): .* give `prompt` and `completion` as texts"),
    ],
    ids=["prompt", "beginning", "refusal"],
)
def test_a_template_that_does_not_fit_is_refused(template, message, tokenizer, tmp_path):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    with pytest.raises(ValueError, match=f"Document 0 of the train split does not fit .*{message}"):
        load_rows(tmp_path, [{"messages": messages}], with_template(tokenizer, template))


def test_the_token_with_which_a_template_ends_an_answer_is_no_part_of_what_is_expected(tokenizer, model, monkeypatch):
    ends = copy.deepcopy(tokenizer)
    ends.add_special_tokens({"additional_special_tokens": ["<end>"]})
    problems = Dataset.from_list([{"prompt": "2+2?", "completion": "#### 4<end>\n"}])
    ids = torch.tensor([ends("#### 4<end>\n", add_special_tokens=False).input_ids])
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, ids], dim=1))
    assert solve(model, ends, problems)[0]["solved"]


def test_one_question_and_its_answer_look_in_a_chat_as_they_always_did(tokenizer):
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    for turns, text in ((1, "<bos>Question: 2+2?\nAnswer:"), (2, "<bos>Question: 2+2?\nAnswer: 4<eos>")):
        assert tokenizer.apply_chat_template(chat[:turns], tokenize=False) == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "2+2?"}], "ends with .*not with an answer"),
        ([{"role": "tool", "content": "4"}, {"role": "assistant", "content": "4"}], "one of .*as `role`"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "4"}], "must have a text as `content`"),
        ([{"role": "assistant", "content": "4"}], "is an answer alone; put before it what it answers"),
        ([], "must have a text"),
        ("hi", "has the message 'hi'; each must have a text as `content`"),
        (["hi"], "has the message 'hi'; each must have a text as `content`"),
    ],
)
def test_a_conversation_without_an_answer_is_refused(tmp_path, messages, message):
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path, [{"messages": messages}])

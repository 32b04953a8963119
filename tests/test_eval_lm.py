# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation through its command line: a checkpoint, an adapter, and local lm_eval tasks."""

import json
import math
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from modeling_coe import CoEConfig, CoEForCausalLM, lora_config
from modeling_coe.train import eval_lm
from modeling_coe.train.arguments import DataArguments
from modeling_coe.train.data import load_documents, load_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    documents = load_documents(DataArguments(train_problems=200, validation_problems=5))
    tokenizer = load_tokenizer(None, documents["train"], 320)
    torch.manual_seed(0)
    config = CoEConfig(
        vocab_size=320, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    CoEForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluate(model, output, **options) -> dict:
    options = {
        "model": model, "dataset": "word_problems", "train_problems": 1, "validation_problems": 9,
        "sequence_length": 128, "scored_problems": 4, "max_new_tokens": 3, "output_dir": output,
    } | options  # fmt: skip
    eval_lm.main([part for name, value in options.items() for part in (f"--{name}", *str(value).split())])
    return json.loads((output / "facts.json").read_text())


def test_facts_of_a_random_model_are_near_those_of_guessing(checkpoint, tmp_path):
    facts = evaluate(checkpoint, tmp_path)
    assert facts["validation_loss"] == pytest.approx(math.log(320), abs=0.2)
    assert facts["perplexity"] == pytest.approx(math.exp(facts["validation_loss"]))
    assert (facts["validation_documents"], facts["scored_problems"], facts["share_solved"]) == (9, 4, 0.0)
    assert len(json.loads((tmp_path / "samples.json").read_text())) == 4
    # The batch size is no part of the result.
    assert evaluate(checkpoint, tmp_path, batch_size=2)["validation_loss"] == pytest.approx(facts["validation_loss"])


def test_answers_of_an_earlier_evaluation_do_not_stand_beside_new_facts(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    evaluate(checkpoint, tmp_path, scored_problems=2)
    assert evaluate(checkpoint, tmp_path, scored_problems=0)["scored_problems"] == 0
    assert json.loads((tmp_path / "samples.json").read_text()) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_adapter_is_scored_with_its_update(checkpoint, tmp_path):
    model = CoEForCausalLM.from_pretrained(checkpoint)
    model = get_peft_model(model, lora_config(model, r=3))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    beside_its_base = shutil.copytree(checkpoint, tmp_path / "both")
    model.peft_config["default"].base_model_name_or_path = str(beside_its_base)
    model.save_pretrained(beside_its_base)
    options = {"tokenizer": checkpoint, "scored_problems": 0}
    both = evaluate(beside_its_base, tmp_path / "beside", **options)
    adapted = evaluate(tmp_path / "adapter", tmp_path / "adapted", **options)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = evaluate(tmp_path / "merged", tmp_path / "facts", **options)
    base = evaluate(checkpoint, tmp_path / "base", **options)
    for scores in (adapted, both):
        assert scores["validation_loss"] == pytest.approx(merged["validation_loss"], rel=1e-5)
    assert abs(adapted["validation_loss"] - base["validation_loss"]) > 1e-3
    assert "share_solved" not in base


def test_tasks_without_lm_eval_name_the_package(checkpoint, monkeypatch):
    monkeypatch.setattr(eval_lm, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        eval_lm.find_tasks(eval_lm.EvaluationArguments(tasks=["arithmetic"]))


QUESTIONS = [f"{'and ' * (number % 4)}{number}+1?" for number in range(6)]
CHOICES = [" seven", " 1", " many more"]


def greedy_text(model, tokenizer, question: str) -> str:
    ids = tokenizer(question, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :])


def favourite(model, tokenizer, question: str) -> int:
    """The choice with the highest log-probability, token by token."""
    scores = []
    for choice in CHOICES:
        start, ids = len(tokenizer(question).input_ids), tokenizer(question + choice).input_ids
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append(sum(logprobs[position - 1, ids[position]].item() for position in range(start, len(ids))))
    return scores.index(max(scores))


@pytest.fixture(scope="module")
def tasks(checkpoint, tmp_path_factory):
    """A multiple-choice and a generation task; what the model itself would say is right for four of the six."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = CoEForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    rows = []
    for number, question in enumerate(QUESTIONS):
        label, text = favourite(model, tokenizer, question), greedy_text(model, tokenizer, question)
        is_right = number < 4
        label = label if is_right else (label + 1) % len(CHOICES)
        rows.append({"question": question, "choices": CHOICES, "label": label, "text": text if is_right else "no"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
    head += "doc_to_text: question\n"
    (folder / "choose.yaml").write_text(
        f"task: choose\n{head}output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "write.yaml").write_text(
        f"task: write\n{head}output_type: generate_until\ndoc_to_target: text\n"
        "generation_kwargs: {until: ['@@'], do_sample: false, max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


@pytest.fixture
def no_survey(monkeypatch):
    """lm_eval asks a dozen programs about the machine, which takes longer than the evaluation."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def test_local_tasks_run_offline_and_score_what_the_model_itself_says(checkpoint, tasks, no_survey, tmp_path):
    options = {"task_folder": tasks, "scored_problems": 0}
    facts = evaluate(checkpoint, tmp_path / "facts", **options, tasks="choose write")
    assert facts["tasks"]["choose"]["acc,none"] == pytest.approx(4 / 6)
    assert facts["tasks"]["write"]["exact_match,none"] == pytest.approx(4 / 6)


def test_a_misspelt_task_is_refused_before_the_model_is_loaded(checkpoint, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_lm, "load", lambda arguments: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"no task 'chose'. Did you mean choose\?"):
        evaluate(checkpoint, tmp_path / "facts", task_folder=tasks, tasks="write chose")


def test_what_was_scored_is_kept_when_a_task_fails(checkpoint, tasks, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no network")

    monkeypatch.setattr(eval_lm, "run_tasks", fail)
    with pytest.raises(RuntimeError, match="no network"):
        evaluate(checkpoint, tmp_path / "facts", task_folder=tasks, tasks="write", scored_problems=0)
    assert json.loads((tmp_path / "facts" / "facts.json").read_text())["validation_loss"] > 0


def test_lm_eval_gives_the_same_answers_at_every_batch_size(checkpoint, tasks, no_survey):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = CoEForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    answers = {}
    for size in (1, 16, "auto"):
        engine = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_batch_size=16, max_length=64)
        manager = TaskManager(include_path=str(tasks))
        run = simple_evaluate(engine, tasks=["choose", "write"], task_manager=manager, bootstrap_iters=0)
        scores = [float(pair[0]) for sample in run["samples"]["choose"] for pair in sample["filtered_resps"]]
        answers[size] = scores, [sample["filtered_resps"] for sample in run["samples"]["write"]]
    assert len(answers[1][0]) == 18 and len(set(answers[1][0])) > 6
    for size in (16, "auto"):
        assert answers[size][0] == pytest.approx(answers[1][0], abs=1e-5)
        assert answers[size][1] == answers[1][1]

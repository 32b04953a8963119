# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation through its command line: a checkpoint, an adapter, and local lm_eval tasks."""

import json
import math

import pytest
import torch
from peft import get_peft_model

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
    eval_lm.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    return json.loads((output / "facts.json").read_text())


def test_facts_of_a_random_model_are_near_those_of_guessing(checkpoint, tmp_path):
    facts = evaluate(checkpoint, tmp_path)
    assert facts["validation_loss"] == pytest.approx(math.log(320), abs=0.2)
    assert facts["perplexity"] == pytest.approx(math.exp(facts["validation_loss"]))
    assert (facts["validation_documents"], facts["scored_problems"], facts["share_solved"]) == (9, 4, 0.0)
    assert len(json.loads((tmp_path / "samples.json").read_text())) == 4
    # The batch size is no part of the result.
    assert evaluate(checkpoint, tmp_path, batch_size=2)["validation_loss"] == pytest.approx(facts["validation_loss"])


def test_an_adapter_is_scored_with_its_update(checkpoint, tmp_path):
    model = CoEForCausalLM.from_pretrained(checkpoint)
    model = get_peft_model(model, lora_config(model, r=3))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    options = {"tokenizer": checkpoint, "scored_problems": 0}
    adapted = evaluate(tmp_path / "adapter", tmp_path / "adapted", **options)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = evaluate(tmp_path / "merged", tmp_path / "facts", **options)
    base = evaluate(checkpoint, tmp_path / "base", **options)
    assert adapted["validation_loss"] == pytest.approx(merged["validation_loss"], rel=1e-5)
    assert abs(adapted["validation_loss"] - base["validation_loss"]) > 1e-3
    assert "share_solved" not in base


def test_tasks_without_lm_eval_name_the_package(checkpoint, monkeypatch):
    monkeypatch.setattr(eval_lm, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        eval_lm.run_tasks(None, None, eval_lm.EvaluationArguments(tasks=["arithmetic"]))


def test_a_local_task_runs_offline(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"{a}+1?", "choices": [str(a + 1), str(a + 2)], "label": 0} for a in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    facts = evaluate(checkpoint, tmp_path / "facts", tasks="sums", task_folder=tmp_path / "tasks", scored_problems=0)
    assert 0 <= facts["tasks"]["sums"]["acc,none"] <= 1

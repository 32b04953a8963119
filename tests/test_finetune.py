# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning, evaluation and the plan through their command lines, and the recipes that drive them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_coe import CoEConfig, CoEForCausalLM, QuantizedExpertsConfig, lora_config, modeling_coe
from modeling_coe.balancing import calibrate_expert_budget
from modeling_coe.budget import TrainingSetup, count_parameters, largest_micro_batch, training_memory
from modeling_coe.routing import record_routing
from modeling_coe.train import arguments, eval_lm, finetune, generate, plan, publish, upcycle
from modeling_coe.train.arguments import (
    CheckpointArguments,
    DataArguments,
    FinetuneArguments,
    LoraArguments,
    ModelArguments,
    PretrainArguments,
    parse,
)
from modeling_coe.train.data import load_documents, load_tokenizer, losses, short_enough
from modeling_coe.train.report import print_result, routing_health


ROOT = Path(__file__).parents[1]
CONFIG = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "router_aux_loss_coef": 0.0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    documents = load_documents(DataArguments(train_problems=200, validation_problems=5))
    tokenizer = load_tokenizer(None, documents["train"], CONFIG["vocab_size"])
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    CoEForCausalLM(CoEConfig(**CONFIG, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(checkpoint, output, **options) -> list[str]:
    options = {
        "config": ROOT / "configuration/finetune/full.yaml",
        "model": checkpoint,
        "dataset": "word_problems",
        "train_problems": 24,
        "validation_problems": 6,
        "sequence_length": 128,
        "scored_problems": 0,
        "max_steps": 4,
        "warmup_steps": 1,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "no",
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "output_dir": output,
    } | options
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def curve(output: Path, step: int = 4) -> list[float]:
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


@pytest.fixture(scope="module")
def whole_run(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    finetune.main(command(checkpoint, output, learning_rate=0.01, scored_problems=2, max_new_tokens=4))
    return output


def test_fine_tuning_lowers_the_validation_loss_and_writes_facts(whole_run):
    facts = json.loads((whole_run / "facts.json").read_text())
    assert facts["after"]["answer_loss"] < facts["before"]["answer_loss"] - 0.1
    assert facts["trained_parameters"] == {"all": CoEForCausalLM.from_pretrained(whole_run).num_parameters()}
    assert facts["learning_rate"] == 0.01 and {"torch", "transformers"} <= facts["versions"].keys()
    assert AutoConfig.from_pretrained(whole_run).use_cache


@pytest.mark.parametrize("option", [{"chat_template_path": "t.jinja"}, {"model_init_kwargs": '{"dtype": "bfloat16"}'}])
def test_options_of_trl_that_would_have_no_effect_are_refused(option, checkpoint, tmp_path):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}=.*would have no effect here"):
        finetune.main(command(checkpoint, tmp_path / "run", **option))


@pytest.mark.parametrize("option", [{"router_aux_loss_coef": 5}, {"shuffle_dataset": True}])
def test_a_run_does_not_go_on_with_another_option_of_trl(option, checkpoint, tmp_path):
    finetune.main(command(checkpoint, tmp_path / "run", max_steps=2))
    (name,) = option
    with pytest.raises(ValueError, match=rf"holds a run with `training\.{name}="):
        finetune.main(command(checkpoint, tmp_path / "run", max_steps=4, **option))


@pytest.mark.parametrize("template", [None, "<|{{ messages[0]['content'] }}|>"])
def test_a_question_is_asked_in_the_layout_of_the_chat_template(template, whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(whole_run)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "run")
    if template is None:
        (tmp_path / "run" / "chat_template.jinja").unlink()
    capsys.readouterr()
    generate.main(["--model", str(tmp_path / "run"), "--question", "1+1?", "--max_new_tokens", "1"])
    assert capsys.readouterr().out.startswith("Question: 1+1?\nAnswer:" if template is None else "<|1+1?|>")


def test_the_result_names_which_loss_is_of_the_answers(whole_run, capsys):
    facts = json.loads((whole_run / "facts.json").read_text())
    print_result(facts, whole_run)
    change = f"(of the answers {facts['answer_loss_before']:.4f} before, now {facts['answer_loss']:.4f})"
    assert change in capsys.readouterr().out


def test_evaluation_reports_what_the_run_reported(checkpoint, whole_run, tmp_path):
    facts = json.loads((whole_run / "facts.json").read_text())
    data = {"train_problems": 24, "validation_problems": 6, "scored_problems": 2, "max_new_tokens": 4}
    options = {"model": whole_run, "dataset": "word_problems", "output_dir": tmp_path, **data}
    eval_lm.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    scored = json.loads((tmp_path / "facts.json").read_text())
    for name in ("validation_loss", "answer_loss", "share_solved", "scored_problems"):
        assert scored[name] == pytest.approx(facts[name], rel=1e-5), name
    assert scored["validation_loss"] != pytest.approx(scored["answer_loss"], rel=1e-2)


def test_fine_tuned_run_leaves_what_a_model_card_needs(whole_run):
    stated = {"--base-model": "user/base", "--dataset-id": "user/data", "--dataset-license": "mit"}
    publish.main([str(whole_run), "--repo", "user/tuned", *(part for pair in stated.items() for part in pair)])
    card = (whole_run / "hub" / "README.md").read_text()
    facts = json.loads((whole_run / "facts.json").read_text())
    assert facts["tokens"] > 0 and f"{facts['tokens']:,} tokens in 4 steps" in card
    assert "| validation | loss of the answers" in card and f"{facts['before']['answer_loss']:.4g} |" in card
    assert f"{facts['after']['answer_loss']:.4g} |" in card and "base_model: user/base" in card


def test_a_finished_run_repeated_is_the_same_run(checkpoint, whole_run, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(whole_run, output)
    (output / "facts.json").unlink()
    finetune.main(command(checkpoint, output, learning_rate=0.01, scored_problems=2, max_new_tokens=4))
    assert (output / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    facts, before = (json.loads((folder / "facts.json").read_text()) for folder in (output, whole_run))
    assert facts["steps"] == 4 and facts["after"] == before["after"]


def test_a_changed_row_in_the_middle_is_other_data(checkpoint, tmp_path):
    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(9)]
    for split in ("train", "test"):
        write_rows(tmp_path / "data", rows, split)
    options = {"dataset": tmp_path / "data", "max_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 1}
    finetune.main(command(checkpoint, tmp_path / "run", **options))
    rows[4]["answer"] = "#### 6"
    write_rows(tmp_path / "data", rows)
    with pytest.raises(
        ValueError, match="`data=9 documents`, of which others are here, the first between number 5 and"
    ):
        finetune.main(command(checkpoint, tmp_path / "run", **options))


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_no_card_of_a_library_is_left_in_the_output(checkpoint, tmp_path, recipe):
    recipe = ROOT / f"configuration/finetune/{recipe}.yaml"
    finetune.main(command(checkpoint, tmp_path, config=recipe, max_steps=2))
    assert list(tmp_path.rglob("README.md")) == []


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_card_that_a_user_wrote_stays_as_it_is(checkpoint, tmp_path, recipe):
    run = command(checkpoint, tmp_path, config=ROOT / f"configuration/finetune/{recipe}.yaml", max_steps=2)
    finetune.main(run)
    (tmp_path / "README.md").write_text("mine")
    finetune.main(run)
    assert [path.read_text() for path in tmp_path.rglob("README.md")] == ["mine"]


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": "true"},
    ],
    ids=["accumulated", "checkpointed"],
)
def test_the_same_batch_gives_the_same_curve(checkpoint, whole_run, tmp_path, options):
    finetune.main(command(checkpoint, tmp_path, learning_rate=0.01, **options))
    assert curve(tmp_path) == pytest.approx(curve(whole_run), abs=1e-5)


def test_a_resumed_run_has_the_curve_of_the_whole_one_and_refuses_another_recipe(checkpoint, whole_run, tmp_path):
    output = tmp_path / "resumed"
    shutil.copytree(whole_run, output)
    shutil.rmtree(output / "checkpoint-4")
    with pytest.raises(ValueError, match=r"learning_rate=0.01.*0.02.*another `output_dir`"):
        finetune.main(command(checkpoint, output, learning_rate=0.02))
    finetune.main(command(checkpoint, output, learning_rate=0.01))
    assert json.loads((output / "facts.json").read_text())["resumed_from"] == "checkpoint-2"
    assert curve(output) == pytest.approx(curve(whole_run), abs=1e-5)


@pytest.mark.parametrize("changed", [{}, {"max_validation_documents": 3}], ids=["same", "other documents"])
def test_a_resumed_run_that_loads_its_checkpoint_has_the_loss_before_of_its_first_leg(
    checkpoint, tmp_path, monkeypatch, changed
):
    """With a layout the ranks build the model from the checkpoint; here one rank builds all of it."""
    load = finetune.AutoModelForCausalLM.from_pretrained

    def load_whole(source, distributed_config, **options):
        assert distributed_config == "layout"
        return load(source, **options)

    monkeypatch.setattr(finetune.AutoModelForCausalLM, "from_pretrained", load_whole)
    monkeypatch.setattr(arguments.LayoutArguments, "distributed_config", lambda self: "layout")
    finetune.main(command(checkpoint, tmp_path, learning_rate=0.01))
    first = json.loads((tmp_path / "facts.json").read_text())
    shutil.rmtree(tmp_path / "checkpoint-4")
    finetune.main(command(checkpoint, tmp_path, learning_rate=0.01, **changed))
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["resumed_from"] == "checkpoint-2"
    expected = None if changed else first["before"]
    assert facts["before"] == expected
    assert facts["validation_loss_before"] == (expected and expected["validation_loss"])
    assert facts["answer_loss_before"] == (expected and expected["answer_loss"])


def test_a_finished_run_repeated_keeps_its_facts(checkpoint, whole_run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole_run, output)
    facts = json.loads((output / "facts.json").read_text()) | {"commit": "1234567"}
    assert facts["train_seconds"] > 0
    (output / "facts.json").write_text(json.dumps(facts))
    finetune.main(command(checkpoint, output, learning_rate=0.01, scored_problems=2, max_new_tokens=4))
    assert json.loads((output / "facts.json").read_text()) == facts
    assert curve(output) == curve(whole_run)


def test_lora_trains_and_resumes(checkpoint, tmp_path):
    recipe = {"config": ROOT / "configuration/finetune/lora.yaml", "learning_rate": 0.01}
    finetune.main(command(checkpoint, tmp_path, **recipe))
    whole = curve(tmp_path)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert set(facts["trained_parameters"]) == {"attention", "experts", "router"}
    assert facts["after"]["answer_loss"] < facts["before"]["answer_loss"]
    shutil.rmtree(tmp_path / "checkpoint-4")
    finetune.main(command(checkpoint, tmp_path, **recipe))
    assert curve(tmp_path) == pytest.approx(whole, abs=1e-5)


def test_qlora_trains_on_experts_in_4_bits_and_says_their_share(checkpoint, tmp_path, capsys):
    wider = tmp_path / "wider"  # 4 bits want widths of whole groups of 32
    shutil.copytree(checkpoint, wider)
    torch.manual_seed(0)
    model = CoEForCausalLM(CoEConfig(**AutoConfig.from_pretrained(checkpoint).to_dict() | {"intermediate_size": 192}))
    model.save_pretrained(wider)
    recipe = {"config": ROOT / "configuration/finetune/lora.yaml", "learning_rate": 0.01, "load_in_4bit": "true"}
    finetune.main(command(wider, tmp_path / "run", **recipe))
    share = count_parameters(model.config)["experts"] / model.num_parameters()
    assert f"{share:.1%} of the weights are in 4 bits" in capsys.readouterr().out and share > 0.85
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert facts["after"]["answer_loss"] < facts["before"]["answer_loss"]
    assert facts["trained_parameters"]["experts"] > 0


@pytest.mark.parametrize("bits", [None, 4])
def test_the_adapter_of_an_upcycled_chain_is_published_merged(bits, checkpoint, tmp_path):
    """From coe-upcycle to coe-publish; an adapter trained on rounded experts is merged into these."""
    source, chain, adapter = (str(tmp_path / name) for name in ("source", "chain", "adapter"))
    sizes = CONFIG | {"intermediate_size": 32, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes)).save_pretrained(source)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(source)
    upcycle.main(["--source", source, "--output", chain])
    recipe = {"config": ROOT / "configuration/finetune/lora.yaml", "learning_rate": 0.01, "load_in_4bit": bits == 4}
    finetune.main(command(chain, adapter, **recipe, scored_problems=2, max_new_tokens=4))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    publish.main([adapter, "--repo", "user/tuned"])
    assert all(path.read_bytes() == content for path, content in before.items())

    options = {"quantization_config": QuantizedExpertsConfig(bits)} if bits else {}
    adapted = AutoPeftModelForCausalLM.from_pretrained(adapter, **options)
    published = AutoModelForCausalLM.from_pretrained(Path(adapter, "hub"))
    ids = torch.arange(5, 60)[None]
    torch.testing.assert_close(published(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in Path(adapter, "hub").glob("*"))
    publish.main([adapter, "--repo", "user/tuned", "--control", adapter])

    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"merged/facts\.json: no such file; .* adapter's"):
        publish.main([str(tmp_path / "merged"), "--repo", "user/tuned"])
    shutil.rmtree(chain)
    upcycle.main(["--source", source, "--output", chain, "--seed", "1", "--router_noise", "0.1"])
    with pytest.raises(ValueError, match=r"chain` is no longer what the adapter .* was trained on"):
        publish.main([adapter, "--repo", "user/tuned", "--watts", "50"])


def test_a_nan_stops_the_run_and_names_the_last_good_checkpoint(checkpoint, tmp_path, monkeypatch):
    original = finetune.Finetuner.compute_loss

    def diverge(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step >= 2 else loss

    monkeypatch.setattr(finetune.Finetuner, "compute_loss", diverge)
    with pytest.raises(FloatingPointError, match=r"last good checkpoint is .*checkpoint-2"):
        finetune.main(command(checkpoint, tmp_path))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint(checkpoint, tmp_path, monkeypatch):
    import torch as library

    original = library.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        return original(content, path, *args, **kwargs)

    monkeypatch.setattr(library, "save", full)
    with pytest.raises(OSError, match=r"No space left.*checkpoint-2"):
        finetune.main(command(checkpoint, tmp_path))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("options", "moves"), [({}, True), ({"router_bias_rate": 0}, False), ({"lora": "true"}, False)]
)
def test_the_routers_biases_move_in_full_fine_tuning_alone(checkpoint, tmp_path, options, moves):
    config = CoEConfig.from_pretrained(checkpoint, router_bias=True, router_aux_loss_coef=0.0)
    shutil.copytree(checkpoint, tmp_path / "biased")
    CoEForCausalLM(config).save_pretrained(tmp_path / "biased")
    finetune.main(command(tmp_path / "biased", tmp_path / "run", max_steps=2, **options))
    weights = (load_file(path) for path in (tmp_path / "run").glob("*.safetensors"))
    moved = {name for tensors in weights for name, tensor in tensors.items() if "correction" in name and tensor.any()}
    assert bool(moved) == moves


@pytest.mark.parametrize(("router", "is_calibrated"), [(None, True), ("full", True), ("full", False), ("none", True)])
def test_a_tuned_model_computes_the_experts_it_is_asked_for(router, is_calibrated, checkpoint, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    dial = {"router_bias": True, "num_null_experts": 3, "expert_budget": 1.5}
    torch.manual_seed(0)
    model = CoEForCausalLM(CoEConfig(**AutoConfig.from_pretrained(base).to_dict() | dial))
    if is_calibrated:
        calibrate_expert_budget(model, [{"input_ids": torch.randint(3, 320, (8, 64))}])
    model.save_pretrained(base)
    warnings = []
    monkeypatch.setattr(modeling_coe.logger, "warning", lambda message, *_: warnings.append(message))
    lora = {} if router is None else {"lora": "true", "lora_router": router}
    finetune.main(command(base, tmp_path / "run", learning_rate=0.05, max_steps=8, **lora))
    if router == "none":
        assert any("does not hold its routers" in message for message in warnings)
        return
    assert warnings == []
    loaded = eval_lm.load(CheckpointArguments(model=str(tmp_path / "run")))
    rows = load_documents(DataArguments(train_problems=24, validation_problems=6))["train"]
    tokenizer = load_tokenizer(str(base), rows, 320)
    texts = [row["prompt"] + row["completion"] for row in rows]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    for budget in (0.5, 1.0, 1.75):
        loaded.set_expert_budget(budget)
        found = record_routing(loaded, batch.input_ids, attention_mask=batch.attention_mask).experts_per_token
        assert found.mean().item() == pytest.approx(budget, abs=0.1)


def write_rows(folder: Path, rows: list[dict], split: str = "train"):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({"prompt_text": "x"}, {}, r"prompt_text.*text_column"),
        ({"question": "1+1?", "answer": "2 " * 300}, {}, r"longer than `sequence_length=128`.*drop_long_documents"),
        ({"question": "1+1?", "answer": ""}, {}, "every document must be a text"),
        ({"question": "1+1?", "answer": "2"}, {"sequence_length": 257}, "exceeds the context of"),
    ],
    ids=["no column", "too long", "empty document", "beyond the context"],
)
def test_bad_data_is_refused_before_training(checkpoint, tmp_path, rows, options, message):
    for split in ("train", "test"):
        write_rows(tmp_path / "data", [rows, rows], split)
    with pytest.raises(ValueError, match=message):
        finetune.main(command(checkpoint, tmp_path / "output", dataset=tmp_path / "data", **options))
    assert not (tmp_path / "output").exists()


OWN_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("template", [None, OWN_TEMPLATE], ids=["none", "own"])
def test_a_saved_model_is_asked_and_evaluated_in_the_layout_its_conversations_were_trained_in(
    checkpoint, tmp_path, template
):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(checkpoint, base)
    (base / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "#### 4"}]
    for split in ("train", "test"):
        write_rows(tmp_path / "data", 4 * [{"messages": messages}], split)
    data = {"dataset": tmp_path / "data", "scored_problems": 1, "max_new_tokens": 2}
    finetune.main(command(base, run, max_steps=2, **data))
    evaluation = {"model": run, "output_dir": tmp_path / "evaluation", **data}
    eval_lm.main([part for name, value in evaluation.items() for part in (f"--{name}", str(value))])
    saved = AutoTokenizer.from_pretrained(run)
    asked = saved.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    for folder in (run, tmp_path / "evaluation"):
        (sample,) = json.loads((folder / "samples.json").read_text())
        assert "<bos>" + sample["prompt"] == asked
    tuned, scored = (json.loads((path / "facts.json").read_text()) for path in (run, tmp_path / "evaluation"))
    assert scored["validation_loss"] == pytest.approx(tuned["validation_loss"], rel=1e-5)


def test_an_empty_split_is_refused(checkpoint, tmp_path):
    write_rows(tmp_path / "data", [{"text": "one"}])
    (tmp_path / "data" / "test.jsonl").write_text("")
    with pytest.raises(Exception, match=r"(?i)empty|no examples|schema|instruction"):
        finetune.main(command(checkpoint, tmp_path / "output", dataset=tmp_path / "data"))
    assert not (tmp_path / "output").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(checkpoint, tmp_path):
    small = CoEForCausalLM(CoEConfig(**CONFIG | {"vocab_size": 300}))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="has 320 tokens, the model's embedding 300 rows"):
        finetune.main(command(tmp_path / "small", tmp_path / "output", tokenizer=checkpoint))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"optim": "adamw_torhc"}, "invalid choice"), ({"lora_rank": 4}, "lora_rank")],
    ids=["optimizer", "unknown key"],
)
def test_an_unknown_choice_is_refused(checkpoint, tmp_path, options, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        finetune.main(command(checkpoint, tmp_path, **options))
    assert message in capsys.readouterr().err + str(error.value)


def test_a_preset_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="preset without weights"):
        finetune.main(command(ROOT / "configuration/models/coe_tiny.json", tmp_path))


def test_an_adapter_beside_the_checkpoint_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    model = CoEForCausalLM.from_pretrained(folder)
    get_peft_model(model, lora_config(model)).save_pretrained(folder)
    for lora in ("false", "true"):
        with pytest.raises(ValueError, match=f"`model={folder}` holds an adapter; merge it first"):
            finetune.main(command(folder, tmp_path / "run", lora=lora))


def test_validation_loss_counts_every_completion_token_once(checkpoint):
    model = CoEForCausalLM.from_pretrained(checkpoint).eval()
    documents = load_documents(DataArguments(train_problems=1, validation_problems=7))["validation"]
    tokenizer = load_tokenizer(str(checkpoint), documents, 320)
    total = count = 0
    for row in documents:
        start = len(tokenizer(row["prompt"]).input_ids)
        completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
        ids = torch.tensor([*tokenizer(row["prompt"]).input_ids, *completion, tokenizer.eos_token_id])
        log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        for position in range(start, len(ids)):
            total -= log_probs[position - 1, ids[position]].item()
            count += 1
    assert losses(model, tokenizer, documents, batch_size=3)["answer_loss"] == pytest.approx(total / count, rel=1e-5)


def test_long_documents_are_dropped_only_when_asked_for(checkpoint):
    documents = load_documents(DataArguments(train_problems=30, validation_problems=1))["train"]
    tokenizer = load_tokenizer(str(checkpoint), documents, 320)
    whole = [p + c for p, c in zip(documents["prompt"], documents["completion"], strict=True)]
    sizes = sorted(len(tokenizer(text).input_ids) + 1 for text in whole)
    limit = sizes[10]
    kept = short_enough(documents, "train", tokenizer, limit, drop_long_documents=True)
    assert len(kept) == sum(size <= limit for size in sizes)
    with pytest.raises(ValueError, match=f"{30 - len(kept)} of 30 documents of the train split"):
        short_enough(documents, "train", tokenizer, limit)


def test_routing_health_of_known_routers():
    torch.manual_seed(0)
    config = CoEConfig(**CONFIG | {"num_iterations": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1})
    model = CoEForCausalLM(config).eval()
    gate = model.model.layers[0].mlp.gate.weight.data
    gate[0] = 0
    gate[1] = 0
    gate[1, 3] = 1e4 * torch.randn(32)
    batch = {"input_ids": torch.randint(320, (4, 16)), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    health = routing_health(model, batch)
    assert health["router_entropy_1"] == pytest.approx(1, abs=1e-4)
    assert health["load_imbalance_1"] == 5 and health["dead_experts_1"] == pytest.approx(0.8)
    # Expert 3 alone for some tokens; the others find the four remaining ones level and take the first.
    level = (model(**batch, output_router_logits=True).router_logits[1][:, 3] < 0).float().mean().item()
    assert 0.2 < level < 0.8
    assert health["router_entropy_2"] == pytest.approx(level * math.log(4) / math.log(5), abs=1e-3)
    assert health["dead_experts_2"] == pytest.approx(0.6)
    padded = {name: torch.cat([value, torch.zeros_like(value)], dim=1) for name, value in batch.items()}
    assert routing_health(model, padded) == health
    # Packed rows have no mask: what is padding, the labels and the padding token say.
    model.config.pad_token_id = 0
    packed = {"input_ids": padded["input_ids"], "position_ids": torch.arange(16).repeat(4, 2)}
    labels = torch.where(padded["attention_mask"].bool(), padded["input_ids"], -100)
    assert routing_health(model, packed | {"labels": labels}) == health


def test_routing_health_tells_the_experts_of_a_pool_that_no_visit_uses():
    fields = {"num_iterations": 1, "num_experts_per_tok": 1, "num_hidden_layers": 2, "layers_per_pool": 2}
    model = CoEForCausalLM(CoEConfig(**CONFIG | fields)).eval()
    # A direction and its negative choose one expert of a pair: the first layer of 0 and 4, the second of 3 and 4.
    for layer, pair in zip(model.model.layers, ((0, 4), (3, 4)), strict=True):
        gate = layer.mlp.gate.weight.data.zero_()
        gate[0, pair[0]] = torch.randn(32)
        gate[0, pair[1]] = -gate[0, pair[0]]
    health = routing_health(model, {"input_ids": torch.randint(320, (4, 16))})
    assert health["dead_experts_1"] == pytest.approx(3 / 5)
    assert health["dead_pool_experts"] == pytest.approx(2 / 5)
    assert health["pool_imbalance"] >= 5 / 3


def test_routing_health_is_finite_where_all_tokens_choose_null_experts_and_in_a_pool_of_one_expert():
    fields = CONFIG | {"num_experts_per_tok": 1, "layers_per_pool": 2}
    batch = {"input_ids": torch.randint(320, (4, 16))}
    model = CoEForCausalLM(CoEConfig(**fields, num_null_experts=1, router_bias=True)).eval()
    model.set_expert_budget(0)
    health = routing_health(model, batch)
    assert health["experts_per_token_1"] == health["load_imbalance_1"] == health["pool_imbalance"] == 0
    assert health["dead_experts_1"] == health["dead_pool_experts"] == 1
    one = routing_health(CoEForCausalLM(CoEConfig(**fields | {"num_local_experts": 1})).eval(), batch)
    assert one["router_entropy_1"] == 0 and one["load_imbalance_1"] == 1
    json.dumps([health, one], allow_nan=False)


PRETRAIN = sorted(ROOT.glob("configuration/pretrain/*.yaml"))
FINETUNE = sorted(ROOT.glob("configuration/finetune/*.yaml"))
PRESETS = sorted(ROOT.glob("configuration/models/*.json"))


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_every_finetune_recipe_is_parsed(path):
    _, _, training, lora = parse(
        ModelArguments, DataArguments, FinetuneArguments, LoraArguments, arguments=["--config", str(path)]
    )
    assert lora.lora == (path.stem == "lora")
    assert training.output_dir == f"runs/finetune_{path.stem}"


@pytest.mark.parametrize("recipe", PRETRAIN, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_plan_of_every_preset_and_recipe_is_printed(preset, recipe, capsys):
    plan.main(["--model", str(preset), "--recipe", str(recipe), "--gpu", "8GB"])
    printed = capsys.readouterr().out
    config = AutoConfig.from_pretrained(preset)
    assert f"CoE-{config.num_iterations}({config.num_experts_per_tok}/{config.num_local_experts})" in printed
    assert ("Fits 7.50 GiB" in printed) != ("Does not fit 7.50 GiB" in printed)


def test_a_model_whose_compute_depends_on_the_text_is_not_imitated(tmp_path):
    preset = tmp_path / "dial.json"
    fields = {"num_experts_per_tok": 4, "router_bias": True, "num_null_experts": 6, "expert_budget": 3.2}
    preset.write_text(json.dumps({"model_type": "coe", **CONFIG, **fields}))
    recipe = ROOT / "configuration/pretrain/paper_8gb.yaml"
    with pytest.raises(ValueError, match=r"`num_null_experts=6` a token computes 3.2 experts on average"):
        plan.main(["--recipe", str(recipe), "--like", str(preset), "--save", "42%"])


def test_paper_8gb_is_planned_to_fit_eight_gib_at_the_papers_tokens_a_step():
    recipe = ROOT / "configuration/pretrain/paper_8gb.yaml"
    model, data, training = parse(
        ModelArguments, DataArguments, PretrainArguments, arguments=["--config", str(recipe)]
    )
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert (rows * data.sequence_length, data.sequence_length, training.max_steps) == (32768, 512, 1000)
    config = AutoConfig.from_pretrained(ROOT / model.model)
    setup = arguments.training_setup(model, training, data.sequence_length)
    assert setup.dtype == "bfloat16" and setup.optimizer == "adamw_8bit" and setup.skip_logits
    assert sum(training_memory(config, setup).values()) < 7.5 * 2**30
    plain = TrainingSetup(batch_size=64, sequence_length=512, packed=True)
    assert sum(training_memory(config, plain).values()) > 16 * 2**30


def test_remedies_come_in_order_until_the_recipe_fits(capsys):
    recipe, preset = ROOT / "configuration/pretrain/paper.yaml", ROOT / "configuration/models/coe_c2_k4_n64.json"
    plan.main(["--model", str(preset), "--recipe", str(recipe), "--gpu", "6GB"])
    printed = capsys.readouterr().out
    places = [printed.find(name) for name in ("skip_logits: true", "a smaller micro-batch", "adamw_torch_8bit")]
    assert -1 not in places and places == sorted(places)
    assert "Then it fits" in printed


def test_the_micro_batch_shrinks_and_the_tokens_of_a_step_stay():
    config = CoEConfig(**CONFIG)
    setup = TrainingSetup(12, 64)
    memory = sum(training_memory(config, TrainingSetup(5, 64)).values())
    assert largest_micro_batch(config, setup, memory) == 5
    training = PretrainArguments(
        output_dir="unused", per_device_train_batch_size=12, gradient_accumulation_steps=1, report_to="none",
        auto_find_batch_size=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    fitted = arguments.fit_micro_batch(training, config, setup, memory)
    assert (fitted.per_device_train_batch_size, fitted.gradient_accumulation_steps) == (4, 3)
    assert not fitted.auto_find_batch_size
    # What was parsed stays as it was.
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (12, 1)
    assert training.auto_find_batch_size
    with pytest.raises(ValueError, match="Not one sequence of 64 tokens fits"):
        arguments.fit_micro_batch(training, config, setup, 1000)
    with pytest.raises(ValueError, match="fits CUDA GPUs"):
        arguments.free_memory(torch.device("cpu"))

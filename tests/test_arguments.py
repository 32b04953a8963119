# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Recipes and command lines: what is written is what a run gets, and what cannot be is refused with the remedy."""

import json
import re
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from conftest import build, whitespace_tokenizer
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_coe import folders
from modeling_coe.train import eval_lm, finetune, generate, plan, pretrain, serve, show_routing, upcycle
from modeling_coe.train.arguments import (
    DataArguments,
    FinetuneArguments,
    LayoutArguments,
    LoraArguments,
    ModelArguments,
    PretrainArguments,
    command_line,
    find_configuration,
    parse,
)
from modeling_coe.train.upcycle import UpcycleArguments


def recipe(tmp_path, text: str | bytes, *options: str, classes=(PretrainArguments,)):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse(*classes, arguments=["--config", str(path), *options])


def test_a_recipe_is_read_as_the_command_line_would_be(tmp_path):
    text = "use_cpu: yes\nsave_steps: 50\neval_strategy: no\nlearning_rate: 3e-4\nmax_steps: 7\nreport_to: [none]\n"
    text += "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 6, decay_type: linear}\n"
    (training,) = recipe(tmp_path, text + "save_total_limit: null\n", "--max_steps", "8")
    assert (training.eval_strategy, training.learning_rate, training.max_steps) == ("no", 3e-4, 8)
    assert training.lr_scheduler_kwargs == {"num_decay_steps": 6, "decay_type": "linear"}
    assert training.save_total_limit is None and training.report_to == []


def test_a_single_value_of_a_list_is_a_list_of_one(tmp_path):
    (upcycling,) = recipe(tmp_path, "layers: 3\n", classes=(UpcycleArguments,))
    assert upcycling.layers == [3]
    (upcycling,) = recipe(tmp_path, "layers: [3, 5]\n", classes=(UpcycleArguments,))
    assert upcycling.layers == [3, 5]


def test_a_list_of_other_things_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers: \['two'\].*takes a list of int"):
        recipe(tmp_path, "layers: [two]\n", classes=(UpcycleArguments,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: [1]", r"max_steps: \[1\].*takes one plain value"),
        ("max_steps: {a: 1}", "max_steps.*takes one plain value"),
        ("max_steps:", "max_steps: null.*takes one plain value"),
        ("max_steps: many", "max_steps.*'many'"),
        ("use_cpu: perhaps", "use_cpu.*perhaps"),
        ("lr_scheduler_type: 'constnt'", "constnt"),
        ("learning_rat: 1", r"has `learning_rat`.*did you mean `learning_rate`\?"),
        ("completely_different: 1", "has `completely_different`.*--help"),
        ("- a\n- b", "lines of `key: value`"),
        ("", "lines of `key: value`"),
        ("a: [", "cannot be read as YAML"),
        ("max_steps: !big 5", "could not determine a constructor for the tag '!big'"),
        ("max_steps: 5\nseed: 1\nmax_steps: 3", "has `max_steps` 2 times"),
        ("<<: {max_steps: 1, seed: 3}\nseed: 2", r"merges another mapping \(`<<`\)"),
        ("config: base.yaml", "names another recipe .*which a recipe does not; write its keys out"),
        ('{"model_type": "coe", "num_iterations": 2}', "is the configuration of a model; name it as `model`"),
        ("output_dir: läufe".encode("latin-1"), "recipe.yaml` cannot be read as YAML in UTF-8"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, text, "--use_cpu", "true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rat", "1"], "has `--learning-rat`.*did you mean `learning_rate`"),
        (["--max_step=3"], "did you mean `max_steps`"),
        (["stray"], "has `stray`"),
        (["--max_steps", "x"], "max_steps.*'x'"),
        (["--optim", "adamw_torhc"], "invalid choice"),
        (["--config", "a.yaml", "--config", "b.yaml"], "`--config` is given 2 times.*name one recipe"),
        (["--config", "nowhere.yaml"], "config=nowhere.yaml`: no such file"),
        (["--config"], "expected one argument"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse(ModelArguments, DataArguments, PretrainArguments, arguments=["--use_cpu", "true", *words])


def test_a_script_ends_with_a_message_and_a_call_with_the_error(monkeypatch, capsys):
    @command_line
    def main(arguments=None):
        raise ValueError("`size=0` must be at least 1.")

    with pytest.raises(ValueError, match="size=0"):
        main(["--size", "0"])
    with pytest.raises(SystemExit, match=r"^error: `size=0` must be at least 1\.\n.*PYTHONDEVMODE=1.*$"):
        main()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--questio", "What?"])
    with pytest.raises(SystemExit) as end:
        generate.main()
    assert len(str(end.value).splitlines()) <= 3 and capsys.readouterr() == ("", "")


def test_help_has_the_recipe_first_then_the_script_s_own_options_and_inherited_ones_on_request(capsys):
    def help_of(option):
        with pytest.raises(SystemExit):
            parse(ModelArguments, PretrainArguments, arguments=[option], description="What it does.")
        return capsys.readouterr().out

    brief, full = help_of("--help"), help_of("--help-all")
    places = [
        brief.index(part) for part in ("What it does.", "--config VALUE", "--model ", "--skip_logits ", "--help-all.")
    ]
    assert places == sorted(places)
    assert "--max_grad_norm" not in brief and full.index("--skip_logits ") < full.index("--max_grad_norm ")
    assert "(default: None)" not in full and "--skip-logits" not in full


COMMANDS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_about_the_installed_command_and_needs_no_checkout(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        import_module(COMMANDS[command].removesuffix(":main")).main()
    text = capsys.readouterr().out
    assert f"{command} " in text and not re.search(r"train/\w+\.py|model_cards/|--no_", text)
    for name in re.findall(r"configuration/\w+/\w+[.]\w+", text):
        assert Path(find_configuration(name)).exists(), name


SCRIPTS = {
    pretrain: ["--use_cpu", "true"],
    finetune: ["--use_cpu", "true"],
    eval_lm: [],
    show_routing: [],
    generate: ["--question", "How many?"],
    plan: ["--recipe", "configuration/pretrain/smoke.yaml", "--gpu", "8GB"],
}
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.rpartition(".")[2])


@scripts
@pytest.mark.parametrize("name", ["./nope", "nope/", "~/nope", "nope.json", "/runs/a/b/nope", "runs/smok"])
def test_a_mistyped_path_is_named_at_once(script, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    recipe = [str(pretrain.Path(word).resolve()) if word.endswith("yaml") else word for word in SCRIPTS[script]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"model={name}`: no such folder") as error:
        script.main([*recipe, "--model", name])
    assert time.monotonic() - start < 10
    assert ("Did you mean runs/smoke?" in str(error.value)) == (name == "runs/smok")


def test_a_repository_without_a_model_s_configuration_may_be_an_adapter(monkeypatch):
    class NoSuchFile(RemoteEntryNotFoundError):
        def __init__(self):
            pass

    def ask(url, timeout):
        raise NoSuchFile

    monkeypatch.setattr(folders, "get_hf_file_metadata", ask)
    (model,) = parse(ModelArguments, arguments=["--model", "user/adapter"])
    assert model.model == "user/adapter"


def test_a_mistyped_tokenizer_is_named_at_once():
    with pytest.raises(ValueError, match=r"tokenizer=configuration/tokens`: no such folder"):
        parse(ModelArguments, arguments=["--tokenizer", "configuration/tokens"])


@pytest.fixture
def chain(tmp_path):
    folder = tmp_path / "chain"
    build().save_pretrained(folder)
    whitespace_tokenizer().save_pretrained(folder)
    return folder


def a_field(name, value):
    return lambda text: json.dumps(json.loads(text) | {name: value})


DAMAGE = [
    *[("config.json", content, "config.json is damaged") for content in ("", "[]", "null", "3", '{"hidden_size"')],
    ("config.json", a_field("hidden_size", "64"), "config.json cannot be read: .*'hidden_size'.*expected int.*'64'"),
    ("config.json", a_field("hidden_size", None), "config.json cannot be read: .*'hidden_size'.*None"),
    ("config.json", a_field("num_iterations", 2.0), "config.json cannot be read: .*'num_iterations'.*2.0"),
    ("config.json", a_field("dtype", "float33"), "float33"),
    ("generation_config.json", "[]", r"generation_config.json is damaged: it holds \[\]"),
    ("generation_config.json", a_field("eos_token_id", "x"), "eos_token_id='x'` in .*generation_config.json"),
    ("tokenizer.json", "", "tokenizer.json is damaged, it holds no JSON"),
    ("tokenizer.json", "{}", "tokenizer.json is damaged: it lacks `added_tokens`"),
    ("tokenizer_config.json", "", "tokenizer_config.json is damaged"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json is damaged"),
    ("model.safetensors.index.json", "", "model.safetensors.index.json is damaged"),
    ("model.safetensors.index.json", "[]", "model.safetensors.index.json is damaged"),
    ("model.safetensors.index.json", "{}", "model.safetensors.index.json is damaged: it lacks `weight_map`"),
    ("adapter_config.json", "", "adapter_config.json is damaged"),
    ("adapter_config.json", "[]", "adapter_config.json is damaged"),
    ("adapter_config.json", "{}", "adapter_config.json is damaged: it lacks `peft_type`"),
    (
        "adapter_config.json",
        '{"peft_type": "LORA", "base_model_name_or_path": null}',
        "adapter_config.json: `base_model_name_or_path` is empty",
    ),
    (
        "adapter_config.json",
        '{"peft_type": "LORA", "base_model_name_or_path": "/no/base"}',
        "adapter_config.json: `base_model_name_or_path=/no/base`: no such folder",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE)
def test_a_damaged_file_of_a_model_is_named(name, content, message, chain):
    path = chain / name
    path.write_text(content if isinstance(content, str) else content(path.read_text()))
    with pytest.raises(ValueError, match=message):
        generate.main([*SCRIPTS[generate], "--model", str(chain)])


MODEL_READERS = {
    **{script: [*words, "--model"] for script, words in SCRIPTS.items()},
    serve: [],
    upcycle: ["--output", "unused", "--source"],
}


@pytest.mark.parametrize("script", MODEL_READERS, ids=lambda script: script.__name__.rpartition(".")[2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "neither config.json nor adapter_config.json"),
    ],
)
def test_every_command_names_the_file_that_is_damaged_or_gone(script, change, message, chain):
    change(chain)
    with pytest.raises(ValueError, match=message):
        script.main([*MODEL_READERS[script], str(chain)])


@pytest.mark.parametrize("script", MODEL_READERS, ids=lambda script: script.__name__.rpartition(".")[2])
@pytest.mark.parametrize(
    ("name", "message"), [("", "(model|source)` is empty"), ("rows.jsonl", "(model|source)=.*rows.jsonl` is a file")]
)
def test_a_model_without_a_name_and_a_file_in_its_place_are_refused(script, name, message, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    recipe = [str(Path(word).resolve()) if word.endswith("yaml") else word for word in MODEL_READERS[script]]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        script.main([*recipe, name])


def test_a_plan_to_serve_more_than_the_context_is_refused(chain):
    with pytest.raises(ValueError, match="`sequence_length=4096` exceeds the context of"):
        plan.main(["--model", str(chain), "--serve", "1x4096", "--ram", "8GB"])


def test_a_plan_to_serve_reads_the_same_files(chain):
    (chain / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        plan.main(["--model", str(chain), "--serve", "1x128", "--ram", "8GB"])


@pytest.mark.parametrize(("words", "new", "fits"), [(100, 4, True), (2, 125, False), (800, 1, False)])
def test_a_question_and_its_answer_beyond_the_context_are_refused(words, new, fits, chain, capsys):
    command = ["--question", "w5 " * words, "--max_new_tokens", str(new), "--model", str(chain)]
    if fits:
        generate.main(command)
        return
    with pytest.raises(ValueError, match=rf"max_new_tokens={new}`.*context is 128.*lower `max_new_tokens`"):
        generate.main(command)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A checkpoint of another type, and its configuration as a preset beside it."""
    folder = tmp_path_factory.mktemp("mixtral") / "checkpoint"
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    model.save_pretrained(folder)
    whitespace_tokenizer().save_pretrained(folder)
    model.config.to_json_file(folder.with_name("preset.json"))
    return folder


@pytest.mark.parametrize(
    ("script", "is_preset"),
    [(pretrain, True), (pretrain, False), (finetune, False), (show_routing, False), (plan, True), (plan, False)],
)
def test_a_model_of_another_type_is_refused_before_any_work(script, is_preset, mixtral, tmp_path, monkeypatch):
    if script is not plan:
        monkeypatch.setattr(script, "load_documents", None)
    model = mixtral.with_name("preset.json") if is_preset else mixtral
    output = [] if script is plan else ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=rf"model={model}` is a model of the type 'mixtral'.*coe-upcycle"):
        script.main([*SCRIPTS[script], "--model", str(model), *output])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [finetune, eval_lm, show_routing, generate])
def test_a_preset_is_no_checkpoint(script, tmp_path):
    output = [] if script is generate else ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="preset without weights"):
        script.main([*SCRIPTS[script], "--model", "configuration/models/coe_micro.json", *output])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "without `model_type`"), ('{"model_type": "coee"}', "'coee'"), ("{", "valid JSON"), ("", "valid JSON")],
)
def test_a_preset_that_is_none_is_refused(content, message, tmp_path):
    preset = tmp_path / "preset.json"
    preset.write_text(content)
    with pytest.raises((ValueError, OSError), match=rf"{preset}.*{message}|{message}.*{preset}|{preset}"):
        pretrain.main(["--use_cpu", "true", "--model", str(preset), "--output_dir", str(tmp_path / "run")])


def test_an_adapter_is_no_model_to_start_from(chain, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": str(chain)}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is an adapter; merge it"):
        finetune.main([*SCRIPTS[finetune], "--model", str(adapter), "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize("training", [PretrainArguments, FinetuneArguments])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps=0` must be at least 1"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size=0` must be at least 1"),
        ("--per_device_eval_batch_size -1", "per_device_eval_batch_size=-1` must be at least 1"),
        ("--learning_rate nan", "learning_rate=nan` must be at least 0, and finite"),
        ("--learning_rate -1", "learning_rate=-1.0` must be at least 0"),
        ("--weight_decay inf", "weight_decay=inf` must be"),
        ("--max_grad_norm nan", "max_grad_norm=nan` must be"),
        ("--warmup_steps -5", "warmup_steps=-5.0` must be at least 0"),
        ("--seed -1", "seed=-1` must be at least 0"),
        ("--max_steps 0", "max_steps=0` must be at least 1; leave it out"),
        ("--num_train_epochs 0", "num_train_epochs=0.*max_steps"),
        ("--save_only_model true", "save_only_model=True` is not supported.*Leave it out"),
        ("--ignore_data_skip true", "ignore_data_skip=True` is not supported"),
        ("--load_best_model_at_end true --save_strategy no", "load_best_model_at_end=True` is not supported"),
        ("--push_to_hub true", "push_to_hub=True.*coe-publish"),
        ("--lr_scheduler_kwargs {num_decay_steps:3}", "lr_scheduler_kwargs={num_decay_steps:3}` is no JSON"),
        ('--lr_scheduler_kwargs {"decay":3}', "lr_scheduler_kwargs=.*do not fit `lr_scheduler_type="),
        ("--lr_scheduler_kwargs 7", "lr_scheduler_kwargs=7` do not fit"),
        ("--lr_scheduler_type warmup_stable_decay", "do not fit `lr_scheduler_type=.*num_decay_steps"),
    ],
)
def test_impossible_training_is_refused_by_name(training, words, message):
    with pytest.raises(ValueError, match=message):
        parse(training, arguments=["--use_cpu", "true", "--output_dir", "unused", *words.split()])


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        ("--save_steps 0.5 --logging_steps 0.1", False),
        ("--save_steps 0.5 --logging_steps 0.1 --max_steps 30", False),
        ("--save_steps 0.3 --logging_steps 0.2", True),
        ("--save_steps 0.2 --logging_steps 0.1 --max_steps 33", True),
        ("--save_steps 0.1 --logging_steps 5 --max_steps 100", False),
        ("--save_steps 10 --logging_steps 0.5", True),
        ("--save_steps 0", False),
        ("--save_steps 15 --logging_steps 10", True),
        ("--save_steps 15 --logging_steps 10 --logging_strategy epoch", False),
        ("--save_steps 15 --logging_steps 0 --logging_strategy no --eval_strategy no", False),
    ],
)
def test_checkpoints_and_points_of_the_curve_are_compared_in_the_steps_that_trainer_takes(words, is_refused):
    words = ["--use_cpu", "true", "--output_dir", "unused", *words.split()]
    if not is_refused:
        parse(PretrainArguments, arguments=words)
        return
    with pytest.raises(ValueError, match="must be a multiple of `logging_steps"):
        parse(PretrainArguments, arguments=words)


def test_shares_of_the_steps_are_refused_with_the_steps_they_are():
    words = "--use_cpu true --output_dir unused --max_steps 33 --save_steps 0.2 --logging_steps 0.1"
    with pytest.raises(ValueError, match=r"save_steps=0.2` .*`logging_steps=0.1` \(7 and 4 of 33 steps\)"):
        parse(PretrainArguments, arguments=words.split())


@pytest.mark.parametrize(
    ("arguments", "words", "message"),
    [
        (FinetuneArguments, "--use_cpu true --max_length 1024", "max_length=1024.*set `sequence_length`"),
        (FinetuneArguments, "--use_cpu true --dataset_text_field body", "dataset_text_field=body.*set `text_column`"),
        (LoraArguments, "--lora_r 16", "lora_r=16.*set `lora=true`"),
        (LoraArguments, "--lora_experts false", "lora_experts=False.*set `lora=true`"),
        (LoraArguments, "--load_in_4bit true", "load_in_4bit=True.*set `lora=true`"),
        (LoraArguments, "--lora true --lora_r 0", "lora_r=0` must be at least 1"),
        (LoraArguments, "--lora true --lora_router ful", "lora_router=ful` must be one of"),
        (LayoutArguments, "--fsdp_size 0", "fsdp_size=0` must be at least 1"),
        (eval_lm.EvaluationArguments, "--batch_size 0", "batch_size=0` must be at least 1"),
        (show_routing.RoutingArguments, "--documents 0", "documents=0` must be at least 1"),
        (DataArguments, "--max_new_tokens 0", "max_new_tokens=0` must be at least 1"),
        (DataArguments, "--scored_problems -1", "scored_problems=-1` must be at least 0"),
    ],
)
def test_options_without_effect_or_meaning_are_refused_by_name(arguments, words, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments, arguments=words.split())


@pytest.mark.parametrize(
    ("script", "option", "remedy"),
    [(pretrain, "drop_long_documents", "split_long_documents"), (finetune, "split_long_documents", "drop_long")],
)
def test_long_documents_are_cut_in_pretraining_and_dropped_in_fine_tuning(script, option, remedy):
    with pytest.raises(ValueError, match=f"{option}=true` is for .*set `{remedy}"):
        script.main([*SCRIPTS[script], f"--{option}", "true", "--model", "configuration/models/coe_micro.json"])

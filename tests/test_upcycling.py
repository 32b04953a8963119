# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Upcycled checkpoints compute what transformers' own class of the source computes, and appear whole or not at all."""

import copy
import inspect
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from modeling_coe import CoEForCausalLM, QuantizedExpertsConfig, downcycle, upcycle, upcycling


ROOT = Path(__file__).parent.parent
# Every size differs from every other, so that no transposed or swapped matrix fits.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": {"intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 10},
    "olmoe": {"intermediate_size": 40, "num_experts": 5, "num_experts_per_tok": 3},
    "qwen3_moe": {
        "moe_intermediate_size": 40,
        "intermediate_size": 56,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "head_dim": 10,
        "norm_topk_prob": True,
    },
    "granitemoe": {
        "intermediate_size": 40,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
    },
    "llama": {"intermediate_size": 40, "head_dim": 10},
    "mistral": {"intermediate_size": 40, "head_dim": 10, "sliding_window": 5},
    "qwen3": {"intermediate_size": 40, "head_dim": 10},
}
MOE = ("mixtral", "olmoe", "qwen3_moe", "granitemoe")


def source_model(family, **overrides):
    """A random model of the family; weights are wide enough for logits of order 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | FAMILIES[family] | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1.0 if name.endswith(("gate.weight", "router.weight")) else 0.2)
    return model.eval()


def saved(model, folder, layout="separate", **options):
    """Save in one of the two layouts of MoE checkpoints: one tensor per expert (transformers 4) or fused (5)."""
    model.save_pretrained(folder, save_original_format=layout == "separate", **options)
    return folder


def tokens(length=17, batch=2):
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(source, chain):
    """Largest logit difference, and the largest logit of the source."""
    expected, found = source(tokens()).logits.float(), chain(tokens()).logits.float()
    return (expected - found).abs().max().item(), expected.abs().max().item()


@torch.no_grad()
def relative_difference(source, chain):
    """Root mean square of the logit differences over that of the source's logits."""
    expected, found = source(tokens()).logits.float(), chain(tokens()).logits.float()
    return ((expected - found).norm() / expected.norm()).item()


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("num_iterations", [2, 3])
@pytest.mark.parametrize("layout", ["separate", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_forward_and_generation_are_the_sources(family, layout, num_iterations, tmp_path):
    source = source_model(family)
    upcycle(saved(source, tmp_path / "source", layout), tmp_path / "chain", num_iterations=num_iterations)
    chain = AutoModelForCausalLM.from_pretrained(tmp_path / "chain")
    assert type(chain) is CoEForCausalLM and chain.config.num_iterations == num_iterations
    largest, scale = difference(source, chain)
    assert largest <= 1e-5 and scale > 0.5
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(source.generate(tokens(), **options), chain.generate(tokens(), **options))
    # Not vacuous: what the later iterations would add is far from nothing.
    with torch.no_grad():
        for layer in chain.model.layers:
            layer.mlp.iteration_scale[1:] = 1.0
    assert difference(source, chain)[0] > 1e-2


def test_both_layouts_on_disk_are_the_ones_transformers_writes(tmp_path):
    """The two folders above really differ, and hold what v4 and v5 checkpoints of each family hold."""
    separate = {
        "mixtral": "block_sparse_moe.experts.4.w1.weight",
        "granitemoe": "block_sparse_moe.input_linear.weight",
    }
    for family in MOE:
        names = {}
        for layout in ("separate", "fused"):
            saved(source_model(family), tmp_path / family / layout, layout)
            with safe_open(tmp_path / family / layout / "model.safetensors", framework="pt") as file:
                names[layout] = set(file.keys())
        assert "model.layers.1." + separate.get(family, "mlp.experts.4.gate_proj.weight") in names["separate"]
        assert any(name.endswith("layers.1.mlp.experts.gate_up_proj") for name in names["fused"]) or (
            family == "granitemoe" and "model.layers.1.block_sparse_moe.experts.gate_up_proj" in names["fused"]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_sources_stay_bf16_and_equal(family, tmp_path):
    source = source_model(family).bfloat16()
    saved(source, tmp_path / "source")
    upcycle(tmp_path / "source", tmp_path / "chain")
    weights = load_file(tmp_path / "chain" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    chain = AutoModelForCausalLM.from_pretrained(tmp_path / "chain")
    assert chain.dtype == torch.bfloat16
    # In bf16 arithmetic a near tie may be routed otherwise: CoE's routers multiply in fp32, the sources' in bf16.
    assert relative_difference(source, chain) <= 2e-2
    # In fp32 only Granite differs: folding its multipliers rounds bf16 weights once more.
    source, chain = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("source", "chain")
    )
    if family == "granitemoe":
        assert relative_difference(source, chain) <= 2e-2
    else:
        assert difference(source, chain)[0] <= 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "olmoe", "granitemoe"])
def test_attention_biases_are_kept(family):
    source = source_model(family, attention_bias=True)
    chain = upcycle(source)
    assert chain.model.layers[1].self_attn.k_proj.bias.abs().sum() > 0
    assert difference(source, chain)[0] <= 1e-5


ROPE = {"rope_theta": 500.0, "original_max_position_embeddings": 8, "factor": 4.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "attention_factor": 1.3}
SLIDING = {"use_sliding_window": True, "sliding_window": 3}
KEPT = {
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("qwen3_moe", {"rope_parameters": YARN}),
    "sliding window of Mixtral": ("mixtral", {"sliding_window": 3}),
    "sliding window of Qwen3-MoE": ("qwen3_moe", SLIDING),
    "sliding window of Qwen3": ("qwen3", SLIDING | {"max_window_layers": 0}),
    "unused sliding window of Qwen3": ("qwen3", SLIDING | {"max_window_layers": 9}),
    "top-k weights of OLMoE": ("olmoe", {"norm_topk_prob": True}),
    "top-k weights of Qwen3-MoE": ("qwen3_moe", {"norm_topk_prob": False}),
    "tied embeddings of Llama": ("llama", {"tie_word_embeddings": True}),
    "tied embeddings of Qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "untied embeddings of Granite": ("granitemoe", {"tie_word_embeddings": False}),
    "epsilon": ("mixtral", {"rms_norm_eps": 0.3}),
    "epsilon of Granite": ("granitemoe", {"rms_norm_eps": 0.3}),
    "activation": ("olmoe", {"hidden_act": "gelu"}),
}  # fmt: skip


@pytest.mark.parametrize("what", KEPT)
def test_what_the_source_has_is_kept(what, tmp_path):
    family, overrides = KEPT[what]
    source = source_model(family, **overrides)
    upcycle(saved(source, tmp_path / "source"), tmp_path / "chain")
    chain = AutoModelForCausalLM.from_pretrained(tmp_path / "chain")
    assert difference(source, chain)[0] <= 1e-5
    tied = source.config.tie_word_embeddings
    assert (chain.lm_head.weight is chain.model.embed_tokens.weight) is tied
    assert ("lm_head.weight" in load_file(tmp_path / "chain" / "model.safetensors")) is not tied


@pytest.mark.parametrize("holds", ["two matrices", "the head alone"])
def test_a_checkpoint_that_contradicts_its_tying_becomes_what_transformers_loads(holds, tmp_path):
    saved(source_model("llama", tie_word_embeddings=True), tmp_path / "source")
    file, embedding = tmp_path / "source" / "model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors[embedding].flip(0).contiguous()
    if holds == "the head alone":
        del tensors[embedding]
    save_file(tensors, file, {"format": "pt"})
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    chain = upcycle(tmp_path / "source")
    assert chain.config.tie_word_embeddings is (holds == "the head alone")
    assert difference(source, chain)[0] <= 1e-5


def test_making_the_weights_leaves_the_callers_config_as_it_was(tmp_path):
    """The weights settle dtype and tying for themselves, here against what the config says."""
    saved(source_model("llama", tie_word_embeddings=True).bfloat16(), tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, file, {"format": "pt"})
    source = upcycling._Source(tmp_path / "source", None, False)
    config = upcycling.chain_config(source.config)
    before = copy.deepcopy(config.to_dict())
    weights = upcycling._ChainWeights(source, config, None, 0.0, 0.0, 0)
    assert config.to_dict() == before and config.tie_word_embeddings and not weights.config.tie_word_embeddings


def with_tokenizer(folder):
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "the", "boat", "left"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    wrapped.save_pretrained(folder)
    return wrapped


def test_tokenizer_generation_settings_special_tokens_and_licence_travel_along(tmp_path):
    source = source_model("mixtral", eos_token_id=[2, 7])
    source.generation_config.temperature, source.generation_config.do_sample = 0.6, True
    saved(source, tmp_path / "source")
    tokenizer = with_tokenizer(tmp_path / "source")
    for name in ("LICENSE", "README.md", "training_args.bin"):
        (tmp_path / "source" / name).write_text(name)
    upcycle(tmp_path / "source", tmp_path / "chain", verify=True)
    chain = AutoModelForCausalLM.from_pretrained(tmp_path / "chain")
    assert chain.config.eos_token_id == [2, 7] and chain.config.pad_token_id == 0
    assert chain.generation_config.temperature == 0.6 and chain.generation_config.eos_token_id == [2, 7]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "chain")
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.eos_token == "</s>"
    assert loaded.chat_template == tokenizer.chat_template
    names = leftovers(tmp_path / "chain")
    # The source's model card and its training state do not describe the chain.
    assert "LICENSE" in names and not {"README.md", "training_args.bin"} & set(names)
    assert upcycle(tmp_path / "source").generation_config.temperature == 0.6


def test_result_is_an_ordinary_fused_coe_checkpoint(tmp_path):
    upcycle(saved(source_model("mixtral"), tmp_path / "source"), tmp_path / "chain")
    chain = CoEForCausalLM.from_pretrained(tmp_path / "chain")
    chain.save_pretrained(tmp_path / "again")
    conversion = {"facts.json", "written.json"}
    assert set(leftovers(tmp_path / "chain")) - conversion == set(leftovers(tmp_path / "again"))
    for name in ("config.json", "modeling_coe.py", "configuration_coe.py"):
        assert (tmp_path / "chain" / name).read_text() == (tmp_path / "again" / name).read_text()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("chain", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert "model.layers.1.mlp.experts.gate_up_proj" in first


@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_sharded_source_and_sharded_result_hold_the_same_weights(layout, tmp_path):
    source = source_model("qwen3_moe")
    saved(source, tmp_path / "source", layout, max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    upcycle(tmp_path / "source", tmp_path / "chain", max_shard_size="30KB")
    files = {path.name: load_file(path) for path in (tmp_path / "chain").glob("*.safetensors")}
    assert len(files) > 3
    index = json.loads((tmp_path / "chain" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    sizes = [tensor.nbytes for tensors in files.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert difference(source, AutoModelForCausalLM.from_pretrained(tmp_path / "chain"))[0] <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_model_and_its_folder_give_the_same_chain(family, tmp_path):
    source = source_model(family)
    options = {"num_iterations": 3, "router_noise": 0.1, "seed": 3}
    from_model = upcycle(source, **options)
    upcycle(saved(source, tmp_path / "source"), tmp_path / "chain", **options)
    upcycle(source, tmp_path / "written", **options)
    expected = from_model.state_dict()
    for folder in ("chain", "written"):
        chain = CoEForCausalLM.from_pretrained(tmp_path / folder)
        assert chain.config.to_diff_dict() | {"_name_or_path": ""} == from_model.config.to_diff_dict() | {
            "_name_or_path": ""
        }
        assert all(torch.equal(tensor, expected[name]) for name, tensor in chain.state_dict().items())
    # Training the chain must not train the source.
    storages = {parameter.data_ptr() for parameter in source.parameters()}
    assert not storages & {parameter.data_ptr() for parameter in from_model.parameters()}


def test_hub_id_is_downloaded_without_foreign_weight_formats(tmp_path, monkeypatch):
    calls = {}

    def download(repo, allow_patterns, ignore_patterns):
        calls.update(repo=repo, allow=allow_patterns, ignore=ignore_patterns)
        return str(tmp_path / "source")

    saved(source_model("llama"), tmp_path / "source")
    monkeypatch.setattr(upcycling, "require_model", lambda option, name: None)
    monkeypatch.setattr(upcycling, "snapshot_download", download)
    assert isinstance(upcycle("someone/small-llama"), CoEForCausalLM)
    assert calls["repo"] == "someone/small-llama" and "*.safetensors" in calls["allow"]
    assert "original/*" in calls["ignore"] and not any(pattern.endswith(".bin") for pattern in calls["allow"])


REFUSED = {
    "model_type": ("gpt2", {}, {}),
    "clip_qkv": ("olmoe", {"clip_qkv": 8.0}, {}),
    "mlp_bias": ("llama", {"mlp_bias": True}, {}),
    "mlp_only_layers": ("qwen3_moe", {"mlp_only_layers": [1]}, {}),
    "decoder_sparse_step": ("qwen3_moe", {"decoder_sparse_step": 2}, {}),
    "layer_types": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {}),
    "num_experts": ("mixtral", {}, {"num_experts": 4}),
    "expert_noise": ("mixtral", {}, {"expert_noise": 0.1}),
    "num_experts_per_tok": ("mixtral", {}, {"experts_per_iteration": 6}),
    "num_iterations": ("mixtral", {}, {"num_iterations": 0}),
    "layers": ("mixtral", {}, {"layers": [0, 3]}),
    "distinct layers": ("mixtral", {}, {"layers": [0, 0]}),
    "num_hidden_layers": ("mixtral", {}, {"layers": []}),
    "verify_text": ("mixtral", {}, {"verify": True, "verify_text": os.devnull}),
    "verify_text='/no/such/text'": ("mixtral", {}, {"verify": True, "verify_text": "/no/such/text"}),
    "verify_text=.* cannot be read: 'utf-8'": ("mixtral", {}, {"verify": True, "verify_text": sys.executable}),
    "verify=True": ("mixtral", {}, {"verify_text": os.devnull}),
    "router_noise=nan": ("mixtral", {}, {"router_noise": float("nan")}),
    "router_noise=-0.1": ("mixtral", {}, {"router_noise": -0.1}),
    "router_noise='0.1'": ("mixtral", {}, {"router_noise": "0.1"}),
    "expert_noise=inf": ("llama", {}, {"expert_noise": float("inf")}),
    "num_iterations=2.0": ("mixtral", {}, {"num_iterations": 2.0}),
    "experts_per_iteration=0": ("mixtral", {}, {"experts_per_iteration": 0}),
    "num_experts=-1": ("llama", {}, {"num_experts": -1}),
    "seed=-1": ("mixtral", {}, {"seed": -1}),
    "layers='012'": ("mixtral", {}, {"layers": "012"}),
    "max_shard_size": ("mixtral", {}, {"max_shard_size": "5 elephants"}),
    "max_shard_size=0": ("mixtral", {}, {"max_shard_size": 0}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_coe_cannot_express_is_refused_by_name_before_anything_is_written(name, tmp_path):
    family, overrides, options = REFUSED[name]
    if family == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=8, n_head=2, n_layer=1, vocab_size=11)
        source = AutoModelForCausalLM.from_config(config)
    else:
        source = source_model(family, **overrides)
    source.save_pretrained(tmp_path / "source")
    for given in (source, tmp_path / "source"):
        with pytest.raises(ValueError, match=name):
            upcycle(given, tmp_path / "chain", **options)
    assert leftovers(tmp_path) == ["source"]


def corrupt(folder, what):
    """Damage a saved checkpoint in one way; returns what the error has to name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if what == "quantized":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8"}
        (folder / "config.json").write_text(json.dumps(config))
        return "quantization_config"
    if what == "pickled":
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        return "model.safetensors"
    if what == "incomplete":
        index = {"weight_map": dict.fromkeys(tensors, "model-00002-of-00003.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return "model-00002-of-00003.safetensors"
    if what == "stranger":
        tensors["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"] = torch.zeros(5)
    elif what == "missing":
        del tensors["model.layers.2.block_sparse_moe.experts.3.w2.weight"]
    elif what == "headless":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    elif what == "cut off":
        os.truncate(file, file.stat().st_size - 1000)
        return "model.safetensors is damaged or cut off"
    elif what == "damaged index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map"')
        return "index.json is damaged"
    elif what == "index of another checkpoint":
        index = {"weight_map": dict.fromkeys(tensors, file.name) | {"model.layers.7.mlp.gate.weight": file.name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return r"lack \['model.layers.7.mlp.gate.weight'\]"
    elif what == "damaged facts":
        (folder / "facts.json").write_text("{")
        return "facts.json is damaged"
    elif what == "misshapen":
        tensors["model.layers.2.block_sparse_moe.experts.3.w2.weight"] = torch.zeros(40, 24)
    save_file(tensors, file, {"format": "pt"})
    names = {"stranger": "e_score_correction_bias", "headless": "embed_tokens"}
    return names.get(what, "model.layers.2.mlp.experts.3.down_proj.weight")


@pytest.mark.parametrize(
    "what",
    [
        "quantized", "pickled", "incomplete", "stranger", "missing", "headless", "misshapen", "cut off",
        "damaged index", "index of another checkpoint", "damaged facts",
    ],
)  # fmt: skip
def test_a_checkpoint_with_missing_or_unknown_tensors_is_refused_by_name(what, tmp_path):
    saved(source_model("mixtral"), tmp_path / "source")
    named = corrupt(tmp_path / "source", what)
    with pytest.raises(ValueError, match=named):
        upcycle(tmp_path / "source", tmp_path / "chain")
    assert leftovers(tmp_path) == ["source"]


def test_adapters_are_refused(tmp_path):
    adapted = get_peft_model(source_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge adapters"):
        upcycle(adapted, tmp_path / "chain")


@pytest.mark.parametrize("convert", [upcycle, downcycle])
def test_a_model_with_an_adapter_in_it_is_refused_and_its_merged_one_taken(convert, tmp_path):
    model = source_model("llama") if convert is upcycle else build(num_iterations=1)
    model.save_pretrained(tmp_path)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"with an adapter in it; merge it first.*merge_and_unload"):
        convert(loaded)
    convert(AutoPeftModelForCausalLM.from_pretrained(tmp_path).merge_and_unload())


@pytest.mark.parametrize("convert", [upcycle, downcycle])
def test_an_adapter_in_the_folder_of_its_base_is_refused_and_can_be_merged_as_the_error_says(convert, tmp_path):
    source, apart = tmp_path / "source", tmp_path / "apart"
    model = source_model("llama") if convert is upcycle else build(num_iterations=1)
    model.save_pretrained(source)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(source), config)
    adapted.save_pretrained(source)
    with pytest.raises(ValueError, match=r"`source=.*source` holds an adapter; merge it first.*merge_and_unload"):
        convert(source, tmp_path / "result")
    assert leftovers(tmp_path) == ["source"]

    apart.mkdir()
    for path in source.glob("adapter*"):
        path.rename(apart / path.name)
    AutoPeftModelForCausalLM.from_pretrained(apart).merge_and_unload().save_pretrained(tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "result")
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    assert difference(adapted.eval(), result)[0] <= 1e-5 < difference(model, result)[0]


def test_existing_output_is_kept_unless_overwrite_is_asked_for(tmp_path, monkeypatch):
    saved(source_model("mixtral"), tmp_path / "source")
    upcycle(tmp_path / "source", tmp_path / "chain", num_iterations=3)
    with pytest.raises(FileExistsError, match="overwrite"):
        upcycle(tmp_path / "source", tmp_path / "chain")
    with pytest.raises(ValueError, match="source itself"):
        upcycle(tmp_path / "source", tmp_path / "source", overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(upcycling, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            upcycle(tmp_path / "source", tmp_path / "chain", overwrite=True)
    assert CoEForCausalLM.from_pretrained(tmp_path / "chain").config.num_iterations == 3
    assert leftovers(tmp_path) == ["chain", "source"]
    upcycle(tmp_path / "source", tmp_path / "chain", overwrite=True)
    assert leftovers(tmp_path) == ["chain", "source"]
    assert CoEForCausalLM.from_pretrained(tmp_path / "chain").config.num_iterations == 2


KILLED_AT_EVERY_WRITE = """
import os, signal, subprocess, sys
from pathlib import Path
from modeling_coe import upcycling

folder, source, save_file = Path(sys.argv[1]), sys.argv[2], upcycling.save_file
former = Path(sys.argv[3]) if len(sys.argv) > 3 else None

def convert(stop):
    events = 0
    def count(event, arguments):
        nonlocal events
        path = str(arguments[0]) if arguments else ""
        writes = event in ("os.rename", "os.mkdir", "os.chmod", "os.remove", "shutil.rmtree", "half a file")
        writes |= event == "open" and isinstance(arguments[1], str) and any(mode in arguments[1] for mode in "wxa")
        if writes and path.startswith(str(folder)):
            events += 1
            if events == stop:
                os.kill(os.getpid(), signal.SIGKILL)
    def torn_save_file(tensors, file, metadata):
        sys.audit("half a file", str(file))
        save_file(tensors, file, metadata)
        content = Path(file).read_bytes()
        os.truncate(file, len(content) // 2)
        sys.audit("half a file", str(file))
        os.truncate(file, 0)
        with os.fdopen(os.open(file, os.O_WRONLY), "wb") as whole:
            whole.write(content)
    upcycling.save_file = torn_save_file
    sys.addaudithook(count)
    upcycling.upcycle(source, folder / str(stop) / "chain", max_shard_size="60KB", overwrite=former is not None)

for stop in range(1, 200):
    (folder / str(stop)).mkdir()
    if former is not None:
        subprocess.run(["cp", "-a", former, folder / str(stop) / "chain"], check=True)
    child = os.fork()
    if child == 0:
        convert(stop)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.WEXITSTATUS(status))
sys.exit("never finished")
"""


def test_a_killed_conversion_leaves_no_folder_that_looks_whole(tmp_path):
    """SIGKILL at the k-th write, for every k until the conversion survives, half-written weight files included."""
    source = source_model("mixtral")
    saved(source, tmp_path / "source")
    with_tokenizer(tmp_path / "source")
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-c", KILLED_AT_EVERY_WRITE, str(tmp_path / "runs"), str(tmp_path / "source")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *killed, finished = sorted((tmp_path / "runs").iterdir(), key=lambda path: int(path.name))
    assert len(killed) > 10 and leftovers(finished) == ["chain"]
    assert difference(source, CoEForCausalLM.from_pretrained(finished / "chain"))[0] <= 1e-5
    seen_half_a_file = False
    for run in killed:
        if (run / "chain").exists():  # all that was missing is the removal of the lock
            assert difference(source, CoEForCausalLM.from_pretrained(run / "chain"))[0] <= 1e-5
        assert set(leftovers(run)) <= {"chain", ".chain.incomplete"}
        for partial in run.glob(".chain.incomplete/new"):
            weights = list(partial.glob("*.safetensors"))
            seen_half_a_file |= bool(weights) and not (partial / "modeling_coe.py").exists()
            config = partial / "config.json"
            if config.exists() and config.stat().st_size:
                # All that was missing is the rename.
                assert difference(source, CoEForCausalLM.from_pretrained(partial))[0] <= 1e-5
            else:
                with pytest.raises((OSError, ValueError)):
                    AutoModelForCausalLM.from_pretrained(partial)
    assert seen_half_a_file


def test_a_killed_replacement_leaves_the_old_folder_or_the_new_and_the_next_one_completes(tmp_path, caplog):
    """SIGKILL at the k-th write of `overwrite=True`, for every k until the conversion survives."""
    saved(source_model("mixtral"), tmp_path / "source")
    upcycle(tmp_path / "source", tmp_path / "former", num_iterations=3)
    (tmp_path / "runs").mkdir()
    folders = [str(tmp_path / name) for name in ("runs", "source", "former")]
    command = [sys.executable, "-c", KILLED_AT_EVERY_WRITE, *folders]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *killed, finished = sorted((tmp_path / "runs").iterdir(), key=lambda path: int(path.name))
    seen = set()
    for run in killed:
        old, chain = run / ".chain.incomplete" / "old", run / "chain"
        # Between the two renames the old folder is in the hidden one.
        whole = CoEForCausalLM.from_pretrained(chain if chain.exists() else old)
        seen.add((whole.config.num_iterations, chain.exists()))
    assert seen == {(3, True), (3, False), (2, True)}
    for run in (*killed, finished):
        upcycle(tmp_path / "source", run / "chain", overwrite=True)
        assert leftovers(run) == ["chain"]
        assert CoEForCausalLM.from_pretrained(run / "chain").config.num_iterations == 2
    assert "it is put back" in caplog.text and "Removing the unfinished" in caplog.text


def test_verification_reports_and_a_failed_one_leaves_no_output(tmp_path, monkeypatch, caplog):
    saved(source_model("granitemoe"), tmp_path / "source")
    (tmp_path / "text").write_text("She sold clips to 48 friends.\n\nHow many is that?\n")
    with caplog.at_level(logging.INFO):
        upcycle(tmp_path / "source", tmp_path / "chain", verify=True, verify_text=tmp_path / "text")
    assert "max abs logit difference" in caplog.text and "KL(source || chain)" in caplog.text
    assert "over 46 tokens in fp32" in caplog.text
    monkeypatch.setattr(upcycling, "_folded_multipliers", lambda source: {"o_proj.weight": 0.99})
    for options in ({"output": tmp_path / "broken"}, {}):
        with pytest.raises(RuntimeError, match="max abs logit difference"):
            upcycle(tmp_path / "source", verify=True, **options)
    assert leftovers(tmp_path) == ["chain", "source", "text"]


def test_equal_compute_does_not_preserve_and_says_so(tmp_path, caplog):
    source = source_model("granitemoe")
    saved(source, tmp_path / "source")
    with caplog.at_level(logging.INFO):
        upcycle(tmp_path / "source", tmp_path / "chain", experts_per_iteration=1, verify=True)
    assert "1 experts per iteration instead of 3" in caplog.text and "max abs logit difference" in caplog.text
    chain = CoEForCausalLM.from_pretrained(tmp_path / "chain")
    assert chain.config.num_experts_per_tok == 1 and difference(source, chain)[0] > 1e-2
    caplog.clear()
    upcycle(source, experts_per_iteration=3)
    assert "does not compute the source's function" not in caplog.text


@pytest.mark.parametrize("experts, chosen", [(1, 1), (3, 2), (4, 4)])
def test_dense_source_is_preserved_for_every_number_of_copies_and_choices(experts, chosen):
    source = source_model("qwen3")
    chain = upcycle(source, num_experts=experts, experts_per_iteration=chosen)
    assert chain.config.num_local_experts == experts and chain.config.num_experts_per_tok == chosen
    assert difference(source, chain)[0] <= 1e-5


def test_noise_on_dense_copies_tells_them_apart_and_says_so(caplog):
    source = source_model("llama")
    assert "does not compute" not in caplog.text
    chain = upcycle(source, num_experts=3, expert_noise=0.05, seed=1)
    assert "expert_noise=0.05" in caplog.text
    experts = chain.model.layers[1].mlp.experts
    copies = {"gate_proj": experts.gate_up_proj[:, :40], "up_proj": experts.gate_up_proj[:, 40:]}
    for name, found in (copies | {"down_proj": experts.down_proj}).items():
        original = source.get_submodule("model.layers.1.mlp." + name).weight
        added = found - original
        assert (added.std() / original.std()).item() == pytest.approx(0.05, rel=0.1)
        assert not torch.equal(found[0], found[1])
    again, other = (upcycle(source, num_experts=3, expert_noise=0.05, seed=seed) for seed in (1, 2))
    assert torch.equal(again.model.layers[1].mlp.experts.down_proj, experts.down_proj)
    assert not torch.equal(other.model.layers[1].mlp.experts.down_proj, experts.down_proj)


def test_later_routers_are_copies_plus_noise_and_the_first_is_the_sources():
    source = source_model("mixtral")
    router = source.model.layers[1].mlp.gate.weight
    copied = upcycle(source, num_iterations=3).model.layers[1].mlp.gate.weight
    assert all(torch.equal(copied[iteration], router) for iteration in range(3))
    noisy = upcycle(source, num_iterations=3, router_noise=0.2)
    first, *later = noisy.model.layers[1].mlp.gate.weight
    assert torch.equal(first, router) and not torch.equal(*later)
    for weight in later:
        assert ((weight - router).std() / router.std()).item() == pytest.approx(0.2, rel=0.25)
    assert difference(source, noisy)[0] <= 1e-5


def test_layers_keeps_the_named_source_layers_in_order(tmp_path, caplog):
    source = source_model("mixtral")
    upcycle(saved(source, tmp_path / "source"), tmp_path / "chain", layers=[2, 0])
    assert "layers [2, 0] of 3" in caplog.text
    chain = CoEForCausalLM.from_pretrained(tmp_path / "chain")
    source.model.layers = torch.nn.ModuleList([source.model.layers[2], source.model.layers[0]])
    source.config.num_hidden_layers = 2
    for index, layer in enumerate(source.model.layers):
        layer.self_attn.layer_idx = index
    assert difference(source, chain)[0] <= 1e-5


@pytest.mark.parametrize("layers", [range(3), (0, 1, 2)])
def test_all_layers_in_order_change_nothing_whatever_lists_them(layers, tmp_path):
    upcycle(saved(source_model("mixtral"), tmp_path / "source"), tmp_path / "chain", layers=layers)
    facts = json.loads((tmp_path / "chain" / "facts.json").read_text())["upcycling"]
    assert facts["layers"] == [0, 1, 2] and facts["changes_of_function"] == []


def test_training_starts_at_the_scale_and_reaches_the_later_routers_after_one_step():
    chain = upcycle(source_model("mixtral"), router_noise=0.1).train()
    chain.config.router_aux_loss_coef = 0.0
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-2)
    block = chain.model.layers[1].mlp
    chain(tokens(), labels=tokens()).loss.backward()
    assert block.iteration_scale.grad[1].abs() > 0
    assert block.gate.weight.grad[0].abs().sum() > 0 and block.gate.weight.grad[1].abs().sum() == 0
    optimizer.step()
    optimizer.zero_grad()
    chain(tokens(), labels=tokens()).loss.backward()
    assert block.gate.weight.grad[1].abs().sum() > 0


def test_downcycled_chain_of_one_iteration_is_a_mixtral(tmp_path):
    source = build(num_iterations=1, iteration_scale=True)
    source.save_pretrained(tmp_path / "chain")
    with_tokenizer(tmp_path / "chain")
    downcycle(tmp_path / "chain", tmp_path / "mixtral")
    with safe_open(tmp_path / "mixtral" / "model.safetensors", framework="pt") as file:
        assert "model.layers.1.block_sparse_moe.experts.6.w3.weight" in file.keys()
    assert json.loads((tmp_path / "mixtral" / "config.json").read_text())["model_type"] == "mixtral"
    assert not list((tmp_path / "mixtral").glob("*.py"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "mixtral")) == 7
    for mixtral in (AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral"), downcycle(source)):
        assert type(mixtral).__name__ == "MixtralForCausalLM"
        assert difference(mixtral, source)[0] <= 1e-5
    with pytest.raises(FileExistsError):
        downcycle(source, tmp_path / "mixtral")


def test_down_and_up_again_returns_every_weight(tmp_path):
    source = source_model("mixtral", tie_word_embeddings=True, sliding_window=4)
    back = downcycle(upcycle(source, num_iterations=1))
    assert back.config.sliding_window == 4 and back.lm_head.weight is back.model.embed_tokens.weight
    expected = source.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_iterations": 2},
        {"num_shared_experts": 1},
        {"qk_norm": "head"},
        {"attention_bias": True},
        {"norm_topk_prob": False},
        {"residual": "inner"},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_what_mixtral_cannot_express_is_refused_by_name(overrides, tmp_path):
    source = build(**{"num_iterations": 1} | overrides)
    with pytest.raises(ValueError, match=next(iter(overrides))):
        downcycle(source, tmp_path / "mixtral")
    assert leftovers(tmp_path) == []


def test_few_bits_are_not_downcycled_and_dequantised_they_are(tmp_path):
    build(num_iterations=1).save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=QuantizedExpertsConfig(8))
    model.save_pretrained(tmp_path / "few")
    for source in (tmp_path / "few", model):
        with pytest.raises(ValueError, match=r"`quantization_config={.*full-precision.*`dequantize\(\)`"):
            downcycle(source, tmp_path / "mixtral")
    assert leftovers(tmp_path) == ["few", "full"]
    assert difference(downcycle(model.dequantize()), model)[0] <= 1e-5


@pytest.mark.parametrize("layout", ["separate", "fused"])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "qwen3"])
def test_layers_may_share_the_mean_of_their_experts(family, layout, tmp_path, caplog):
    source = source_model(family, num_hidden_layers=4)
    saved(source, tmp_path / "source", layout)
    options = {"num_iterations": 2, "layers": [3, 0, 2, 1]}
    apart = upcycle(tmp_path / "source", **options)
    logger = logging.getLogger("modeling_coe.upcycling")
    logger.addHandler(caplog.handler)
    pooled = upcycle(tmp_path / "source", **options, layers_per_pool=2)
    logger.removeHandler(caplog.handler)
    assert "2 layers share the mean of their experts" in caplog.text
    expected, found = apart.state_dict(), pooled.state_dict()
    experts = {name for name in expected if ".mlp.experts." in name}
    assert expected.keys() - found.keys() == {name for name in experts if name.split(".")[2] in "13"}
    for name, tensor in found.items():
        mean = expected[name]
        if name in experts:
            layer = int(name.split(".")[2])
            mean = (mean + expected[name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")]) / 2
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-7)
    upcycle(tmp_path / "source", tmp_path / "chain", **options, layers_per_pool=2, max_shard_size="20KB")
    written = CoEForCausalLM.from_pretrained(tmp_path / "chain")
    assert all(torch.equal(tensor, found[name]) for name, tensor in written.state_dict().items())


def test_a_pool_is_written_out_for_each_of_its_layers():
    source = build(num_iterations=1, iteration_scale=True, num_hidden_layers=4, layers_per_pool=2)
    mixtral = downcycle(source)
    assert difference(mixtral, source)[0] <= 1e-5
    first, second, third = (layer.mlp.experts.gate_up_proj for layer in mixtral.model.layers[:3])
    assert torch.equal(first, second) and not torch.equal(second, third)


def test_only_a_coe_can_be_downcycled():
    with pytest.raises(ValueError, match="model_type='llama'"):
        downcycle(source_model("llama"))


PEAK_OF_CONVERSION = """
import json, sys
import modeling_coe

def status():
    lines = (line.split() for line in open("/proc/self/status"))
    return {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "VmRSS:")}

source, output, shard = sys.argv[1:]
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts again from here
before = status()["VmRSS:"]
modeling_coe.upcycle(source, output, num_iterations=2, max_shard_size=shard)
print(json.dumps({"before": before, "peak": status()["VmHWM:"]}))
"""


def large_checkpoint(folder, layout, num_layers):
    """A random bf16 Mixtral of 2 GiB at 12 layers in a file per layer; returns its bytes and a layer's."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=1024, intermediate_size=3584, num_hidden_layers=num_layers, vocab_size=4096,
        num_attention_heads=16, num_key_value_heads=4, num_local_experts=8, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    files, weight_map, sizes = {}, {}, {}
    for name, tensor in state.items():
        file = f"{name.split('.')[2]}.safetensors" if ".layers." in name else "rest.safetensors"
        files.setdefault(file, {})[name] = tensor
    for file, tensors in files.items():
        tensors = {name: torch.randn(tensor.shape).bfloat16() for name, tensor in tensors.items()}
        for name in [name for name in tensors if ".experts." in name and layout == "separate"]:
            prefix, whole = name.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe."), tensors.pop(name)
            for expert, matrix in enumerate(whole):
                halves = matrix.chunk(2) if name.endswith("gate_up_proj") else (matrix,)
                for half, part in zip(("w1", "w3") if len(halves) == 2 else ("w2",), halves, strict=True):
                    tensors[f"{prefix}.{expert}.{half}.weight"] = part.contiguous()
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        sizes[file] = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes.values()), sizes["0.safetensors"]


def measure_peak(folder, layout, num_layers=12, shard=512_000_000):
    """Bytes of a streaming conversion in a process of its own: how far the peak of RAM rises above the imports."""
    total, layer = large_checkpoint(folder / "source", layout, num_layers)
    command = [
        sys.executable,
        "-c",
        PEAK_OF_CONVERSION,
        str(folder / "source"),
        str(folder / "chain"),
        f"{shard // 10**6}MB",
    ]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    memory = json.loads(done.stdout)
    return {
        "layout": layout,
        "checkpoint": total,
        "largest_layer": layer,
        "shard": shard,
        "allowed": int(1.5 * layer) + shard,
        "rise": memory["peak"] - memory["before"],
        "before": memory["before"],
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_streaming_holds_one_shard_and_less_than_one_and_a_half_layers(layout, tmp_path):
    measured = measure_peak(tmp_path, layout)
    assert measured["checkpoint"] > 2 * 2**30
    assert measured["rise"] <= measured["allowed"]


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train/upcycle.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(str(ROOT / "train"))
    return runpy.run_path(str(ROOT / "train" / "upcycle.py"), run_name="__main__")


def test_script_reads_yaml_takes_overrides_and_refuses_unknown_keys(tmp_path, monkeypatch):
    source = source_model("mixtral")
    saved(source, tmp_path / "source")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"source: {tmp_path / 'source'}\noutput: {tmp_path / 'chain'}\nnum_iterations: 3\nverify: true\n"
    )
    run_script(monkeypatch, "--config", recipe, "--num_iterations", 2, "--layers", 0, 1, 2)
    chain = CoEForCausalLM.from_pretrained(tmp_path / "chain")
    assert chain.config.num_iterations == 2 and difference(source, chain)[0] <= 1e-5
    record = json.loads((tmp_path / "chain" / "facts.json").read_text())
    assert record["model"] == str(tmp_path / "source") and record["upcycling"]["source_type"] == "mixtral"
    assert record["upcycling"]["num_iterations"] == 2 and record["upcycling"]["changes_of_function"] == []
    recipe.write_text(recipe.read_text() + "num_iteration: 3\n")
    with pytest.raises(SystemExit, match="num_iteration"):
        run_script(monkeypatch, "--config", recipe)


def test_script_has_every_option_of_the_function_with_its_default(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "train"))
    script = runpy.run_path(str(ROOT / "train" / "upcycle.py"))
    options = {
        name: parameter.default if parameter.default is not inspect.Parameter.empty else None
        for name, parameter in inspect.signature(upcycle).parameters.items()
    }
    assert vars(script["UpcycleArguments"]()) == options


RECIPES = sorted((ROOT / "configuration" / "upcycle").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_parsed_by_the_script_it_names(recipe, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "train"))
    words = recipe.read_text().splitlines()[0].split()
    assert words[:2] == ["#", "python"] and words[3:5] == ["--config", str(recipe.relative_to(ROOT))]
    script = runpy.run_path(str(ROOT / words[2]))
    (arguments_class,) = (value for name, value in script.items() if name.endswith("Arguments"))
    (arguments,) = script["parse"](arguments_class, arguments=[*words[3:4], str(recipe), *words[5:]])
    assert vars(arguments) != vars(arguments_class())


@pytest.mark.slow
def test_healing_compares_four_runs_of_every_seed(tmp_path):
    """Two steps each, through the command line: the chain starts at the source's loss, the arms cost what they say."""
    data = tmp_path / "data"
    data.mkdir()
    problems = [
        {"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."} for a in range(9) for b in range(9)
    ]
    for name, rows in (("train", problems[:60]), ("test", problems[60:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {
        "data": data,
        "output_dir": tmp_path / "runs",
        "source_steps": 2,
        "healing_steps": 4,
        "sequence_length": 64,
    }
    command = [sys.executable, "train/studies/healing.py", "--seeds", "0"]
    command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, check=True)
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    made, source, chain, longer, thin = results["runs"]
    assert [run["name"] for run in (source, chain, longer, thin)] == list(results["mean_validation_loss"])[1:]
    assert made["validation_loss"] == pytest.approx(source["validation_loss_before"], abs=1e-6)
    assert chain["validation_loss_before"] == pytest.approx(source["validation_loss_before"], abs=1e-5)
    assert thin["validation_loss_before"] != source["validation_loss_before"]
    assert longer["flops"] == pytest.approx(chain["flops"], rel=0.2) and longer["steps"] > chain["steps"]
    assert thin["flops"] == pytest.approx(source["flops"], rel=0.05) and chain["flops"] > 1.2 * source["flops"]

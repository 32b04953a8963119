# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Weights of few bits reach the experts, in files, in memory and in every product, and say how many they are."""

import json
import logging
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import build, tokens
from safetensors.torch import load_file, save_file, save_model
from test_checkpoint import run_without_the_package
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.accelerate import compute_module_sizes
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from modeling_coe import (
    CoEConfig,
    CoEForCausalLM,
    CoEForQuestionAnswering,
    CoEForSequenceClassification,
    QuantizedExpertsConfig,
    lora_config,
    quantization,
    quantized_share,
)
from modeling_coe.budget import (
    ServingSetup,
    count_parameters,
    decoded_token_bytes,
    kv_cache_bytes,
    serving_memory,
    weight_bytes,
)
from modeling_coe.quantization import QuantizedWeight
from modeling_coe.train import plan
from modeling_coe.train.studies import low_bits


def visit(experts, num_tokens, seed=1):
    """One visit of an expert pool by tokens that choose two experts each; the last choice is another rank's expert."""
    generator = torch.Generator().manual_seed(seed)
    dtype, hidden = experts.down_proj.dtype, experts.down_proj.shape[1]
    hidden_states = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    index = torch.rand(num_tokens, experts.num_experts, generator=generator).topk(2).indices
    weights = torch.rand(num_tokens, 2, generator=generator)
    index[-1, 1], weights[-1, 1] = experts.num_experts, 0
    return experts(hidden_states.requires_grad_(torch.is_grad_enabled()), index, weights)


def difference(got, expected):
    return ((got - expected).double().norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_packed_by_torchao_are_read_one_at_a_time(dtype):
    """In every mode, decoding and on whole sequences, equal to the eager experts on the same values."""
    torchao = pytest.importorskip("torchao.quantization")
    packed, plain = (build().to(dtype).model.layers[0].mlp.experts for _ in range(2))
    plain.config._experts_implementation = "eager"
    names = {name: torchao.Int8WeightOnlyConfig() for name in ("gate_up_proj", "down_proj")}
    torchao.quantize_(packed, torchao.FqnToConfig(names), filter_fn=None)
    for name in names:
        weight = getattr(packed, name)
        assert type(weight).__name__ == "Int8Tensor"
        getattr(plain, name).data = torch.stack([weight[i].dequantize() for i in range(len(weight))]).to(dtype)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for num_tokens in (1, 3, 40):
            with context():
                got, expected = visit(packed, num_tokens), visit(plain, num_tokens)
            assert difference(got, expected) <= {torch.float32: 1e-6, torch.float16: 2e-3}.get(dtype, 2e-2)
            assert got.requires_grad == (context is torch.enable_grad) and got.dtype == dtype


def test_a_model_whose_experts_torchao_packed_generates(model):
    torchao = pytest.importorskip("torchao.quantization")
    names = {f"re:.*experts.{name}": torchao.Int8WeightOnlyConfig() for name in ("gate_up_proj", "down_proj")}
    torchao.quantize_(model, torchao.FqnToConfig(names), filter_fn=None)
    assert model.generate(tokens(2, 5), max_new_tokens=3).shape == (2, 8)
    assert quantized_share(model)["experts", 8] > 0.5


ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "CoE": build,
    "CoE with a shared expert": lambda **sizes: build(num_shared_experts=1, **sizes),
    "Mixtral": lambda **sizes: other(MixtralConfig, MixtralForCausalLM, num_local_experts=5, **sizes),
    "OLMoE": lambda **sizes: other(OlmoeConfig, OlmoeForCausalLM, num_experts=5, **sizes),
    "Qwen3-MoE": lambda **sizes: other(
        Qwen3MoeConfig, Qwen3MoeForCausalLM, num_experts=5, moe_intermediate_size=32, **sizes
    ),
}


def other(config_class, model_class, **sizes):
    torch.manual_seed(0)
    sizes |= {"vocab_size": 99, "num_hidden_layers": 2, "num_experts_per_tok": 2, "initializer_range": 0.1}
    return model_class(config_class(pad_token_id=0, eos_token_id=None, **sizes)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A full-precision checkpoint of every model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, build_model in MODELS.items():
        build_model(**SIZES).save_pretrained(folder / name)
    return folder


def load(path, *config, **options):
    """The model, quantised if a config's values are given."""
    config = {"quantization_config": QuantizedExpertsConfig(*config)} if config else {}
    return AutoModelForCausalLM.from_pretrained(path, **config, **options)


def held_bytes(model):
    inside = [(p.values, p.scale) if isinstance(p, QuantizedWeight) else (p,) for p in model.parameters()]
    return sum(tensor.nbytes for tensors in inside for tensor in tensors)


def rounded(matrix, bits, group_size):
    """The definition, value by value: the group's value of largest magnitude becomes -(2 ** (bits - 1))."""
    result = torch.empty_like(matrix)
    for row, values in enumerate(matrix.tolist()):
        for start in range(0, len(values), group_size):
            group = values[start : start + group_size]
            scale = max(group, key=abs) / -(2 ** (bits - 1))
            for column, value in enumerate(group, start):
                result[row, column] = scale * min(round(value / scale), 2 ** (bits - 1) - 1)
    return result


@pytest.mark.parametrize(("bits", "group_size"), [(8, 96), (4, 32), (4, 96)])
def test_a_quantised_weight_is_the_nearest_one_of_its_bits(bits, group_size):
    weight = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0))
    quantised = QuantizedWeight.quantize(weight, bits, group_size)
    expected = torch.stack([rounded(matrix, bits, group_size) for matrix in weight])
    assert difference(quantised.dequantize(), expected) <= 1e-6
    assert torch.equal(quantised.unpack().dequantize(), quantised.dequantize())
    assert quantised.block == (quantization.block_rows() if bits == 4 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("bits", "rows", "columns"), [(8, 7, 64), (8, 48, 24), (4, 48, 64), (4, 7, 96), (4, 200, 32)])
def test_products_are_those_of_the_expanded_weight(bits, rows, columns, dtype):
    """Whatever the kernels ask of a shape: blocks of 64 rows, 16 columns at once, three dtypes."""
    weight = QuantizedWeight.quantize(torch.randn(3, rows, columns).to(dtype), bits, 32)
    x = torch.randn(2, 5, columns).to(dtype)
    exact = x.double() @ weight.dequantize()[1].double().t()
    assert difference(F.linear(x, weight[1]), exact) <= {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(dtype, 1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [(8,), (4,), (4, 32, 8)])
def test_experts_in_few_bits_compute_what_their_expanded_weights_compute(name, config, folder, tmp_path):
    """And the saved integers, loaded again, the very same; as do those that the loaded model saves."""
    model = load(folder / name, *config)
    assert torch.isfinite(model.generate(tokens(2, 5), max_new_tokens=3)).all()
    model.save_pretrained(tmp_path / "quantised")
    logits = model(tokens(3, 7)).logits
    loaded = load(tmp_path / "quantised")
    assert torch.equal(loaded(tokens(3, 7)).logits, logits)
    loaded.save_pretrained(tmp_path / "again")
    files = [(tmp_path / copy / "model.safetensors").read_bytes() for copy in ("quantised", "again")]
    assert files[0] == files[1] and len(files[0]) < (folder / name / "model.safetensors").stat().st_size / 1.8

    expanded = loaded.dequantize()
    expanded.set_experts_implementation("eager")
    assert not any(isinstance(parameter, QuantizedWeight) for parameter in expanded.parameters())
    assert difference(logits, expanded(tokens(3, 7)).logits) <= 1e-5
    assert difference(logits, load(folder / name)(tokens(3, 7)).logits) <= (0.3 if config[0] == 4 else 0.02)


@pytest.mark.parametrize("outside", [-1, 99])
def test_a_token_outside_of_a_quantised_embedding_is_named(outside, folder):
    model, ids = load(folder / "CoE", 8, 32, 8), tokens(2, 5)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(ids), embedding.weight.dequantize()[ids])
    with pytest.raises(ValueError, match=f"holds token id {outside}, outside the embedding of 99 tokens"):
        model(torch.tensor([[5, outside]]))


def test_a_tied_embedding_is_quantised_and_saved_once(tmp_path):
    model = build(tie_word_embeddings=True, **SIZES)
    model.save_pretrained(tmp_path / "full")
    load(tmp_path / "full", 4, 32, 8).save_pretrained(tmp_path / "quantised")
    loaded = load(tmp_path / "quantised")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    names = load_file(tmp_path / "quantised" / "model.safetensors").keys()
    assert "model.embed_tokens.weight_scale" in names and not any("lm_head" in name for name in names)
    assert difference(loaded(tokens(2, 5)).logits, model(tokens(2, 5)).logits) <= 0.3


HEADS = {CoEForSequenceClassification: "score", CoEForQuestionAnswering: "qa_outputs"}


@pytest.mark.parametrize("head", HEADS)
def test_the_new_head_of_a_task_stays_to_be_trained_and_a_trained_one_is_kept(head, folder, tmp_path):
    """On a full-precision and on a quantised base; the file of a head in integers is read too."""
    load(folder / "CoE with a shared expert", 8, 32, 8).save_pretrained(tmp_path / "base")
    config = QuantizedExpertsConfig(rest_bits=8)
    new = head.from_pretrained(folder / "CoE with a shared expert", num_labels=3, quantization_config=config)
    for model in (new, head.from_pretrained(tmp_path / "base", num_labels=3)):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kept = {name for name, parameter in model.named_parameters() if not isinstance(parameter, QuantizedWeight)}
        assert trained == kept and all(re.search(rf"{HEADS[head]}|norm|mlp\.gate\.", name) for name in kept)
    new.save_pretrained(tmp_path / "tuned")
    loaded, outputs = head.from_pretrained(tmp_path / "tuned"), new(tokens(2, 5))
    assert torch.equal(loaded(tokens(2, 5))[0], outputs[0])
    state, name = load_file(tmp_path / "tuned" / "model.safetensors"), f"{HEADS[head]}.weight"
    weight = QuantizedWeight.quantize(state[name], 8, 32)
    state |= {name: weight.values, f"{name}_scale": weight.scale}
    save_file(state, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    stored = head.from_pretrained(tmp_path / "tuned").get_parameter(name)
    assert torch.equal(stored, weight.dequantize())


def test_the_share_of_each_component_is_counted_from_the_tensors(folder, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(folder / "CoE", 4, 32, 8)
    counts = count_parameters(model.config)
    expected = {
        ("experts", 4): counts["experts"],
        ("attention", 8): counts["attention"],
        ("embeddings", 8): counts["embedding"],
        ("head", 8): counts["lm_head"],
        ("routers", 32): counts["router"],
        ("other", 32): counts["norms"],
    }
    share = quantized_share(model)
    assert share == pytest.approx({key: count / sum(counts.values()) for key, count in expected.items()})
    assert f"experts {share['experts', 4]:.1%} in 4 bits" in caplog.text
    assert quantized_share(load(folder / "CoE", dtype="bfloat16")).keys() == {(name, 16) for name, _ in expected}


def test_loading_quantises_one_tensor_at_a_time(folder, monkeypatch):
    """No more than one expert tensor in full precision is alive while another is rounded."""
    alive, most = weakref.WeakSet(), []
    original = quantization._Quantize.convert

    def convert(self, input_dict, **kwargs):
        (tensors,) = input_dict.values()
        alive.add(tensors[0] if isinstance(tensors, list) else tensors)
        most.append(len(alive))
        return original(self, input_dict, **kwargs)

    monkeypatch.setattr(quantization._Quantize, "convert", convert)
    load(folder / "CoE", 4)
    assert len(most) == 4 and max(most) == 1


@pytest.mark.parametrize("model", ["CoE", "Mixtral"])
def test_what_cannot_be_quantised_is_refused_by_name(model, folder, tmp_path):
    for name, value in (("bits", 3), ("group_size", 128), ("rest_bits", 4)):
        with pytest.raises(ValueError, match=f"`{name}={value}` must be one of"):
            QuantizedExpertsConfig(**{name: value})
    with pytest.raises(ValueError, match=r"`group_size=64` does not divide the width 32 of `.*experts.down_proj`"):
        load(folder / model, 4, 64)
    with pytest.raises(ValueError, match="not offloaded to disk"):
        load(folder / model, 4, device_map={"": "disk"})
    load(folder / model, 4).save_pretrained(tmp_path)
    again = (
        "quantized with AlreadyQuantizedExperts but you are passing a QuantizedExpertsConfig"  # transformers' words
    )
    if model == "CoE":
        again = "stored in 4 bits and cannot be quantised again to 8 bits: load the full-precision checkpoint"
    for loader in (AutoModelForCausalLM, {"CoE": CoEForCausalLM, "Mixtral": MixtralForCausalLM}[model]):
        with pytest.raises(ValueError, match=again):
            loader.from_pretrained(tmp_path, quantization_config=QuantizedExpertsConfig(8))
    weight = load(tmp_path).model.layers[0].mlp.experts.down_proj
    with pytest.raises(ValueError, match="already in 4 bits and cannot be quantised again to 8 bits"):
        QuantizedWeight.quantize(weight, 8, 32)
    with pytest.raises(NotImplementedError, match=r"know no `aten.mul.Tensor`; `model.dequantize\(\)`"):
        weight * 2


def test_an_unknown_key_is_refused_and_a_stored_configuration_read(folder, tmp_path):
    for name, value in (("load_in_4bit", True), ("bit", 4), ("groupsize", 64)):
        with pytest.raises(ValueError, match=f"`{name}={value}` is unknown; .*`bits`, `group_size`"):
            QuantizedExpertsConfig(**{name: value})
    with pytest.raises(ValueError, match="`quant_method='gptq'` must be one of"):
        QuantizedExpertsConfig(quant_method="gptq")
    config = QuantizedExpertsConfig(4, 64, 8)
    assert QuantizedExpertsConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    load(folder / "CoE", 4).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["quantization_config"]["bit"] = stored["quantization_config"].pop("bits")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="`bit=4` is unknown"):
        load(tmp_path)


@pytest.mark.parametrize("fault", ["no scale", "no integers", "neither", "floats", "half of it"])
def test_a_file_that_lacks_part_of_a_weight_is_refused_by_name(fault, folder, tmp_path):
    load(folder / "CoE", 4).save_pretrained(tmp_path)
    state, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.experts.down_proj"
    if fault in ("no scale", "neither"):
        del state[f"{name}_scale"]
    if fault in ("no integers", "neither"):
        del state[name]
    if fault == "floats":
        state[name] = state[name].float()
    if fault == "half of it":
        state[name] = state[name][:, ::2].contiguous()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not hold \['{name}'\] as 4-bit integers with their `_scale`"):
        load(tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
def test_without_the_quantiser_the_file_is_refused_and_not_read_as_floats(bits, folder, tmp_path, monkeypatch):
    load(folder / "Mixtral", bits).save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, quantization.METHOD)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)


def test_a_model_without_fused_experts_is_refused(tmp_path):
    config = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no fused experts to quantise"):
        load(tmp_path, 4)


def test_a_quantised_checkpoint_loads_as_remote_code(folder, tmp_path):
    model = load(folder / "CoE", 4)
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save((tokens(2, 6), model(tokens(2, 6)).logits), tmp_path / "expected.pt")
    result = run_without_the_package(
        """
        import torch
        from transformers import AutoModelForCausalLM
        input_ids, expected = torch.load("expected.pt")
        model = AutoModelForCausalLM.from_pretrained("checkpoint", trust_remote_code=True)
        weight = model.model.layers[0].mlp.experts.down_proj
        assert "transformers_modules" in type(weight).__module__ and weight.bits == 4
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=1e-5)
        print("same logits")
        """,
        tmp_path,
    )
    assert result.stdout.strip().endswith("same logits"), result.stderr[-3000:]


def adapted(model, seed=5):
    torch.manual_seed(seed)
    model = pytest.importorskip("peft").get_peft_model(model, lora_config(model, r=5))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn(parameter.shape)
    return model.train()


@pytest.mark.parametrize("config", [(4,), (8, 32, 8)])
def test_adapters_on_quantised_experts_learn_as_on_their_expanded_weights(config, folder):
    """The same logits and gradients, with recomputation too, and no expert is expanded for the forward pass."""
    quantised, plain = adapted(load(folder / "CoE", *config)), adapted(load(folder / "CoE", *config).dequantize())
    ids, results = tokens(2, 9), []
    for model in (quantised, plain, quantised):
        if results:
            quantised.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        results.append([output.logits.detach(), *(parameter.grad.clone() for parameter in trained)])
    assert len(results[1]) == 1 + 2 * (4 * 2 + 2 * 2 + 1)  # logits; of two layers: attention, experts, router
    for got in (results[0], results[2]):
        assert max(difference(a, b) for a, b in zip(got, results[1], strict=True)) <= 1e-5


def test_expanded_weights_learn_as_those_of_the_original_and_under_an_adapter_stay_frozen(folder):
    model, original = load(folder / "CoE", 4, 32, 8).dequantize(), load(folder / "CoE")
    learning = [[name for name, one in each.named_parameters() if one.requires_grad] for each in (model, original)]
    assert learning[0] == learning[1]
    ids, before = tokens(2, 9), model.model.layers[0].mlp.experts.down_proj.detach().clone()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.model.layers[0].mlp.experts.down_proj, before)

    model = adapted(load(folder / "CoE", 4, 32, 8))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.dequantize()
    assert not any(isinstance(parameter, QuantizedWeight) for parameter in model.parameters())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("config", [(4,), (8, 32, 8)])
def test_compiled_experts_in_few_bits_compute_what_eager_ones_do(config, folder):
    model, ids = load(folder / "CoE", *config).eval(), tokens(1, 9)
    for with_gradients in (False, True):
        torch._dynamo.reset()
        with torch.set_grad_enabled(with_gradients):
            assert difference(torch.compile(model, backend="eager")(ids).logits, model(ids).logits) <= 1e-6


@pytest.mark.parametrize("config", [(4,), (8, 32, 8)])
def test_a_model_prepared_for_adapters_keeps_its_bits_in_the_new_dtype(config, folder):
    model, ids = load(folder / "CoE", *config, dtype=torch.bfloat16), tokens(1, 9)
    expected = load(folder / "CoE", *config, dtype=torch.bfloat16).to(torch.float32)(ids).logits
    weight = model.model.layers[0].mlp.experts.down_proj
    prepared = pytest.importorskip("peft").prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert weight.dtype == weight.scale.dtype == weight[0].dtype == torch.float32
    assert difference(prepared(ids).logits, expected) <= 1e-6
    with pytest.raises(ValueError, match=r"`\.data = \.\.\.` of .* takes other weights in few bits"):
        weight.data = torch.zeros_like(weight.dequantize())


def test_adapters_on_experts_in_few_bits_train_under_ddp(folder, tmp_path):
    model, ids = adapted(load(folder / "CoE", 4)), tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(ids, labels=ids).loss.backward()
    finally:
        distributed.destroy_process_group()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name


def test_a_merge_into_few_bits_says_what_it_loses(folder, caplog):
    model, kept = adapted(load(folder / "CoE", 4)).eval(), adapted(load(folder / "CoE", 4).dequantize()).eval()
    exact = kept(tokens(2, 9)).logits
    with caplog.at_level(logging.WARNING):
        merged = model.merge_and_unload()
    lost = [float(share) for share in re.findall(r"adds an error of (\d+)% of the update", caplog.text)]
    assert len(lost) == 4 and all(0 < share < 100 for share in lost)
    weight, full = (each.model.layers[0].mlp.experts.down_proj for each in (merged, kept.merge_and_unload()))
    assert isinstance(weight, QuantizedWeight) and torch.equal(weight.dequantize(), weight.unpack().dequantize())
    assert difference(weight.dequantize(), QuantizedWeight.quantize(full, 4, 32).dequantize()) <= 1e-6
    assert 0.01 < difference(merged(tokens(2, 9)).logits, exact) < 0.5


@pytest.mark.parametrize("options", [{}, {"expert_bits": 8}, {"expert_bits": 4}, {"expert_bits": 4, "rest_bits": 8}])
@pytest.mark.parametrize("model", ["CoE", "CoE with a shared expert"])
def test_serving_plan_counts_the_bytes_of_weights_and_cache(model, options, folder):
    """Exactly, tensor by tensor, as they lie in memory."""
    config = (options["expert_bits"], 32, options.get("rest_bits")) if options else ()
    model = load(folder / model, *config, dtype="bfloat16")
    setup = ServingSetup(batch_size=2, length=7, **options)
    assert sum(weight_bytes(model.config, setup).values()) == held_bytes(model)
    cache = model(tokens(2, 7), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert serving_memory(model.config, setup)["cache"] == kept


def test_serving_plan_counts_the_rows_that_fill_a_block(tmp_path):
    build(**SIZES | {"hidden_size": 96}).save_pretrained(tmp_path)
    model = load(tmp_path, 4, 32, dtype="bfloat16")
    assert sum(weight_bytes(model.config, ServingSetup(expert_bits=4)).values()) == held_bytes(model)


@pytest.mark.parametrize(
    "option", [{"dtype": "fp16"}, {"expert_bits": 3}, {"rest_bits": 4}, {"group_size": 16}, {"length": 0}]
)
def test_setups_of_serving_that_do_not_exist_are_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}={option[name]!r}` must be"):
        ServingSetup(**option)


def test_a_decoded_token_reads_what_its_visits_hit():
    config = CoEConfig(**SIZES, num_iterations=2, num_local_experts=8, num_experts_per_tok=2, num_hidden_layers=3)
    setup = ServingSetup(batch_size=1, length=10)
    sizes = weight_bytes(config, setup)
    rest = sum(sizes.values()) - sizes["experts"] - sizes["embedding"] + kv_cache_bytes(config, 1, 10)
    assert decoded_token_bytes(config, setup) == pytest.approx(rest + sizes["experts"] * 2 * 2 / 8)
    batch = ServingSetup(batch_size=10**6, length=10)
    # A batch that hits every expert in every visit reads each twice; the cache stays each sequence's own.
    assert decoded_token_bytes(config, batch) == pytest.approx(kv_cache_bytes(config, 1, 10), rel=0.01)


def test_the_plan_to_serve_names_what_fits(capsys):
    arguments = ["--model", str(ROOT / "configuration/models/coe_c2_k4_n64.json"), "--serve", "1x2048"]
    plan.main([*arguments, "--ram", "1.5GB"])
    verdict = capsys.readouterr().out.splitlines()[-2]
    assert verdict.split() == ["does", "not", "fit", "fits", "fits", "fits"]
    with pytest.raises(SystemExit):
        plan.main(arguments)
    assert "--serve needs" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["CoE", "CoE with a shared expert"])
def test_a_chain_larger_than_its_memory_runs_from_disk(model, folder, tmp_path):
    """accelerate keeps on disk what does not fit, and fetches a layer for its pass, once for all iterations."""
    pytest.importorskip("accelerate")
    whole = load(folder / model)
    budget = sum(parameter.nbytes for parameter in whole.parameters()) // 2
    part = load(folder / model, device_map="auto", max_memory={"cpu": budget}, offload_folder=tmp_path)
    assert set(part.hf_device_map.values()) == {"cpu", "disk"}
    held = sum(parameter.nbytes for parameter in part.parameters() if parameter.device.type != "meta")
    assert held <= budget
    with torch.no_grad():
        assert torch.equal(part(tokens(2, 7)).logits, whole(tokens(2, 7)).logits)


def test_weights_and_rows_at_odd_addresses_are_multiplied_and_end_no_process():
    """In a process of its own: torch's kernel would end this one."""
    code = """
import torch
import torch.nn.functional as F
from modeling_coe.quantization import QuantizedWeight
torch.manual_seed(0)
full = torch.randn(24, 64).bfloat16()
weight = QuantizedWeight.quantize(full, 8, 32)
expected = F.linear(torch.ones(3, 64).bfloat16(), weight)
for offset in (1, 8, 40):
    memory = torch.zeros(24 * 64 + 64, dtype=torch.int8)
    memory[offset : offset + 24 * 64] = weight.values.flatten()
    odd = QuantizedWeight(memory[offset : offset + 24 * 64].view(24, 64), weight.scale, full.shape, 8).pack()
    rows = torch.ones(3 * 64 + 64).bfloat16()[offset : offset + 3 * 64].view(3, 64)
    assert torch.equal(F.linear(rows, odd), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("bits", [8, 4])
def test_processes_can_share_a_quantised_model(bits, folder):
    """In a process of its own: sharing the memory of the wrapper instead of what it wraps would end this one."""
    code = """
import sys
import torch
from transformers import AutoModelForCausalLM
from modeling_coe import QuantizedExpertsConfig
config = QuantizedExpertsConfig(bits=int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
ids = torch.arange(1, 8)[None]
expected = model(ids).logits
weight = model.model.layers[0].mlp.experts.down_proj
assert not weight.is_shared()
model.share_memory()
assert weight.is_shared() and weight.values.is_shared() and weight.scale.is_shared()
assert torch.equal(model(ids).logits, expected)
"""
    subprocess.run([sys.executable, "-c", code, folder / "CoE", str(bits)], check=True, timeout=120)


@pytest.mark.parametrize("config", [(8,), (4,), (4, 32, 8)])
@pytest.mark.parametrize("name", ["CoE", "Mixtral"])
def test_the_footprint_is_the_bytes_of_integers_and_scales(name, config, folder):
    model = load(folder / name, *config)
    held = held_bytes(model)
    assert model.get_memory_footprint(return_buffers=False) == pytest.approx(held)
    assert sum(parameter.nbytes for parameter in model.parameters()) == held


@pytest.mark.parametrize("config", [(8,), (4,), (4, 32, 8)])
@pytest.mark.parametrize("name", ["CoE", "Mixtral"])
def test_an_automatic_device_map_counts_few_bits_and_not_full_precision(name, config, folder, tmp_path):
    """Quantised while loading or read from its own file; what does not fit is refused with the remedy."""
    pytest.importorskip("accelerate")
    model = load(folder / name, *config)
    model.save_pretrained(tmp_path / "quantised")
    footprint = model.get_memory_footprint()
    assert compute_module_sizes(model, model.hf_quantizer)[0][""] == pytest.approx(footprint)
    # Room for the model and, as accelerate wants it, for one of its two layers.
    memory = {"cpu": round(1.6 * footprint)}
    options = {"device_map": "auto", "max_memory": memory, "offload_folder": tmp_path / "offload"}
    for part in (load(folder / name, *config, **options), load(tmp_path / "quantised", **options)):
        assert {parameter.device.type for parameter in part.parameters()} == {"cpu"}
        assert torch.equal(part(tokens(2, 5)).logits, model(tokens(2, 5)).logits)
    memory["cpu"] = round(0.9 * footprint)
    with pytest.raises(ValueError, match=r"puts \[.*layers.*\]: .* more `max_memory`"):
        load(folder / name, *config, **options)


@pytest.mark.parametrize("config", [(8,), (4, 32, 8)])
@pytest.mark.parametrize("name", ["CoE", "Mixtral"])
def test_a_state_dict_is_copied_saved_and_read_with_weights_only(name, config, folder, tmp_path):
    model = load(folder / name, *config)
    expected = model(tokens(2, 5)).logits
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for state in (model.state_dict(), torch.load(tmp_path / "state.pt", weights_only=True)):
        changed = load(folder / name, *config)
        weight = changed.model.layers[0].mlp.experts.down_proj
        weight.data.add_(torch.randn(weight.shape))
        assert difference(changed(tokens(2, 5)).logits, expected) > 0.01
        changed.load_state_dict(state)
        assert changed.model.layers[0].mlp.experts.down_proj is weight
        assert torch.equal(changed(tokens(2, 5)).logits, expected)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(tokens(2, 5)).logits, expected)


def test_a_copy_into_other_bits_groups_or_from_full_precision_is_refused(folder):
    model = load(folder / "CoE", 4)
    for state, message in (
        (
            load(folder / "CoE", 8).state_dict(),
            r"bits=8.* cannot be copied into .*bits=4.*: load the model",
        ),
        (load(folder / "CoE").state_dict(), r"torch.float32 is not rounded into .*bits=4.*: load the full-precision"),
    ):
        with pytest.raises(RuntimeError, match=rf"experts.gate_up_proj.*{message}"):
            model.load_state_dict(state)
    full = torch.randn(2, 8, 64)
    with pytest.raises(ValueError, match=r"scales \[2, 8, 2\] cannot .* scales \[2, 8, 1\]: .* the group size"):
        QuantizedWeight.quantize(full, 4, 64).copy_(QuantizedWeight.quantize(full, 4, 32))
    for operation in (lambda weight: full.copy_(weight), lambda weight: torch.stack([weight, weight])):
        with pytest.raises(NotImplementedError, match=r"8 or 4 bits know no `aten.*`; `model.dequantize\(\)`"):
            operation(QuantizedWeight.quantize(full, 4, 32))


@pytest.mark.parametrize("block", [32, 64])
def test_a_state_dict_from_a_cpu_of_another_layout_is_laid_out_anew(block, tmp_path):
    weight = QuantizedWeight.quantize(torch.randn(3, 72, 64, generator=torch.Generator().manual_seed(0)), 4, 32)
    rows = F.pad(weight.integers() + 8, (0, 0, 0, -72 % block)).view(torch.uint8).unflatten(1, (-1, 2, block // 2))
    values = (rows[:, :, 0] | rows[:, :, 1] << 4).transpose(-1, -2).reshape(3, -1, 32)
    scale = F.pad(weight.row_scale(), (0, 0, 0, -72 % block)).transpose(-1, -2)
    foreign = QuantizedWeight(values, torch.stack([scale, 0 * scale], dim=-1), weight.shape, 4, block)
    if block == weight.block:
        assert torch.equal(foreign.values, weight.values)
    torch.save(foreign, tmp_path / "weight.pt")
    read = torch.load(tmp_path / "weight.pt", weights_only=True)
    assert read.block == weight.block and torch.equal(read.values, weight.values)
    assert torch.equal(F.linear(torch.ones(1, 64), read[1]), F.linear(torch.ones(1, 64), weight[1]))


@pytest.mark.parametrize("config", [(8,), (4, 32, 8)])
def test_accelerate_keeps_few_bits_on_cpu_and_fetches_them_for_a_pass(config, folder):
    accelerate = pytest.importorskip("accelerate")
    model = load(folder / "CoE", *config)
    with torch.no_grad():
        expected = model(tokens(2, 5)).logits
        accelerate.cpu_offload(model, execution_device="cpu")
        for _ in range(2):
            weight = model.model.layers[0].mlp.experts.down_proj
            assert weight.is_meta and weight.bits == config[0] and isinstance(weight, torch.nn.Parameter)
            assert torch.equal(model(tokens(2, 5)).logits, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_are_selected_by_integers_and_slices(bits):
    weight = QuantizedWeight.quantize(torch.randn(5, 40, 64), bits, 32)
    for key in (1, -1, slice(1, 3), slice(None, None, 2)):
        assert torch.equal(weight[key].dequantize(), weight.dequantize()[key])
    assert torch.equal(weight[1:3][1].dequantize(), weight.dequantize()[2])
    for key in (torch.tensor([0, 1]), (0, 1)):
        with pytest.raises(IndexError, match=r"does not select whole experts of .*bits=.*`dequantize\(\)`"):
            weight[key]
    with pytest.raises(IndexError, match="does not select whole experts"):
        weight[0][0]


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_embeddings_in_8_bits_resize_after_the_model_is_dequantized(mean_resizing, folder):
    model = load(folder / "CoE", 4, 32, 8)
    with torch.no_grad():
        expected = model(tokens(2, 5)).logits
        with pytest.raises((IndexError, NotImplementedError), match=r"`model.dequantize\(\)` makes ordinary weights"):
            model.resize_token_embeddings(103, mean_resizing=mean_resizing)
        assert torch.equal(model(tokens(2, 5)).logits, expected)
        model = model.dequantize()
        model.resize_token_embeddings(103, mean_resizing=mean_resizing)
        torch.testing.assert_close(model(tokens(2, 5)).logits[..., :99], expected, atol=2e-2, rtol=2e-2)


def test_safetensors_alone_refuses_to_save_few_bits(folder, tmp_path):
    model = load(folder / "CoE", 8)
    with pytest.raises(
        ValueError, match=r"cannot hold QuantizedWeight\(shape=.*, bits=8.*: save .* `save_pretrained`"
    ):
        save_model(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_shared_pool_is_quantised_stored_and_loaded_once(bits, tmp_path):
    model = build(num_hidden_layers=4, layers_per_pool=2, intermediate_size=32, hidden_size=64, num_attention_heads=4,
                  num_key_value_heads=2)  # fmt: skip
    model.save_pretrained(tmp_path / "full")
    config = QuantizedExpertsConfig(bits=bits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config)
    names = {name for name, weight in model.named_parameters() if isinstance(weight, quantization.QuantizedWeight)}
    owners = {
        f"model.layers.{layer}.mlp.experts.{weight}" for layer in (0, 2) for weight in ("gate_up_proj", "down_proj")
    }
    assert names == owners
    model.save_pretrained(tmp_path / "quantised")
    stored = load_file(tmp_path / "quantised" / "model.safetensors")
    assert {name for name in stored if ".experts." in name} == owners | {f"{name}_scale" for name in owners}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    ids = tokens(2, 9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    error = (loaded(ids).logits - AutoModelForCausalLM.from_pretrained(tmp_path / "full")(ids).logits).abs().max()
    assert 0 < error < 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [None, {"bits": 8}, {"bits": 4}, {"bits": 4, "rest_bits": 8}])
def test_the_plan_of_serving_is_the_resident_memory_within_a_tenth(options, tmp_path):
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 704, "num_hidden_layers": 4,
             "num_attention_heads": 8, "num_local_experts": 64, "num_experts_per_tok": 4}  # fmt: skip
    model = CoEForCausalLM(CoEConfig(**sizes)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "full")
    folder = tmp_path / "full"
    if options is not None:
        folder = tmp_path / "quantised"
        quantised = AutoModelForCausalLM.from_pretrained(
            tmp_path / "full", dtype=torch.bfloat16, quantization_config=QuantizedExpertsConfig(**options)
        )
        quantised.save_pretrained(folder)
    options = options or {}
    setup = ServingSetup(expert_bits=options.get("bits"), rest_bits=options.get("rest_bits"))
    predicted = sum(weight_bytes(model.config, setup).values())
    resident = int(low_bits.run_apart(low_bits.LOAD, folder)[-1])
    assert resident == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("bits", [8, 4])
def test_slices_are_made_of_the_experts_that_were_hit_and_follow_their_weights(bits, folder):
    """Index N, no expert, is not computed; a merge in place reaches the slices that are kept."""
    experts = load(folder / "CoE", bits).model.layers[0].mlp.experts
    absent = experts.num_experts
    hidden_states, weights = torch.randn(2, 64), torch.tensor([[0.6, 0.4], [1.0, 0.0]])
    index = torch.tensor([[3, 1], [3, absent]])
    with torch.inference_mode():
        before = experts(hidden_states, index, weights)
        assert set(experts.gate_up_proj.slices) == set(experts.down_proj.slices) == {1, 3}
        assert not experts(hidden_states, torch.full_like(index, absent), weights).any()
    for weight in (experts.gate_up_proj, experts.down_proj):
        weight.data.add_(torch.randn(weight.shape))
    with torch.no_grad():
        after = experts(hidden_states, index, weights)
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.slices.clear()
        assert torch.equal(experts(hidden_states, index, weights), after)
    assert not torch.equal(before, after)

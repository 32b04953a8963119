# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: Auto classes, remote code, broken files, bad input, memory."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from conftest import SMALL, build, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    MixtralConfig,
)

import modeling_coe


AUTO_CLASSES = {
    AutoModel: modeling_coe.CoEModel,
    AutoModelForCausalLM: modeling_coe.CoEForCausalLM,
    AutoModelForSequenceClassification: modeling_coe.CoEForSequenceClassification,
    AutoModelForTokenClassification: modeling_coe.CoEForTokenClassification,
    AutoModelForQuestionAnswering: modeling_coe.CoEForQuestionAnswering,
}


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda c: c.__name__)
def test_auto_classes_save_and_load_each_model(auto_class, tmp_path):
    model = build(AUTO_CLASSES[auto_class])
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is AUTO_CLASSES[auto_class]
    for (name, expected), (_, parameter) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_heads_load_the_base_models_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(head.model.layers[1].mlp.gate.weight, model.model.layers[1].mlp.gate.weight)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.layers[0].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj)


def test_disk_layout_is_fused_and_named_like_mixtrals(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    prefix = "model.layers.1.mlp"
    assert shapes[f"{prefix}.experts.gate_up_proj"] == (7, 48, 48)
    assert shapes[f"{prefix}.experts.down_proj"] == (7, 48, 24)
    assert shapes[f"{prefix}.gate.weight"] == (3, 7, 48)
    assert set(shapes) == set(model.state_dict())


def test_freshly_loaded_model_uses_the_fast_experts(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._experts_implementation == build().config._experts_implementation != "eager"
    assert loaded.config._attn_implementation == "sdpa"
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert eager.config._experts_implementation == "eager"


def test_experts_no_grouped_product_can_take_fall_back_in_sight(capfd):
    model = build(intermediate_size=18)
    assert model.config._experts_implementation == "eager"
    assert torch.isfinite(model(tokens(1, 4)).logits).all()
    with pytest.raises(ValueError, match="intermediate_size=18"):
        model.set_experts_implementation("grouped_mm")


def run_without_the_package(code, folder, variables=None):
    """Runs code in a fresh process that cannot import `modeling_coe` from anywhere but the checkpoint."""
    blocker = textwrap.dedent("""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "modeling_coe":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Blocker())
        try:
            import modeling_coe
            raise SystemExit("the package is importable")
        except ModuleNotFoundError:
            pass
    """)
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        **(variables or {}),
    }
    return subprocess.run(
        [sys.executable, "-c", blocker + textwrap.dedent(code)],
        cwd=folder, env=environment | (variables or {}), capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip


def test_remote_code_gives_the_same_logits_without_the_package(tmp_path):
    model = build(num_shared_experts=1, qk_norm="head", iteration_scale=True, layers_per_pool=2)
    model.save_pretrained(tmp_path / "checkpoint")
    build(modeling_coe.CoEForSequenceClassification).save_pretrained(tmp_path / "classifier")
    torch.save((tokens(2, 6), model(tokens(2, 6)).logits), tmp_path / "expected.pt")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(config["auto_map"])
    result = run_without_the_package(
        """
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
        input_ids, expected = torch.load("expected.pt")
        config = AutoConfig.from_pretrained("checkpoint", trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained("checkpoint", trust_remote_code=True)
        assert config.num_iterations == 3 and "transformers_modules" in type(model).__module__
        assert model.config._experts_implementation != "eager", model.config._experts_implementation
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=1e-5)
        assert model.generate(input_ids, max_new_tokens=3, do_sample=False).shape == (2, 9)
        base = AutoModel.from_pretrained("checkpoint", trust_remote_code=True)
        assert torch.equal(base.layers[0].mlp.gate.weight, model.model.layers[0].mlp.gate.weight)
        classifier = AutoModelForSequenceClassification.from_pretrained("classifier", trust_remote_code=True)
        assert classifier(input_ids[:1]).logits.shape == (1, 2)
        model.save_pretrained("again")
        again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
        torch.testing.assert_close(again(input_ids).logits, expected, rtol=0, atol=1e-5)
        print("same logits")
        """,
        tmp_path,
    )
    assert result.stdout.strip().endswith("same logits"), result.stderr[-3000:]


def test_remote_code_needs_no_package_but_torch_and_transformers(model, tmp_path):
    from transformers.dynamic_module_utils import get_imports

    model.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    assert {"configuration_coe.py", "modeling_coe.py"} <= set(files)
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    for file in files:
        assert set(get_imports(tmp_path / file)) <= allowed, file


BREAKAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "corrupted header": lambda data: b"\xff" * 16 + data[16:],
    "not safetensors": lambda data: b"<html>404</html>" * 100,
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_weight_files_are_refused_by_name(model, tmp_path, breakage):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(BREAKAGES[breakage](file.read_bytes()))
    with pytest.raises(OSError, match=r"truncated or corrupted(.|\n)*Nothing was loaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_shard_is_refused_by_name(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(OSError, match=lost.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def save_without(model, folder, *names):
    """A checkpoint as an interrupted conversion may leave it: whole, but for some tensors."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in names:
        del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


ROUTER, HEAD = "model.layers.1.mlp.gate.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "lost", [ROUTER, "model.layers.0.mlp.experts.down_proj", "model.norm.weight", "lm_head.weight"]
)
def test_a_checkpoint_without_one_of_its_tensors_is_refused_by_name(model, tmp_path, lost):
    save_without(model, tmp_path, lost)
    for auto_class in AUTO_CLASSES:
        if lost == HEAD and auto_class is not AutoModelForCausalLM:
            auto_class.from_pretrained(tmp_path)
        else:
            with pytest.raises(ValueError, match=f"lack 1 tensors .*{lost.removeprefix('model.')}"):
                auto_class.from_pretrained(tmp_path)


def test_a_classifier_without_its_head_is_refused_and_a_new_head_is_not(model, tmp_path):
    save_without(build(modeling_coe.CoEForSequenceClassification), tmp_path / "lost", "score.weight")
    with pytest.raises(ValueError, match=r"score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "lost")
    build(modeling_coe.CoEModel).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "causal")
    for folder in ("base", "causal"):
        for auto_class in AUTO_CLASSES:
            auto_class.from_pretrained(tmp_path / folder)
    with pytest.raises(ValueError, match="lack 1 tensors"):
        save_without(build(modeling_coe.CoEModel), tmp_path / "base", ROUTER.removeprefix("model."))
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_what_the_caller_adds_to_a_checkpoint_is_new_and_not_lost(model, tmp_path):
    model.save_pretrained(tmp_path)
    wider = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=4, iteration_scale=True)
    assert torch.equal(wider.model.layers[1].mlp.gate.weight, model.model.layers[1].mlp.gate.weight)
    assert torch.equal(wider.model.layers[3].mlp.iteration_scale, torch.ones(3))
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, num_local_experts=9, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 2 * 3
    config = AutoConfig.from_pretrained(tmp_path, num_hidden_layers=3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, config=config).config.num_hidden_layers == 3


def test_a_head_of_its_own_that_a_tied_checkpoint_has_not_is_refused_as_such(tmp_path):
    build(tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`tie_word_embeddings=False` asks for lm_head\.weight of its own"):
        AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)


def test_another_model_s_checkpoint_is_named_by_its_type(tmp_path):
    config = MixtralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model_type='mixtral'`, and a CoE is built from one with 'coe'"):
        modeling_coe.CoEForCausalLM.from_pretrained(tmp_path)


def test_threads_that_load_at_once_each_get_the_whole_model(tmp_path):
    """While transformers loads, it replaces the tying of heads and other functions in the whole process."""
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(AutoModelForCausalLM.from_pretrained, [tmp_path] * 40))
    loaded.append(build(tie_word_embeddings=True))  # nothing stays replaced
    for one in loaded:
        assert one.lm_head.weight is one.model.embed_tokens.weight
        assert not one.lm_head.weight.is_meta and one.lm_head.weight.dtype == torch.float32


def test_tied_and_adapted_checkpoints_lack_nothing(tmp_path):
    peft = pytest.importorskip("peft")
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    peft.get_peft_model(tied, peft.LoraConfig()).save_pretrained(tmp_path / "adapter")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").model.layers[0].self_attn.q_proj.lora_A


@pytest.mark.parametrize("change", [{"num_local_experts": 9}, {"num_iterations": 2}, {"hidden_size": 96}])
def test_mismatched_shapes_load_nothing(model, tmp_path, change):
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **change)


@pytest.mark.parametrize("token", [-1, SMALL["vocab_size"], 10**6])
def test_token_ids_out_of_range_are_named(model, token):
    with pytest.raises(ValueError, match=f"token id {token}, outside the embedding of 99"):
        model(torch.tensor([[5, token, 6]]))


@pytest.mark.parametrize("token", [-1, 99, [2, 99], "</s>", None, 2, [2, 3], []])
def test_an_end_of_text_that_no_vocabulary_has_is_warned_of_when_it_is_loaded(model, tmp_path, monkeypatch, token):
    warnings = []
    monkeypatch.setattr(modeling_coe.modeling_coe.logger, "warning", warnings.append)
    model.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": token}))
    loaded = modeling_coe.CoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == token
    possible = [None, 2, [2, 3], []]
    assert len(warnings) == (token not in possible) and all(f"`eos_token_id={token!r}`" in text for text in warnings)


def test_empty_input_is_refused(model):
    for shape in ((1, 0), (0, 4)):
        with pytest.raises(ValueError, match="holds no token"):
            model(torch.empty(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_load_time_peak_is_below_a_fifth_over_the_checkpoint(tmp_path):
    config = modeling_coe.CoEConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_local_experts=32
    )
    model = modeling_coe.CoEForCausalLM(config)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 380 * 2**20 < size < 450 * 2**20
    del model
    script = f"""
        import modeling_coe, torch
        from transformers import AutoModelForCausalLM
        modeling_coe.CoEForCausalLM(modeling_coe.CoEConfig(hidden_size=32, num_hidden_layers=1, vocab_size=8))
        print("ready", flush=True); input()
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        total = sum(float(p.sum()) for p in model.parameters())  # every page is really in memory
        print("loaded", flush=True); input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        watched = psutil.Process(process.pid)
        assert process.stdout.readline().strip() == "ready"
        before, peak, done = watched.memory_full_info().uss, 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.is_set():
                peak = max(peak, watched.memory_full_info().uss)
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "loaded"
        done.set()
        watcher.join()
        process.stdin.write("\n")
        process.stdin.flush()
    assert (peak - before) < 1.2 * size


def test_shards_reassemble(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens(1, 5)).logits, model(tokens(1, 5)).logits, rtol=0, atol=1e-5)


def test_half_precision_checkpoints_keep_their_dtype(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert AutoConfig.from_pretrained(tmp_path).model_type == "coe"


@pytest.mark.parametrize(
    "field, before, after", [("num_shared_experts", 1, 0), ("qk_norm", "head", None), ("num_hidden_layers", 2, 1)]
)
def test_weights_that_the_stored_configuration_does_not_announce_are_refused_by_name(tmp_path, field, before, after):
    model = build(**{field: before})
    model.save_pretrained(tmp_path)
    if field == "num_hidden_layers":  # the caller may leave layers out
        assert len(type(model).from_pretrained(tmp_path, num_hidden_layers=1).model.layers) == 1
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {field: after}))
    with pytest.raises(ValueError, match=r"holds \d+ tensors that its configuration does not announce: model\.layers"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [("num_iterations", 2), ("num_experts_per_tok", 3), ("norm_topk_prob", False), ("residual", "outer"),
     ("hidden_size", 96), ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0})],
)  # fmt: skip
def test_a_field_that_changed_after_building_is_not_saved_with_the_old_model(field, value, tmp_path):
    model = build()
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=rf"`config\.{field}=.*was .* when this model was built"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_model_whose_layers_were_taken_out_is_saved_unless_they_share_pools(tmp_path):
    model, ids = build(num_hidden_layers=3), tokens(1, 5)
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    expected = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    loaded = modeling_coe.CoEForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, expected)
    shared = build(num_hidden_layers=4, layers_per_pool=2)
    del shared.model.layers[2:]
    shared.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="num_hidden_layers=2` was 4"):
        shared.save_pretrained(tmp_path / "shared")


def test_vocabulary_and_padding_of_a_saved_model_are_those_of_its_embedding(tmp_path):
    model = build()
    model.config.vocab_size = 120
    with pytest.raises(ValueError, match="vocab_size=120`, and the embedding has 99 tokens"):
        model.save_pretrained(tmp_path)
    model.config.vocab_size, model.config.pad_token_id = 99, 99
    with pytest.raises(ValueError, match="`pad_token_id=99` must be"):
        model.save_pretrained(tmp_path)
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    assert modeling_coe.CoEForCausalLM.from_pretrained(tmp_path).config.vocab_size == 120


@pytest.mark.parametrize("bits", [4, 8])
def test_the_old_way_to_ask_for_few_bits_names_the_new_one(bits, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"quantization_config=QuantizedExpertsConfig\(bits={bits}\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{f"load_in_{bits}bit": True})
    assert AutoModelForCausalLM.from_pretrained(tmp_path, **{f"load_in_{bits}bit": False}).num_parameters() > 0


@pytest.mark.parametrize("architectures", [None, [], ["SomethingForCausalLM"]])
def test_a_language_model_s_head_is_not_made_up_where_a_checkpoint_does_not_say_what_it_is(architectures, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lack 1 tensors that its configuration announces: lm_head"):
        modeling_coe.CoEForCausalLM.from_pretrained(tmp_path)
    assert modeling_coe.CoEForSequenceClassification.from_pretrained(tmp_path).score.weight.shape == (2, 48)
    model.model.save_pretrained(tmp_path / "base")
    assert modeling_coe.CoEForCausalLM.from_pretrained(tmp_path / "base").lm_head.weight.shape == (99, 48)

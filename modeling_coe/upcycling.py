# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""An existing MoE or dense checkpoint becomes a Chain-of-Experts whose first forward is the source's, and back.

The chain is nested, `h + F_1(x_0) + s_2 F_2(x_1) + ...`, and its `iteration_scale` starts at 1, 0, 0, ...: the first
iteration is the source's layer, the later ones add exactly nothing until training moves their scale. With a scale of
0 the language-model loss reaches the later iterations only through the scale itself, whose gradient `<dL/dh, F_t>` is
not zero; after the first optimizer step their routers, and the experts through them, learn as well.

One mapping (`_ChainWeights`) names the source tensors every CoE weight is made from. It reads a checkpoint folder
tensor by tensor or a loaded model, and feeds a sharded checkpoint on disk or a model in memory.
"""

import copy
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .configuration_coe import CoEConfig
from .folders import check_replaceable, facts_of, refuse_adapter, require_model, whole_or_nothing
from .modeling_coe import CoEForCausalLM


logger = logging.get_logger(__name__)

DENSE_FAMILIES = ("llama", "mistral", "qwen3")
MOE_FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "granitemoe")
# Fields that mean the same in all seven families and in CoE.
SHARED_FIELDS = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "hidden_act",
                 "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
                 "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters")  # fmt: skip
# Every name a family gives, or gave before transformers 5, to what CoE calls by the name on the right.
RENAMINGS = {
    r"\.block_sparse_moe\.": ".mlp.",
    r"\.mlp\.router(\.layer)?\.weight$": ".mlp.gate.weight",
    r"\.mlp\.input_linear\.weight$": ".mlp.experts.gate_up_proj",
    r"\.mlp\.output_linear\.weight$": ".mlp.experts.down_proj",
    r"\.w1\.weight$": ".gate_proj.weight",
    r"\.w3\.weight$": ".up_proj.weight",
    r"\.w2\.weight$": ".down_proj.weight",
}
# What travels from the source's folder to the result's: tokenizer, chat template, generation settings, licence.
COMPANION_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
                   "*.tiktoken", "chat_template*", "additional_chat_templates/*", "generation_config.json",
                   "LICENSE*", "NOTICE*")  # fmt: skip
SENTENCES = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "The boat left the harbour before dawn, and nobody on the quay could say where it was going.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Water boils at a lower temperature in the mountains because the air pressure there is lower.",
)


def upcycle(
    source: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike | None = None,
    *,
    num_iterations: int = 2,
    experts_per_iteration: int | None = None,
    num_experts: int | None = None,
    expert_noise: float = 0.0,
    router_noise: float = 0.0,
    layers: list[int] | None = None,
    layers_per_pool: int = 1,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = False,
    verify_text: str | os.PathLike | None = None,
) -> CoEForCausalLM | Path:
    """A Chain-of-Experts made from a Mixtral, OLMoE, Qwen3-MoE, GraniteMoE, Llama, Mistral or Qwen3 checkpoint.

    The result computes the source's logits until it is trained, unless an option below says otherwise; then a warning
    says so too. A folder is converted tensor by tensor: the peak of RAM is one output shard and the largest tensor.

    Args:
        source (`str`, `os.PathLike` or `PreTrainedModel`): checkpoint folder with safetensors, Hub id or loaded model.
        output (`str` or `os.PathLike`, *optional*): folder to write. It appears whole at the very end or not at all.
            Without it the chain is returned as a model.
        num_iterations (`int`): C.
        experts_per_iteration (`int`, *optional*): K. `None` keeps the source's (C times the expert compute; dense
            sources: 2). The source's K divided by C keeps the compute, **does not preserve** a MoE's function, and
            needs training to heal. With a dense source every K preserves: equal experts whose weights sum to 1.
        num_experts (`int`, *optional*): N, copies of a dense source's FFN (`None`: 8). MoE sources keep their own N.
        expert_noise (`float`): normal noise on the copies of a dense FFN, as a multiple of each matrix's standard
            deviation. Above 0 it **does not preserve** the function.
        router_noise (`float`): the later iterations' routers are copies of the source's plus normal noise, in
            multiples of the router's standard deviation. Dense sources have no router: each iteration draws its own.
        layers (`list[int]`, *optional*): source layers to keep, in this order, iterations in place of depth. Every
            layer kept becomes a chain: C is one number for the whole model. Fewer than all (`None`) **do not
            preserve** the function.
        layers_per_pool (`int`): g, so many consecutive layers share one pool of experts, the mean of theirs: expert
            i of the pool is the mean of the layers' experts i, which healed better than taking them in turns
            (model_cards/studies/pooling_gsm8k.json). Above 1 it **does not preserve** the function, and needs training
            to heal.
        seed (`int`): of all noise; a tensor's noise depends on the seed and its name alone.
        max_shard_size (`int` or `str`): size of an output file.
        overwrite (`bool`): replace an existing `output`, if an earlier conversion wrote it and nothing in it changed.
        verify (`bool`): run source and result in fp32 and log the largest logit difference and the KL divergence; if
            they ought to be equal and are not, raise and leave no output.
        verify_text (`str` or `os.PathLike`, *optional*): text file to verify on instead of built-in sentences.

    Returns:
        `CoEForCausalLM`, or the `Path` of `output` where one was given.

    Raises:
        ValueError: an option with its value, or what the source has and CoE cannot express, before anything is
            written.
        FileExistsError: `output` exists and may not be replaced, or another process is writing it.
        OSError: `output` could not be written, for instance on a full disk.
        RuntimeError: `verify` found different logits.
    """
    counts = {"num_iterations": num_iterations, "experts_per_iteration": experts_per_iteration}
    counts["layers_per_pool"] = layers_per_pool
    noise = {"expert_noise": expert_noise, "router_noise": router_noise}
    _check_numbers(counts | {"num_experts": num_experts}, noise, seed, max_shard_size)
    if verify_text is not None and not verify:
        raise ValueError(f"upcycle: `verify_text={str(verify_text)!r}` is only read with `verify=True`; set it too.")
    source = _Source(source, output, overwrite)
    config = chain_config(source.config, num_iterations, experts_per_iteration, num_experts, layers, layers_per_pool)
    layers = None if layers is None else list(layers)
    weights = _ChainWeights(source, config, layers, expert_noise, router_noise, seed)
    config = weights.config
    changes = changes_of_function(source.config, config, layers, expert_noise)
    if changes:
        logger.warning(f"upcycle: the result does not compute the source's function ({'; '.join(changes)}). Train it.")
    batches = source.token_batches(verify_text) if verify else []

    if output is None:
        tensors = {name: tensor.clone() for name, tensor in weights.items()}
        model = CoEForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=config.dtype)
        source.pass_on_generation_config(model)
        if verify:
            source.compare(_logits(model, batches), batches, weights.is_rounded, bool(changes))
        return model

    with whole_or_nothing(Path(output), overwrite) as partial:
        source.copy_companions(partial)
        weights.write(partial, max_shard_size)
        if verify:
            model = CoEForCausalLM.from_pretrained(partial, config=copy.deepcopy(config), dtype=torch.float32)
            logits = _logits(model, batches)
            del model
            source.compare(logits, batches, weights.is_rounded, bool(changes))
        upcycling = {"source_type": source.config.model_type, "changes_of_function": changes, "layers": layers}
        source.write_facts(partial, upcycling=upcycling | counts | noise | {"seed": seed})
        # Written last, so that a folder whose conversion was killed does not load.
        custom_object_save(weights.skeleton, partial)
        config.save_pretrained(partial)
    return Path(output)


def downcycle(
    source: str | os.PathLike | CoEForCausalLM, output: str | os.PathLike | None = None, *, overwrite: bool = False
) -> MixtralForCausalLM | Path:
    """A Mixtral with the weights of a CoE of one iteration, for tools that know only Mixtral.

    Experts that several layers share are written out for each of them.

    Args:
        source (`str`, `os.PathLike` or `CoEForCausalLM`): CoE checkpoint or loaded model; it is held in RAM.
        output (`str` or `os.PathLike`, *optional*): folder to write, in Mixtral's layout of one tensor per expert.
        overwrite (`bool`): replace an existing `output`, if an earlier conversion wrote it and nothing in it changed.

    Returns:
        `MixtralForCausalLM`, or the `Path` of `output` where one was given.

    Raises:
        ValueError: the CoE has what Mixtral has not, by name, or its weights are in few bits.
        FileExistsError: `output` exists and may not be replaced, or another process is writing it.
        OSError: `output` could not be written, for instance on a full disk.
    """
    source = _Source(source, output, overwrite)
    config = _mixtral_config(source.config)
    tensors = {}
    for name, tensor in _without_pools(source.tensors.items(), source.config.layers_per_pool):
        if name.endswith(".mlp.gate.weight"):
            tensor = tensor.squeeze(0)
        elif name.endswith(".mlp.experts.down_proj") and source.config.iteration_scale:
            tensor = tensor * source.tensors[name.replace("experts.down_proj", "iteration_scale")]
        if not name.endswith(".mlp.iteration_scale"):
            tensors[name] = tensor
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    # Not `from_pretrained`: its models remember the layout they were loaded from, and this one would be saved fused.
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.load_state_dict(tensors)
    source.pass_on_generation_config(model)
    if output is None:
        return model
    with whole_or_nothing(Path(output), overwrite) as partial:
        model.save_pretrained(partial)
        source.copy_companions(partial)
    return Path(output)


def _without_pools(tensors: Iterable[tuple[str, torch.Tensor]], shares: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by its name, the experts that several layers share by the name of each of these layers."""
    for name, tensor in tensors:
        match = re.fullmatch(r"model\.layers\.(\d+)(\.mlp\.experts\..+)", name)
        layers = range(int(match[1]), int(match[1]) + shares) if match else ()
        yield from [(f"model.layers.{layer}{match[2]}", tensor) for layer in layers] or [(name, tensor)]


def _check_numbers(counts: dict, noise: dict, seed: int, max_shard_size: int | str):
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"upcycle: `{name}={value!r}` must be a whole number of at least 1.")
    for name, value in noise.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"upcycle: `{name}={value!r}` must be a number of at least 0; 0 adds no noise.")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"upcycle: `seed={seed!r}` must be a whole number from 0 to 2**32 - 1.")
    size = max_shard_size
    is_size = size > 0 if isinstance(size, int) else re.fullmatch(r"[1-9]\d* ?[KMGT]B", str(size).upper())
    if not is_size:
        raise ValueError(f"upcycle: `max_shard_size={max_shard_size!r}` must be bytes or a size such as 500MB.")


def chain_config(
    source: PreTrainedConfig,
    num_iterations: int = 2,
    experts_per_iteration: int | None = None,
    num_experts: int | None = None,
    layers: list[int] | None = None,
    layers_per_pool: int = 1,
) -> CoEConfig:
    """The configuration of the chain that `upcycle` makes of a source with this configuration.

    Raises:
        ValueError: the source or an option asks for what CoE cannot express, by name.
    """
    if source.model_type not in DENSE_FAMILIES + MOE_FAMILIES:
        known = ", ".join(MOE_FAMILIES + DENSE_FAMILIES)
        raise ValueError(f"upcycle: `model_type={source.model_type!r}` is not one of {known}.")
    declared = source.to_dict()
    _refuse(source, "quantization_config", declared.get("quantization_config"), None, "dequantize the source first")
    if len(set(declared.get("layer_types") or ())) > 1:
        raise ValueError(
            "upcycle: the source's `layer_types` mix kinds of attention, CoE has one for all layers; choose another."
        )
    depth = source.num_hidden_layers
    if layers is not None:
        is_list = isinstance(layers, list | tuple | range) and all(isinstance(layer, int) for layer in layers)
        if not is_list or len(set(layers)) < len(layers) or not set(layers) <= set(range(depth)):
            raise ValueError(f"upcycle: `layers={layers!r}` must list distinct layers of the source's {depth}.")

    fields = {name: declared[name] for name in SHARED_FIELDS}
    fields |= _moe_fields(source) if source.model_type in MOE_FAMILIES else _dense_fields(source)
    if source.model_type in DENSE_FAMILIES:
        fields["num_local_experts"] = 8 if num_experts is None else num_experts
    elif num_experts is not None:
        raise ValueError(f"upcycle: `num_experts={num_experts}` is for dense sources; leave it out to keep the MoE's.")
    if experts_per_iteration is not None:
        fields["num_experts_per_tok"] = experts_per_iteration
    return CoEConfig(
        **fields,
        num_hidden_layers=depth if layers is None else len(layers),
        layers_per_pool=layers_per_pool,
        num_iterations=num_iterations,
        iteration_scale=num_iterations > 1,
        residual="nested",
        head_dim=declared.get("head_dim"),
        attention_bias=declared.get("attention_bias", False),
        attention_dropout=declared.get("attention_dropout") or 0.0,
        architectures=["CoEForCausalLM"],
    )


def _moe_fields(source: PreTrainedConfig) -> dict:
    """The CoEConfig fields in which the four MoE families differ."""
    fields = {"num_experts_per_tok": source.num_experts_per_tok, "norm_topk_prob": True}
    fields |= {name: getattr(source, name) for name in ("output_router_logits", "router_aux_loss_coef")}
    match source.model_type:
        case "mixtral":
            width, experts = source.intermediate_size, source.num_local_experts
            fields |= {"sliding_window": source.sliding_window, "router_jitter_noise": source.router_jitter_noise}
        case "olmoe":
            _refuse(source, "clip_qkv", source.clip_qkv, None, "choose a source without clipped attention")
            width, experts = source.intermediate_size, source.num_experts
            fields |= {"qk_norm": "full", "norm_topk_prob": source.norm_topk_prob}
        case "qwen3_moe":
            remedy = "choose a source whose layers are all sparse"
            _refuse(source, "mlp_only_layers", source.mlp_only_layers, [], remedy)
            _refuse(source, "decoder_sparse_step", source.decoder_sparse_step, 1, remedy)
            width, experts = source.moe_intermediate_size, source.num_experts
            fields |= {"qk_norm": "head", "norm_topk_prob": source.norm_topk_prob}
            fields |= {"sliding_window": source.sliding_window}
        case "granitemoe":
            width, experts = source.intermediate_size, source.num_local_experts
            # The residual stream is carried in units of `embedding_multiplier`: see `_folded_multipliers`.
            fields |= {"rms_norm_eps": source.rms_norm_eps / source.embedding_multiplier**2}
    return fields | {"intermediate_size": width, "num_local_experts": experts}


def _dense_fields(source: PreTrainedConfig) -> dict:
    """The CoEConfig fields in which the three dense families differ."""
    fields = {"intermediate_size": source.intermediate_size, "num_experts_per_tok": 2, "norm_topk_prob": True}
    match source.model_type:
        case "llama":
            _refuse(source, "mlp_bias", source.mlp_bias, False, "choose a source whose FFN has no biases")
        case "mistral":
            fields |= {"sliding_window": source.sliding_window}
        case "qwen3":
            slides = "sliding_attention" in source.layer_types
            fields |= {"qk_norm": "head", "sliding_window": source.sliding_window if slides else None}
    return fields


def _refuse(source: PreTrainedConfig, name: str, value, accepted, remedy: str):
    if value != accepted:
        raise ValueError(f"upcycle: {source.model_type}'s `{name}={value!r}` cannot be expressed in CoE; {remedy}.")


def _folded_multipliers(source: PreTrainedConfig) -> dict[str, float]:
    """What GraniteMoE multiplies activations by, as factors on the weights whose names end so; `{}` elsewhere.

    CoE carries the residual stream divided by `embedding_multiplier`, which no RMSNorm can see once its epsilon is
    divided by the square. Embeddings then stay as they are, and stay tied; what is added to the stream is divided.
    A chain therefore sees its own update in the same units, that is, smaller beside `x_0` than in Granite's.
    """
    if source.model_type != "granitemoe":
        return {}
    head_dim = source.to_dict().get("head_dim") or source.hidden_size // source.num_attention_heads
    query = source.attention_multiplier * head_dim**0.5
    update = source.residual_multiplier / source.embedding_multiplier
    return {
        "q_proj.weight": query,
        "q_proj.bias": query,
        "o_proj.weight": update,
        "o_proj.bias": update,
        "experts.down_proj": update,
        "model.norm.weight": 1 / source.logits_scaling,
    }


def changes_of_function(
    source: PreTrainedConfig, config: CoEConfig, layers: list[int] | None = None, expert_noise: float = 0.0
) -> list[str]:
    """Why the chain's first forward is not the source's; empty where it is."""
    changes = []
    if source.model_type in MOE_FAMILIES and config.num_experts_per_tok != source.num_experts_per_tok:
        changes.append(f"{config.num_experts_per_tok} experts per iteration instead of {source.num_experts_per_tok}")
    if source.model_type in DENSE_FAMILIES and expert_noise:
        changes.append(f"expert_noise={expert_noise}")
    if layers is not None and list(layers) != list(range(source.num_hidden_layers)):
        changes.append(f"layers {list(layers)} of {source.num_hidden_layers}")
    if config.layers_per_pool > 1:
        changes.append(f"{config.layers_per_pool} layers share the mean of their experts")
    return changes


def _mixtral_config(source: CoEConfig) -> MixtralConfig:
    if source.model_type != "coe":
        raise ValueError(f"downcycle: `model_type={source.model_type!r}` is not a CoE.")
    declared = source.to_dict()
    if stored := declared.get("quantization_config"):
        raise ValueError(
            f"downcycle: the weights are in few bits, `quantization_config={stored}`; take the full-precision "
            "checkpoint, or load this one, `dequantize()` it, and save it or pass it."
        )
    required = {"num_iterations": (1,), "num_shared_experts": (0,), "qk_norm": (None,), "attention_bias": (False,),
                "norm_topk_prob": (True,), "residual": ("nested", "outer"), "router_bias": (False,)}  # fmt: skip
    for name, accepted in required.items():
        if getattr(source, name) not in accepted:
            raise ValueError(
                f"downcycle: Mixtral has no `{name}={getattr(source, name)!r}`; only {accepted} can be converted."
            )
    names = (*SHARED_FIELDS, "intermediate_size", "num_hidden_layers", "head_dim", "sliding_window",
             "num_local_experts", "num_experts_per_tok", "attention_dropout", "output_router_logits",
             "router_aux_loss_coef", "router_jitter_noise")  # fmt: skip
    fields = {name: value for name, value in declared.items() if name in names}
    return MixtralConfig(**fields, architectures=["MixtralForCausalLM"], dtype=source.dtype)


class _Source:
    """A checkpoint folder, a Hub id or a loaded model: its config, and its tensors by name."""

    def __init__(self, source: str | os.PathLike | PreTrainedModel, output: str | os.PathLike | None, overwrite: bool):
        if isinstance(source, nn.Module) and not isinstance(source, PreTrainedModel):
            raise ValueError(f"`source` is a {type(source).__name__}; merge adapters and pass a transformers model.")
        self.model = self.folder = None
        self.name = source.name_or_path if isinstance(source, PreTrainedModel) else str(source)
        if output is not None:
            self._keep_apart(Path(output))
            check_replaceable(Path(output), overwrite)
        # Read before the work, of which only an output tells.
        self.base = None if output is None else facts_of(self.name)
        if isinstance(source, PreTrainedModel):
            if not source.can_generate():
                raise ValueError(f"`source` is a {type(source).__name__}; pass a causal language model.")
            self.model, self.config, self.tensors = source, source.config, source.state_dict()
            if any(".lora_" in name or ".base_layer." in name for name in self.tensors):
                raise ValueError(
                    f"`source` is a {type(source).__name__} with an adapter in it; merge it first: "
                    "`AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()`."
                )
            self.generation_config = source.generation_config
            return
        require_model("source", source)
        self.folder = Path(source)
        if self.folder.is_file():
            raise ValueError(f"`source={self.name}` is a file; name the folder that it is in.")
        refuse_adapter("source", source)
        if not self.folder.is_dir():
            patterns = ["config.json", "*.safetensors", SAFE_WEIGHTS_INDEX_NAME, *COMPANION_FILES]
            ignored = ["original/*", "consolidated*"]
            self.folder = Path(snapshot_download(str(source), allow_patterns=patterns, ignore_patterns=ignored))
        self.config, self.tensors = AutoConfig.from_pretrained(self.folder), _SafetensorsFolder(self.folder)
        has_settings = (self.folder / GENERATION_CONFIG_NAME).is_file()
        self.generation_config = GenerationConfig.from_pretrained(self.folder) if has_settings else None

    def _keep_apart(self, output: Path):
        """Neither is the other, holds it or is held by it."""
        source, output = Path(self.name).resolve(), output.resolve()
        if self.name and source.is_dir():
            if source == output:
                raise ValueError(f"`output={str(output)!r}` is the source itself; choose another folder.")
            if source in output.parents or output in source.parents:
                raise ValueError(f"`output={str(output)!r}` holds the source or is in it; choose another folder.")

    def write_facts(self, output: Path, **conversion):
        """What the output was made of, for the scripts that go on with it and for its model card."""
        facts = {"model": self.name or type(self.model).__name__, "base": self.base, **conversion}
        (output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def pass_on_generation_config(self, model: PreTrainedModel):
        if self.generation_config is not None:
            model.generation_config = copy.deepcopy(self.generation_config)

    def copy_companions(self, output: Path):
        if self.folder is None:
            self.generation_config.save_pretrained(output)
            return
        for pattern in COMPANION_FILES:
            for path in filter(Path.is_file, self.folder.glob(pattern)):
                target = output / path.relative_to(self.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)

    def token_batches(self, text_file: str | os.PathLike | None, max_lines: int = 64) -> list[torch.LongTensor]:
        """Token ids `[1, S]`, S <= 256, of the built-in sentences or of the first lines of a text file.

        A source without a tokenizer gets the text's bytes as token ids, folded into its vocabulary.
        """
        try:
            texts = SENTENCES if text_file is None else Path(text_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"upcycle: `verify_text={str(text_file)!r}` cannot be read: {error}.") from error
        texts = [text for text in texts if text.strip()][:max_lines]
        if not texts:
            raise ValueError(f"upcycle: `verify_text={str(text_file)!r}` holds no text.")
        if self.folder is not None and any(self.folder.glob("tokenizer*")):
            encode = AutoTokenizer.from_pretrained(self.folder).encode
        else:
            encode = self._byte_ids
        return [torch.tensor([encode(text)[:256]]) for text in texts]

    def _byte_ids(self, text: str) -> list[int]:
        return [byte % self.config.vocab_size for byte in text.encode()]

    def compare(self, logits: torch.Tensor, batches: list[torch.LongTensor], is_rounded: bool, is_changed: bool):
        """Log how far the chain's logits are from the source's; raise where they ought to be equal and are not.

        They ought to be within 1e-5 of the largest logit, and if weights were rounded within 2e-2 (root mean square).
        """
        source = self.model
        if source is None:
            source = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        expected = _logits(source, batches)
        difference, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
        relative = ((logits - expected).norm() / expected.norm()).item()
        kl = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        report = (
            f"max abs logit difference {difference:.3g} (largest logit {largest:.3g}, relative RMS {relative:.3g}), "
            f"KL(source || chain) {kl.mean().item():.3g} nats a token, over {len(kl)} tokens in fp32"
        )
        logger.info(f"upcycle: {report}")
        is_equal = relative <= 2e-2 if is_rounded else difference <= 1e-5 * max(1.0, largest)
        if not is_equal and not is_changed:
            raise RuntimeError(f"upcycle: the chain does not compute the source's function: {report}.")


@torch.no_grad()
def _logits(model: PreTrainedModel, batches: list[torch.LongTensor]) -> torch.Tensor:
    """The logits `[tokens, vocabulary]` of all batches, computed by an fp32 copy of the model."""
    config, tensors = copy.deepcopy(model.config), model.state_dict()
    model = type(model).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
    return torch.cat([model(batch.to(model.device), use_cache=False).logits[0].cpu() for batch in batches])


class _SafetensorsFolder(Mapping):
    """The tensors of a checkpoint folder by name, each read from its file when it is asked for."""

    def __init__(self, folder: Path):
        index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self.files = {name: folder / file for name, file in weight_map.items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{index} is damaged ({error}); copy or download it again.") from error
        elif single.is_file():
            self.files = dict.fromkeys(self._names_in(single), single)
        else:
            raise ValueError(
                f"{folder} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; load the model with "
                "transformers and pass it as `source`, or save it again as safetensors."
            )
        self._refuse_incomplete(folder)

    def _refuse_incomplete(self, folder: Path):
        listed = set(self.files.values())
        if missing := sorted(path.name for path in listed if not path.is_file()):
            raise ValueError(f"{folder} is incomplete: its index names {missing}, which are not there.")
        found = {(name, path) for path in listed for name in self._names_in(path)}
        if missing := sorted(name for name, _ in self.files.items() - found):
            raise ValueError(f"{folder} is incomplete: its files lack {missing[:4]} ({len(missing)} tensors).")

    @staticmethod
    def _names_in(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut off ({error}); copy or download it again.") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        # Opened for each tensor: an open file keeps every page that was read from it in memory.
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class _ChainWeights(Mapping):
    """The weights of the chain by CoE's names, each made from the source's tensors when it is asked for.

    `parts` is the whole mapping: for every CoE weight the source tensors that are its rows, in order. A fused tensor
    is one part; `gate_up_proj` of separate experts is gate, up, gate, up, ...; the router is C times the source's.
    Experts that several layers share have the parts of each of these layers in turn, and are their mean.
    """

    def __init__(
        self,
        source: _Source,
        config: CoEConfig,
        layers: list[int] | None,
        expert_noise: float,
        router_noise: float,
        seed: int,
    ):
        self.is_dense = source.config.model_type in DENSE_FAMILIES
        if expert_noise and not self.is_dense:
            raise ValueError(f"upcycle: `expert_noise={expert_noise}` is for the copies of a dense FFN; leave it out.")
        self.config, self.tensors = copy.deepcopy(config), source.tensors
        self.expert_noise, self.router_noise, self.seed = expert_noise, router_noise, seed
        config, self.layers = self.config, range(config.num_hidden_layers) if layers is None else layers
        self.factors = _folded_multipliers(source.config)
        self.original = {_coe_name(name): name for name in self.tensors}
        self._settle_tying()

        config.dtype = self._read("model.embed_tokens.weight").dtype
        with torch.device("meta"):
            self.skeleton = CoEForCausalLM(config).to(config.dtype)
        self.meta = self.skeleton.state_dict()
        if config.tie_word_embeddings:
            del self.meta["lm_head.weight"]
        self.parts = {name: self._parts_of(name) for name in self.meta}
        self._refuse_strangers(source.config.num_hidden_layers)
        # Folding rounds 16-bit weights once more; everything else is the source's arithmetic.
        self.is_rounded = bool(self.factors) and config.dtype != torch.float32

    def _settle_tying(self):
        """Tied as transformers would load it: by the config, unless the checkpoint holds two different matrices."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if self.config.tie_word_embeddings and head in self.original:
            self.original.setdefault(embedding, self.original[head])
            self.config.tie_word_embeddings = torch.equal(self._read(head), self._read(embedding))
        if embedding not in self.original:
            raise ValueError(f"upcycle: the source holds no `{embedding}`; pass a causal language model.")

    def _parts_of(self, name: str) -> list[str]:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            return [name]
        first, leaf = int(match[1]), match[2]
        shares = self.config.layers_per_pool if leaf.startswith("mlp.experts.") else 1
        return [part for layer in self.layers[first : first + shares] for part in self._parts_of_layer(layer, leaf)]

    def _parts_of_layer(self, source_layer: int, leaf: str) -> list[str]:
        layer = f"model.layers.{source_layer}"
        whole = f"{layer}.{leaf}"
        # The dense FFN is every expert.
        expert = f"{layer}.mlp" if self.is_dense else f"{layer}.mlp.experts.{{}}"
        experts = [expert.format(index) for index in range(self.config.num_local_experts)]
        match leaf:
            case "mlp.iteration_scale":
                return []
            case "mlp.gate.weight":
                return [] if self.is_dense else [whole] * self.config.num_iterations
            case "mlp.experts.gate_up_proj" if whole not in self.original:
                return [f"{expert}.{half}_proj.weight" for expert in experts for half in ("gate", "up")]
            case "mlp.experts.down_proj" if whole not in self.original:
                return [f"{expert}.down_proj.weight" for expert in experts]
        return [whole]

    def _refuse_strangers(self, source_layers: int):
        """Every tensor the chain needs must be in the source, and every tensor of the kept layers in the chain."""
        needed = {part for parts in self.parts.values() for part in parts}
        if missing := sorted(needed - set(self.original)):
            raise ValueError(f"upcycle: the source holds no {missing[:4]} ({len(missing)} tensors missing).")
        dropped = tuple(f"model.layers.{layer}." for layer in range(source_layers) if layer not in self.layers)
        known = needed | ({"lm_head.weight"} if self.config.tie_word_embeddings else set())
        strangers = sorted(
            original
            for name, original in self.original.items()
            if name not in known and not name.startswith(dropped) and not name.endswith(".rotary_emb.inv_freq")
        )
        if strangers:
            raise ValueError(f"upcycle: CoE has no place for the source's {strangers[:4]} ({len(strangers)} tensors).")

    def __getitem__(self, name: str) -> torch.Tensor:
        shape, parts = self.meta[name].shape, self.parts[name]
        if name.endswith(".mlp.iteration_scale"):
            return (torch.arange(len(self.meta[name])) == 0).to(self.config.dtype)
        if not parts:
            normal = torch.randn(shape, generator=self._generator(name))
            return (normal * self.config.initializer_range).to(self.config.dtype)
        shares = self.config.layers_per_pool if ".mlp.experts." in name else 1
        size = len(parts) // shares
        layers = (self._of_one_layer(name, parts[size * i : size * (i + 1)]) for i in range(shares))
        tensor = next(layers)
        if shares > 1:
            dtype = tensor.dtype
            tensor = (sum((layer.float() for layer in layers), tensor.float()) / shares).to(dtype)
        factors = [factor for ending, factor in self.factors.items() if name.endswith(ending)]
        return tensor * factors[0] if factors else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    def _of_one_layer(self, name: str, parts: list[str]) -> torch.Tensor:
        shape, tensor = self.meta[name].shape, self._read(parts[0])
        if tensor.dim() < len(shape):
            tensor = self._stack(name, parts)
        self._check_shape(name, tensor.shape, shape)
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        return self.tensors[self.original[name]].cpu()

    def _stack(self, name: str, parts: list[str]) -> torch.Tensor:
        """Routers `[C, N, H]`, or separate experts `[N, 2I, H]`, `[N, H, I]`: the parts' rows in order, with noise."""
        is_router = name.endswith(".mlp.gate.weight")
        noise, generator = self.router_noise if is_router else self.expert_noise, self._generator(name)
        stacked = torch.empty_like(self.meta[name], dtype=self._read(parts[0]).dtype, device="cpu")
        blocks = stacked.view(len(parts), -1, stacked.shape[-1])
        for index, (block, part) in enumerate(zip(blocks, parts, strict=True)):
            tensor = self._read(part)
            self._check_shape(part, tensor.shape, block.shape)
            # The first iteration's router is the source's.
            if noise and not (is_router and index == 0):
                tensor = tensor.float()
                tensor = tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
            block.copy_(tensor)
        return stacked

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))

    @staticmethod
    def _check_shape(name: str, found: torch.Size, expected: torch.Size):
        if found != expected:
            raise ValueError(f"upcycle: `{name}` is {tuple(found)} but the config says {tuple(expected)}.")

    def write(self, folder: Path, max_shard_size: int | str):
        """Write safetensors files and their index, holding one file's tensors at a time."""
        plan = split_torch_state_dict_into_shards(self.meta, max_shard_size=max_shard_size)
        total, size = 0, sum(tensor.nbytes for tensor in self.meta.values())
        with logging.tqdm(total=size, desc="Upcycling", unit="B", unit_scale=True) as progress:
            for file, names in plan.filename_to_tensors.items():
                shard = {}
                for name in names:
                    shard[name] = self[name].contiguous()
                    total += shard[name].nbytes
                    progress.update(shard[name].nbytes)
                save_file(shard, folder / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _coe_name(name: str) -> str:
    for pattern, replacement in RENAMINGS.items():
        name = re.sub(pattern, replacement, name)
    return name


__all__ = ["chain_config", "changes_of_function", "downcycle", "upcycle"]

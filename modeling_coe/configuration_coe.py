# Copyright 2026 The Chain-of-Experts team. All rights reserved. trf-ignore: TRF028, SPDX names the licence
# SPDX-License-Identifier: Apache-2.0
"""CoE model configuration: Mixtral's fields under Mixtral's names, and those that describe the chain."""

import difflib
import math
from collections.abc import Iterable
from numbers import Real

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import auto_docstring, logging


logger = logging.get_logger(__name__)

RESIDUALS = ("nested", "inner", "outer")
QK_NORMS = (None, "head", "full")
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@auto_docstring(
    checkpoint="coe-c2-k4-n64",
    custom_args=r"""
    num_iterations (`int`, *optional*, defaults to 2):
        C, how many times a layer routes its tokens through its expert pool. `1` is a Mixture-of-Experts layer.
    num_local_experts (`int`, *optional*, defaults to 64):
        N, the routed experts of a pool. All iterations share them, and all layers of the pool do.
    num_experts_per_tok (`int`, *optional*, defaults to 4):
        K, the experts a token visits in **each** iteration; a layer computes `C * K` experts per token.
    layers_per_pool (`int`, *optional*, defaults to 1):
        g, how many consecutive layers share one pool of experts; each keeps routers, attention and norms of its own.
        `1` gives every layer a pool, `num_hidden_layers` the whole model one.
    num_shared_experts (`int`, *optional*, defaults to 0):
        Width of the always-on FFN added in every iteration, in units of `intermediate_size`. `0` is none.
    residual (`str`, *optional*, defaults to `"nested"`):
        `"nested"`: `h + (x_C - x_0)`, `"inner"`: `x_C` (paper, eq. 5), `"outer"`: `h + x_C` without the residual
        along the chain (paper, section 4.4).
    independent_gating (`bool`, *optional*, defaults to `True`):
        A router per iteration; `False` shares one router between the iterations (the paper's ablation).
    norm_topk_prob (`bool`, *optional*, defaults to `True`):
        Renormalise the K routing weights of every iteration to sum to one (Mixtral, Qwen3-MoE), those of a layer to
        C; `False` keeps the softmax values (OLMoE, the paper). A single expert (K = 1) wants `False`: renormalised,
        its weight is always 1 and the router learns from the balancing loss alone.
    router_bias (`bool`, *optional*, defaults to `False`):
        A bias per router that counts for the choice of experts and not for their weights (arXiv 2408.15664). Nothing
        learns it: `modeling_coe.balancing` moves it towards the experts that are chosen too rarely.
    num_null_experts (`int`, *optional*, defaults to 0):
        Outputs of every router that stand for no expert (arXiv 2410.07348): a token that chooses one computes an
        expert less. Needs `router_bias`, which holds the budget.
    expert_budget (`float`, *optional*):
        The mean number of experts that a token computes per iteration, null experts not counted, which
        `modeling_coe.balancing` holds in training. Without a value, the share of outputs that are experts,
        `K * N / (N + num_null_experts)`.
    iteration_scale (`bool`, *optional*, defaults to `False`):
        Learn one scalar per iteration on that iteration's output. Upcycled checkpoints start it at 1, 0, 0, ...
    qk_norm (`str`, *optional*):
        RMSNorm on queries and keys: `"head"` per head (Qwen3), `"full"` over all heads (OLMoE), `None` for none.
    attention_bias (`bool`, *optional*, defaults to `False`):
        Biases on the query, key, value and output projections, as Llama, Qwen3 and OLMoE sources may have them.
    """,
)
@strict
class CoEConfig(PreTrainedConfig):
    r"""
    Raises:
        ValueError: a value or a combination that no model can have, naming the field, its value and the remedy; or an
            unknown key that is one typing mistake away from a field, or another model's name for it. In a stored
            configuration such a key only gets a warning.

    Example:

    ```python
    >>> from modeling_coe import CoEConfig, CoEForCausalLM

    >>> configuration = CoEConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_attention_heads=4)
    >>> model = CoEForCausalLM(configuration)
    >>> model.config.num_iterations
    2
    ```"""

    model_type = "coe"
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "router_logits"]
    default_theta = 1000000.0
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    attribute_map = {"num_experts": "num_local_experts"}

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    attention_dropout: float | int = 0.0
    num_iterations: int = 2
    num_local_experts: int | None = None
    num_experts_per_tok: int = 4
    layers_per_pool: int = 1
    num_shared_experts: int = 0
    residual: str = "nested"
    independent_gating: bool = True
    norm_topk_prob: bool = True
    router_bias: bool = False
    num_null_experts: int = 0
    expert_budget: float | int | None = None
    iteration_scale: bool = False
    qk_norm: str | None = None
    attention_bias: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    rope_parameters: RopeParameters | dict | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # `model_type` is in every stored configuration, and no keyword that a person would type.
        is_stored = "model_type" in kwargs
        for key in self._report_misspelt(kwargs, refuse=not is_stored):
            del kwargs[key]
        self._check_num_labels(kwargs.get("num_labels"))
        self._set_num_local_experts(kwargs)
        self._set_expert_budget()
        self.auto_map = dict(AUTO_MAP)
        self._check_dtype()
        super().__post_init__(**kwargs)
        self.check()
        if not is_stored:
            self._check_tokens(SPECIAL_TOKENS)
        self.base_model_tp_plan = self.base_model_tp_plan | self._optional_tp_plan()
        if self.norm_topk_prob and self.num_experts_per_tok == 1 < self.num_local_experts:
            logger.warning_once(
                "CoEConfig: with `num_experts_per_tok=1` and `norm_topk_prob=True` every routing weight is 1, and the "
                "routers learn from the balancing loss alone. Set `norm_topk_prob=False`."
            )

    def __setattr__(self, key, value):
        if key in ("rope_theta", "rope_scaling") and key not in self.__dict__:
            raise ValueError(
                f"CoEConfig: `{key}={value!r}` has no effect on a configuration that exists, such as a checkpoint's; "
                "change `rope_parameters`, a dict with `rope_type` and `rope_theta`."
            )
        # transformers' own code sets what other models have; another model's name for a field is only warned of.
        if not hasattr(type(self), key):
            self._report_misspelt({key: value}, refuse=key not in OTHER_NAMES)
        super().__setattr__(key, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        cls._report_misspelt(kwargs, refuse=True)
        cls._check_num_labels(kwargs.get("num_labels"))
        # As everywhere else, None asks for no other budget than the stored one.
        if kwargs.get("expert_budget", 0) is None:
            del kwargs["expert_budget"]
        loaded = super().from_dict({"model_type": cls.model_type, **config_dict}, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._set_expert_budget()
        config.check()
        config._check_tokens([name for name in SPECIAL_TOKENS if name in kwargs])
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.check()
        super().save_pretrained(save_directory, *args, **kwargs)

    def validate_architecture(self):
        """Checks that the fields describe a model that can exist; runs at creation, saving and loading."""
        super().validate_architecture()
        self.check()

    def validate_rope(self):
        """transformers' checks, whose KeyError for a missing key becomes a ValueError, and those of the values."""
        try:
            self._check_rope(self.rope_parameters or {})
            super().validate_rope()
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"CoEConfig: `rope_parameters={self.rope_parameters}`: {error.args[0]}") from error

    def _check_rope(self, rope: dict):
        rope_type, types = rope.get("rope_type"), ("default", *ROPE_INIT_FUNCTIONS)
        self._require("rope_parameters", rope_type in types, f"a dict whose `rope_type` is one of {types}")
        for key, value in rope.items():
            numbers = value if isinstance(value, list) and key in ("short_factor", "long_factor") else [value]
            is_finite = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            is_switch = key == "truncate" and isinstance(value, bool)  # of YaRN's range
            known = key in ("rope_type", "type") or value is None or is_finite or is_switch
            self._require("rope_parameters", known, f"a dict of finite numbers, which `{key}={value!r}` is not")
        self._require("rope_parameters", (rope.get("rope_theta") or 0) > 0, "a dict whose `rope_theta` is above 0")
        for key in ("factor", "original_max_position_embeddings"):
            self._require(
                "rope_parameters", key not in rope or (rope[key] or 0) > 0, f"a dict whose `{key}` is above 0"
            )
        whole = rope.get("partial_rotary_factor", 1.0) == 1
        self._require("rope_parameters", whole, "without `partial_rotary_factor`: CoE rotates whole heads")
        if rope_type == "longrope":
            self._require("head_dim", self.head_dim is not None, "set where `rope_type='longrope'`")
            for key in ("short_factor", "long_factor"):
                fits = len(rope.get(key, [])) == self.head_dim // 2
                self._require("rope_parameters", fits, f"a dict with head_dim / 2 = {self.head_dim // 2} `{key}`s")

    def check_pad_token(self):
        """The embedding's padding row must exist. Checked where a model is built, not while tokens are being added."""
        self._check_tokens(["pad_token_id"])

    def _check_tokens(self, names: Iterable[str]):
        """Those that a person names must exist. A stored file may name some that its model never got."""
        for name in names:
            tokens = getattr(self, name)
            tokens = tokens if isinstance(tokens, list) else [tokens]
            inside = all(token is None or 0 <= token < self.vocab_size for token in tokens)
            self._require(name, inside, f"None or below vocab_size={self.vocab_size}, and not negative")

    @staticmethod
    def _check_num_labels(num_labels: int | None):
        if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
            raise ValueError(f"CoEConfig: `num_labels={num_labels!r}` must be a positive integer.")

    def check(self):
        """Raises a ValueError for values that no model can have, which may have come after construction."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings", "num_iterations", "num_local_experts",
                     "num_experts_per_tok", "layers_per_pool"):  # fmt: skip
            value = getattr(self, name)
            self._require(name, value is not None and value >= 1, "a positive integer")
        self._check_dtype()
        for name in (
            "num_shared_experts",
            "num_null_experts",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "initializer_range",
        ):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "a finite number >= 0")
        self._require("rms_norm_eps", math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0, "a number > 0")
        self._require("attention_dropout", 0 <= self.attention_dropout < 1, "in [0, 1)")
        self._require("router_jitter_noise", self.router_jitter_noise < 1, "below 1")
        self._require("residual", self.residual in RESIDUALS, f"one of {RESIDUALS}")
        self._require("hidden_act", self.hidden_act in ACT2FN, f"one of {sorted(ACT2FN)}")
        self._require("qk_norm", self.qk_norm in QK_NORMS, f"one of {QK_NORMS}")
        self._require("sliding_window", self.sliding_window is None or self.sliding_window >= 1, "None or positive")
        self._require(
            "num_experts_per_tok",
            self.num_experts_per_tok <= self.num_local_experts,
            f"at most num_local_experts={self.num_local_experts}: lower it or add experts",
        )
        self._require(
            "num_null_experts",
            self.num_null_experts == 0 or self.router_bias,
            "0 without `router_bias=True`: the bias decides how often null experts are chosen",
        )
        self.check_expert_budget(self.expert_budget)
        self._require(
            "layers_per_pool",
            self.num_hidden_layers % self.layers_per_pool == 0,
            f"a divisor of num_hidden_layers={self.num_hidden_layers}: every pool has as many layers",
        )
        if self.head_dim is None:
            self._require(
                "hidden_size",
                self.hidden_size % self.num_attention_heads == 0,
                f"a multiple of num_attention_heads={self.num_attention_heads}, or set head_dim",
            )
        head_dim = self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads
        self._require("head_dim", head_dim >= 2 and head_dim % 2 == 0, f"even for RoPE (it is {head_dim})")
        self._require(
            "num_attention_heads",
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"a multiple of num_key_value_heads={self.num_key_value_heads}",
        )
        self.validate_rope()

    @property
    def smallest_expert_budget(self) -> int:
        """Experts per token and iteration that are left where a token chooses every null expert it can."""
        return max(0, self.num_experts_per_tok - self.num_null_experts)

    def _set_expert_budget(self):
        if self.num_null_experts > 0 and self.expert_budget is None:
            outputs = self.num_local_experts + self.num_null_experts
            proportional = self.num_experts_per_tok * self.num_local_experts / outputs
            self.expert_budget = max(proportional, self.smallest_expert_budget)

    def is_extreme_budget(self, expert_budget: float) -> bool:
        """Which any model can hold: as many null experts as there can be, or none."""
        return expert_budget in (self.smallest_expert_budget, self.num_experts_per_tok)

    def check_expert_budget(self, expert_budget: float | None):
        """Raises a ValueError for a mean number of experts per token that the null experts do not allow."""
        low, high = self.smallest_expert_budget, self.num_experts_per_tok
        message = f"CoEConfig: `expert_budget={expert_budget!r}` must be"
        if self.num_null_experts == 0 and expert_budget is not None:
            raise ValueError(
                f"{message} None without null experts: every token computes {high} experts per iteration. Train a "
                "model with `num_null_experts` and `router_bias=True`."
            )
        is_number = isinstance(expert_budget, Real) and not isinstance(expert_budget, bool)
        if self.num_null_experts > 0 and not (is_number and low <= expert_budget <= high):
            raise ValueError(f"{message} a number in [{low}, {high}], experts per token and iteration.")

    def _check_dtype(self):
        known = self.dtype is None or isinstance(vars(torch).get(str(self.dtype).removeprefix("torch.")), torch.dtype)
        self._require("dtype", known, "None or one of torch's, such as 'bfloat16'")

    def _require(self, name: str, condition: bool, requirement: str):
        if not condition:
            raise ValueError(f"CoEConfig: `{name}={getattr(self, name)!r}` must be {requirement}.")

    @classmethod
    def _report_misspelt(cls, unknown: dict, refuse: bool) -> list[str]:
        """The keys that mean another one: refused where a person types them, warned of in a stored file."""
        known, reported = [*cls.__dataclass_fields__, *TRANSFORMERS_KEYS], []
        for key, value in unknown.items():
            # Any `..._token_id` may be a token of its own: `eot_token_id` is no misspelt `eos_token_id`.
            allowed = key in known or key.startswith("_") or key.endswith("_token_id")
            close = [] if allowed else difflib.get_close_matches(key, known, 1, 0.85)
            if meant := OTHER_NAMES.get(key, *close[:1]):
                message = f"CoEConfig: unknown key `{key}={value!r}`; did you mean `{meant}`?"
                if refuse:
                    raise ValueError(message)
                logger.warning(f"{message} It has no effect.")
                reported.append(key)
        return reported

    def _set_num_local_experts(self, unknown: dict):
        given = unknown.get("num_experts", self.num_local_experts)
        if self.num_local_experts is not None and given != self.num_local_experts:
            raise ValueError(
                f"CoEConfig: `num_experts={given}` and `num_local_experts={self.num_local_experts}` are two names of "
                "one field and must be equal: give one of them."
            )
        self.num_local_experts = 64 if given is None else given

    def _optional_tp_plan(self) -> dict[str, str]:
        """Tensor-parallel rules of the modules that only some configurations have (Qwen3-MoE's and OLMoE's rules)."""
        plan = {}
        if self.qk_norm == "head":
            plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        elif self.qk_norm == "full":
            plan |= {f"layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
            plan |= {"layers.*.self_attn.o_proj": "rowwise_split_input"}
        if self.num_shared_experts:
            plan |= {f"layers.*.mlp.shared_expert.{name}_proj": "colwise" for name in ("gate", "up")}
            plan |= {"layers.*.mlp.shared_expert.down_proj": "rowwise"}
        return plan


# What a checkpoint's config.json tells a process that does not have this package (`trust_remote_code=True`).
AUTO_MAP = {
    "AutoConfig": "configuration_coe.CoEConfig",
    "AutoModel": "modeling_coe.CoEModel",
    "AutoModelForCausalLM": "modeling_coe.CoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_coe.CoEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_coe.CoEForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_coe.CoEForQuestionAnswering",
}
# Keys that transformers reads although no dataclass field declares them.
TRANSFORMERS_KEYS = (
    "torch_dtype", "num_labels", "num_experts", "auto_map", "output_attentions", "name_or_path", "rope_theta",
    "rope_scaling", "attn_implementation", "experts_implementation", "per_layer_config", "model_type",
)  # fmt: skip
# What other mixtures of experts call our fields; transformers would drop or ignore them silently.
OTHER_NAMES = {
    "top_k": "num_experts_per_tok",
    "topk": "num_experts_per_tok",
    "moe_k": "num_experts_per_tok",
    "num_selected_experts": "num_experts_per_tok",
    "moe_num_experts": "num_local_experts",
    "n_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "hidden_dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "activation": "hidden_act",
    "hidden_activation": "hidden_act",
    "layer_norm_eps": "rms_norm_eps",
    "norm_eps": "rms_norm_eps",
    "jitter_noise": "router_jitter_noise",
    "router_noise": "router_jitter_noise",
    "aux_loss_coef": "router_aux_loss_coef",
    "aux_loss_alpha": "router_aux_loss_coef",
    "tie_embeddings": "tie_word_embeddings",
    "max_seq_len": "max_position_embeddings",
    "iterations": "num_iterations",
    "num_iters": "num_iterations",
    "moe_top_k": "num_experts_per_tok",
    "moe_topk": "num_experts_per_tok",
    "n_experts": "num_local_experts",
    "num_routed_experts": "num_local_experts",
    "n_routed_experts": "num_local_experts",
}

__all__ = ["CoEConfig"]

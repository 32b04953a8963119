# Copyright 2026 The Chain-of-Experts team. All rights reserved. trf-ignore: TRF028, SPDX names the licence
# SPDX-License-Identifier: Apache-2.0
#
# Attention, RoPE and the eager experts follow transformers' modeling_mixtral.py, changed for CoE:
# Copyright 2023 Mistral AI and the HuggingFace Inc. team. All rights reserved. Apache-2.0.
"""PyTorch CoE: Mixtral's decoder with a chain of C routed iterations over one expert pool in place of the MoE block.

A pool belongs to `layers_per_pool` consecutive layers. The first of them holds its weights, as `mlp.experts`; the
others have no `experts`, and the model hands the pool to their forward pass.

Shape letters: B batch, S sequence, T = B*S tokens, H hidden, I expert width, N experts, K experts per iteration,
C iterations. Paper: Chain-of-Experts, arXiv 2506.18945.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from threading import RLock

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import (
    is_deepspeed_zero3_enabled,
    use_experts_implementation,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_coe import CoEConfig
from .experts_coe import is_transformed, one_weight_gradient, router_linear
from .quantization import QuantizedExpertsConfig


logger = logging.get_logger(__name__)
# While transformers loads a model it replaces functions of the whole process, that which ties the head among them.
LOADING = RLock()

# The budgets for which a router's null bias is stored; between two of them it is interpolated.
BUDGET_STEPS = 17
BIAS = "e_score_correction_bias"
# The fields that a model reads once, when it is built.
BUILT_FROM = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "num_iterations", "num_local_experts", "num_experts_per_tok", "layers_per_pool",
    "num_shared_experts", "residual", "independent_gating", "norm_topk_prob", "router_bias", "num_null_experts",
    "iteration_scale", "qk_norm", "attention_bias", "router_jitter_noise", "attention_dropout", "rope_parameters",
)  # fmt: skip


@use_experts_implementation
class CoEExperts(nn.Module):
    """A pool of experts, `[N, 2I, H]` and `[N, H, I]`, in the first of its layers; every visit calls the same pool."""

    def __init__(self, config: CoEConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`sum_k top_k_weights[:, k] * E_{top_k_index[:, k]}(x)`; index N (no expert, or another rank's) adds nothing.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, H)`): x.
            top_k_index (`torch.LongTensor` of shape `(T, K)`): values in `[0, N]`.
            top_k_weights (`torch.Tensor` of shape `(T, K)`): routing weights.
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            expert_output = expert_output * top_k_weights[token, slot, None]
            output.index_add_(0, token, expert_output.to(output.dtype))
        return output


class CoETopKRouter(nn.Module):
    """The C routers of a layer in one module (eq. 3): `gate(x, t)` routes iteration t."""

    def __init__(self, config: CoEConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.num_experts = config.num_local_experts
        self.num_null_experts = config.num_null_experts
        self.smallest_expert_budget = config.smallest_expert_budget
        # CODEPATH: only the paper's "shared gate" ablation routes all iterations with one router
        num_routers = config.num_iterations if config.independent_gating else 1
        num_outputs = config.num_local_experts + config.num_null_experts
        self.weight = nn.Parameter(torch.empty(num_routers, num_outputs, config.hidden_size))
        # CODEPATH: models balanced by a bias have one, those balanced by a loss do not
        bias = torch.zeros(num_routers, num_outputs, dtype=torch.float32) if config.router_bias else None
        self.e_score_correction_bias = None if bias is None else nn.Buffer(bias)
        shape = (num_routers, BUDGET_STEPS)
        # CODEPATH: the null experts' bias for budgets from the smallest to K in equal steps, 0 until it is calibrated
        table = torch.zeros(shape, dtype=torch.float32) if config.num_null_experts else None
        self.null_bias_of_budget = None if table is None else nn.Buffer(table)

    def forward(
        self, hidden_states: torch.Tensor, iteration: int, expert_budget: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[T, H]` -> logits `[T, N + null]`, routing weights `[T, K]`, expert index `[T, K]`; the floats are fp32.

        A null expert has the index N. Those that a token chooses count in its weights as experts do, and those that
        it does not choose take nothing from them.
        """
        # In bf16 the top-k of a few tokens in a thousand would differ.
        with maybe_autocast(hidden_states.device.type, enabled=False):
            router_logits = self.logits(hidden_states, iteration)
        if self.e_score_correction_bias is None:
            router_scores, router_indices = torch.topk(router_logits.softmax(dim=-1), self.top_k, dim=-1)
        else:
            choice = router_logits + self.choice_bias(iteration, expert_budget).to(router_logits.device)
            router_indices = torch.topk(choice, self.top_k, dim=-1).indices
            scored = router_logits
            if self.num_null_experts > 0:
                is_absent = torch.ones_like(router_logits, dtype=torch.bool).scatter(-1, router_indices, False)
                is_absent[:, : self.num_experts] = False
                scored = router_logits.masked_fill(is_absent, -math.inf)
            router_scores = scored.softmax(dim=-1).gather(-1, router_indices)
            router_indices = router_indices.clamp(max=self.num_experts)
        if self.norm_topk_prob:
            router_scores = router_scores / router_scores.sum(dim=-1, keepdim=True)
        return router_logits, router_scores, router_indices

    def logits(self, hidden_states: torch.Tensor, iteration: int) -> torch.Tensor:
        """`[T, H]` -> `[T, N + null]` in fp32."""
        return router_linear(hidden_states, self.weight[iteration % self.weight.shape[0]])

    def choice_bias(self, iteration: int, expert_budget: float | None = None) -> torch.Tensor:
        """`[N + null]`, added to router t's logits for the choice; a budget replaces the null experts' part."""
        bias = self.e_score_correction_bias[iteration % self.weight.shape[0]]
        if expert_budget is None or self.num_null_experts == 0:
            return bias
        null_bias = self.null_bias(iteration, expert_budget).expand(self.num_null_experts)
        return torch.cat([bias[: self.num_experts], null_bias])

    def null_bias(self, iteration: int, expert_budget: float) -> torch.Tensor:
        """The bias, a scalar, at which a token computes `expert_budget` experts on average, as was calibrated."""
        table = self.null_bias_of_budget[iteration % self.weight.shape[0]]
        fewest = self.smallest_expert_budget
        if expert_budget in (fewest, self.top_k):
            return torch.full_like(table[0], math.inf if expert_budget == fewest else -math.inf)
        position = float(expert_budget - fewest) / (self.top_k - fewest) * (BUDGET_STEPS - 1)
        step = min(int(position), BUDGET_STEPS - 2)
        return torch.lerp(table[step], table[step + 1], position - step)

    def _apply(self, fn, recurse=True):
        """Moves the module. `.to(bfloat16)` would round the biases, which move by less than it can tell apart."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = (
                    torch.empty_like(moved, dtype=buffer.dtype) if buffer.is_meta else buffer.to(moved.device)
                )
        return self


class CoEMLP(nn.Module):
    """SwiGLU FFN: the shared expert S, applied to every token in every iteration."""

    def __init__(self, config: CoEConfig):
        super().__init__()
        width = config.num_shared_experts * config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class CoEPool:
    """One forward pass's way to the experts that several layers visit, and the weights that layer hands to layer.

    Not a module, so that nothing that moves a layer's arguments to a device moves the experts.
    """

    def __init__(self, experts: nn.Module | None):
        self.experts = experts
        self.weights_before: list[tuple[torch.Tensor, ...]] = [()]

    @contextmanager
    def visits_of_layer(self, layer: int):
        """One weight gradient for the layer's visits and those of the pool's layers before it.

        What a layer leaves is kept once: if it is recomputed, it starts from the same weights, and nothing keeps the
        graph of the recomputation.
        """
        weights = self.weights_before[layer] if layer < len(self.weights_before) else ()
        with one_weight_gradient(weights) as handed_on:
            yield
        # A compiled graph hands nothing on, and a checkpoint in it may not change what lies outside.
        if handed_on.weights and layer + 1 == len(self.weights_before):
            self.weights_before.append(handed_on.weights)


class CoESparseMoeBlock(nn.Module):
    """The chain: `F_t(x) = s_t * (sum_{i in TopK_t(x)} g_{t,i} E_i(x) + S(x))`, t = 1..C (eq. 1-4)."""

    def __init__(self, config: CoEConfig, layer_idx: int):
        super().__init__()
        self.layer_in_pool = layer_idx % config.layers_per_pool
        self.num_iterations = config.num_iterations
        self.has_chain_residual = config.residual != "outer"
        self.jitter_noise = config.router_jitter_noise
        self.num_experts, self.num_null_experts = config.num_local_experts, config.num_null_experts
        self.gate = CoETopKRouter(config)
        # CODEPATH: in a pool of several layers the first holds the experts, and the others get them from the model
        self.experts = CoEExperts(config) if self.layer_in_pool == 0 else None
        # CODEPATH: transformers' experts skip the index N, a null expert's, only if other ranks are said to hold it
        if config.num_null_experts > 0 and self.experts is not None:
            self.experts._is_expert_parallel = True
        # CODEPATH: the paper's checkpoints have a shared expert, Mixtral's and Qwen3-MoE's chains do not
        self.shared_expert = CoEMLP(config) if config.num_shared_experts else None
        # CODEPATH: upcycled checkpoints learn a scale per iteration, models trained from scratch do not
        self.iteration_scale = nn.Parameter(torch.empty(config.num_iterations)) if config.iteration_scale else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        pool: CoEPool | None = None,
        output_router_logits: bool = False,
        expert_budget: float | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """`x_0 [B, S, H]` -> `x_C - x_0`, or `x_C` where no residual runs along the chain (`residual="outer"`).

        With `output_router_logits`, a tuple of that and the logits `[T, N + null]` of each iteration's router.

        Args:
            pool (`CoEPool`, *optional*): the pool that other layers visit too; without one, the layer's own experts.
            expert_budget (`float`, *optional*): for this call, the mean number of experts per token and iteration.
        """
        pool = CoEPool(self.experts) if pool is None else pool
        if pool.experts is None:
            raise ValueError("This layer visits the experts of an earlier one: call the model, or pass `pool`.")
        router_logits = []
        # PEFT's wrapper would merge its adapter at every call. torch's cache belongs to the whole process: only there.
        merge_once = nullcontext() if isinstance(pool.experts, CoEExperts) else parametrize.cached()
        with merge_once, pool.visits_of_layer(self.layer_in_pool):
            visit = partial(
                self.iterate, experts=pool.experts, router_logits=router_logits, expert_budget=expert_budget
            )
            update = visit(hidden_states, 0)
            for iteration in range(1, self.num_iterations):
                if self.has_chain_residual:
                    update = update + visit(hidden_states + update, iteration)
                else:
                    update = visit(update, iteration)
        return (update, *router_logits) if output_router_logits else update

    def iterate(
        self,
        hidden_states: torch.Tensor,
        iteration: int,
        experts: nn.Module,
        router_logits: list[torch.Tensor] | None = None,
        expert_budget: float | None = None,
    ) -> torch.Tensor:
        """F_t: route the tokens of `[B, S, H]` with router t, through the pool and the shared expert.

        The logits of router t are appended to `router_logits`.
        """
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
            hidden_states = hidden_states * noise
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, top_k_weights, top_k_index = self.gate(tokens, iteration, expert_budget)
        if router_logits is not None:
            router_logits.append(logits)
        # CODEPATH: experts that another program has put in place of ours (vLLM) know no index N, a null expert's
        if self.num_null_experts > 0 and not any(isinstance(module, CoEExperts) for module in experts.modules()):
            is_null = top_k_index == self.num_experts
            top_k_index, top_k_weights = top_k_index.masked_fill(is_null, 0), top_k_weights.masked_fill(is_null, 0)
        output = experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)
        if self.iteration_scale is not None:
            output = output * self.iteration_scale[iteration]
        return output


@use_kernel_forward_from_hub("RMSNorm")
class CoERMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class CoERotaryEmbedding(nn.Module):
    def __init__(self, config: CoEConfig):
        super().__init__()
        self.original_max_seq_len = config.max_position_embeddings
        # Computed anew whenever the model moves, and from what it was built from.
        self.config = deepcopy(config)
        # Where it is None, transformers' scaled rotations would calculate with it.
        self.config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.rope_type = config.rope_parameters["rope_type"]
        self.inv_freq = nn.Buffer(torch.empty(0), persistent=False)
        self.original_inv_freq = nn.Buffer(torch.empty(0), persistent=False)
        self._compute_frequencies()

    def _compute_frequencies(self):
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(self.config, self.inv_freq.device)
        self.inv_freq = inv_freq
        self.original_inv_freq = inv_freq.clone()
        # Where a dynamic RoPE had grown to; it grows again with the next long sequence.
        self.max_seq_len_cached = self.original_max_seq_len

    def _apply(self, fn, recurse=True):
        """Moves the module. `.to(bfloat16)` would round the frequencies and `to_empty` lose them: computed anew."""
        super()._apply(fn, recurse)
        self._compute_frequencies()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        """Of a model built on `meta`, `load_state_dict(assign=True)` makes the weights real; no file has these."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.inv_freq.is_meta:
            self.inv_freq = torch.empty(0, device="cpu")
            self._compute_frequencies()

    @staticmethod
    def compute_default_rope_parameters(config: CoEConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `theta^(-2i/d)`, `[head_dim / 2]`, and the attention factor 1 (arXiv 2104.09864)."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update  # power user: used with advanced RoPE types (e.g. dynamic rope)
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotates half the hidden dims of the input."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


@use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """Rotates queries and keys `[B, heads, S, head_dim]` by their positions, `cos` and `sin` `[B, S, head_dim]`."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """`[B, num_key_value_heads, S, head_dim]` -> `[B, num_attention_heads, S, head_dim]`."""
    return hidden_states if n_rep == 1 else hidden_states.repeat_interleave(n_rep, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
):
    key_states = repeat_kv(key, module.num_key_value_groups)
    value_states = repeat_kv(value, module.num_key_value_groups)

    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask

    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = F.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value_states)
    return attn_output.transpose(1, 2).contiguous(), attn_weights


@use_kernelized_func(apply_rotary_pos_emb)
class CoEAttention(nn.Module):
    """Multi-headed attention from 'Attention Is All You Need' paper, with grouped keys and values."""

    def __init__(self, config: CoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_dim, key_dim = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        # CODEPATH: chains upcycled from Llama, Qwen3 or OLMoE sources with biased attention keep it, Mixtral has none
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_dim, bias=bias)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=bias)
        # CODEPATH: chains upcycled from Qwen3 normalise each head, from OLMoE all heads together, from Mixtral neither
        self.qk_norm = config.qk_norm
        if self.qk_norm is not None:
            per_head = self.qk_norm == "head"
            self.q_norm = CoERMSNorm(self.head_dim if per_head else query_dim, eps=config.rms_norm_eps)
            self.k_norm = CoERMSNorm(self.head_dim if per_head else key_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states, key_states = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.qk_norm == "full":
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.view(hidden_shape), key_states.view(hidden_shape)
        if self.qk_norm == "head":
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )

        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class CoEDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: CoEConfig, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        # CODEPATH: the paper's models end a layer with x_C itself, every other checkpoint adds to the residual stream
        self.replaces_residual = config.residual == "inner"
        self.self_attn = CoEAttention(config, layer_idx)
        self.mlp = CoESparseMoeBlock(config, layer_idx)
        self.input_layernorm = CoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = CoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        pool: CoEPool | None = None,
        output_router_logits: bool = False,
        expert_budget: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        attn_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.replaces_residual else hidden_states
        if not output_router_logits:
            return residual + self.mlp(normed, pool, expert_budget=expert_budget)
        update, *router_logits = self.mlp(normed, pool, True, expert_budget)
        return residual + update, *router_logits


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


@auto_docstring
class CoEPreTrainedModel(PreTrainedModel):
    config: CoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True

    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": CoEDecoderLayer,
        "attentions": CoEAttention,
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        for name, bits in {"load_in_4bit": 4, "load_in_8bit": 8}.items():
            if kwargs.pop(name, False):
                raise ValueError(
                    f"`{name}=True` is no argument of `from_pretrained`: pass "
                    f"`quantization_config=QuantizedExpertsConfig(bits={bits})`, which reaches the experts."
                )
        cls._refuse_to_quantise_again(pretrained_model_name_or_path, **kwargs)
        try:
            with LOADING:
                model, loading_info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
        except SafetensorError as error:
            raise OSError(
                f"A safetensors file of `{pretrained_model_name_or_path}` is truncated or corrupted ({error}). "
                "Nothing was loaded: download or save the checkpoint again."
            ) from error
        # Without a path, the caller has put the tensors together and knows what is not among them.
        if pretrained_model_name_or_path is not None and (
            loading_info["missing_keys"] or loading_info["unexpected_keys"]
        ):
            cls._compare_with_configuration(loading_info, model.config, pretrained_model_name_or_path, **kwargs)
        # CODEPATH: the biases of null experts belong to the budget that the checkpoint was saved with
        if pretrained_model_name_or_path is not None and model.config.num_null_experts > 0:
            model._move_to_configured_budget(pretrained_model_name_or_path, **kwargs)
        if model.can_generate():
            model._warn_of_impossible_ends(pretrained_model_name_or_path)
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _refuse_to_quantise_again(cls, path: str | None, quantization_config=None, **kwargs):
        """transformers refuses too, but names only classes."""
        if path is None or not isinstance(quantization_config, QuantizedExpertsConfig):
            return
        stored = cls._stored_fields(path, **kwargs).get("quantization_config") or {}
        if stored.get("quant_method") == quantization_config.quant_method:
            raise ValueError(
                f"The experts of `{path}` are stored in {stored['bits']} bits and cannot be quantised again to "
                f"{quantization_config.bits} bits: load the full-precision checkpoint with `quantization_config`, "
                "or leave it out to load these."
            )

    @classmethod
    def _stored_configuration(cls, path: str, **kwargs) -> CoEConfig | None:
        """That of the checkpoint, whatever the caller changed; None where it has none, as in an adapter's folder."""
        fields = cls._stored_fields(path, **kwargs)
        return cls.config_class.from_dict(fields) if fields else None

    @classmethod
    def _stored_fields(cls, path: str, **kwargs) -> dict:
        with suppress(OSError):
            return cls.config_class.get_config_dict(path, **kwargs)[0]
        return {}

    @classmethod
    def _compare_with_configuration(cls, loading_info: dict, stored: CoEConfig, path: str, **kwargs):
        """The weights must be those that the checkpoint's own configuration announces.

        A tensor that it announces may not be replaced by random numbers; new are a head that the checkpoint's class
        has not, and what the caller adds by changing the configuration. A tensor of a layer that it does not announce
        may not be left out; what the caller leaves out by changing the configuration is announced there.
        """
        has_own_tensors = kwargs.get("state_dict") is not None
        if not has_own_tensors:
            stored = cls._stored_configuration(path, **kwargs) or stored
        with torch.device("meta"):
            announced = cls(stored)
        prefix = f"{cls.base_model_prefix}."
        lost = set(announced.state_dict()) & set(loading_info["missing_keys"])
        lost -= {key for key, *_ in loading_info["mismatched_keys"]}
        if stored.tie_word_embeddings and (untied := lost & set(announced.all_tied_weights_keys)):
            raise ValueError(
                f"`tie_word_embeddings=False` asks for {_few(untied)} of its own, and in `{path}` it is tied to the "
                "embedding: load the checkpoint as it is."
            )
        architectures = set(stored.architectures or ()) & set(__all__)
        # A checkpoint that does not say what it is may lack the head of a task, but no language model's.
        may_lack_head = cls.__name__ not in architectures and (
            architectures or announced.get_output_embeddings() is None
        )
        if announced.base_model is not announced and may_lack_head:
            lost = {key for key in lost if key.startswith(prefix)}
        if lost:
            raise ValueError(
                f"The weights of `{path}` lack {len(lost)} tensors that its configuration announces: {_few(lost)}. "
                "They would be random: download, convert or save the checkpoint again, or load it while no other "
                "thread loads a model."
            )
        known = {key.removeprefix(prefix) for key in announced.state_dict()}
        unknown = {key for key in loading_info["unexpected_keys"] if key.removeprefix(prefix) not in known}
        dropped = {key for key in unknown if ".layers." in f".{key}"}
        if dropped and not has_own_tensors:
            raise ValueError(
                f"`{path}` holds {len(dropped)} tensors that its configuration does not announce: {_few(dropped)}. "
                "Without them the model would compute something else: restore its config.json."
            )

    def _move_to_configured_budget(self, path: str, **kwargs):
        """What the caller changed in the configuration, from which the Auto classes take `expert_budget=...` too."""
        stored = self._stored_configuration(path, **kwargs)
        if stored is None:
            if kwargs.get("expert_budget") is not None:
                self.set_expert_budget(kwargs["expert_budget"])
            return
        asked, top_k = self.config.expert_budget, self.config.num_experts_per_tok
        is_other_k, is_extreme = top_k != stored.num_experts_per_tok, self.config.is_extreme_budget(asked)
        if is_other_k:
            was_calibrated = self._is_calibrated()
            for gate in self._routers():
                gate.null_bias_of_budget.zero_()
            if was_calibrated or not is_extreme:
                logger.warning(
                    f"The budgets of `{path}` are those of `num_experts_per_tok={stored.num_experts_per_tok}` and do "
                    f"not hold for {top_k}: call `modeling_coe.balancing.calibrate_expert_budget(model, batches)`."
                )
        if (asked, is_other_k) == (stored.expert_budget, False):
            return
        if is_extreme or self._is_calibrated():
            self.set_expert_budget(asked)
        elif not is_other_k:
            logger.warning(
                f"`expert_budget={asked}` is not calibrated in `{path}`, whose routers go on as with "
                f"{stored.expert_budget}: train with `modeling_coe.balancing`, which moves them there, or call "
                "`calibrate_expert_budget(model, batches)` and `model.set_expert_budget(...)`."
            )

    def _warn_of_impossible_ends(self, path: str):
        ends, size = self.generation_config.eos_token_id, self.config.vocab_size
        tokens = ends if isinstance(ends, list) else [ends]
        if not all(token is None or (type(token) is int and 0 <= token < size) for token in tokens):
            logger.warning(
                f"The generation settings of `{path}` have `eos_token_id={ends!r}`, which is not in the vocabulary of "
                f"{size} tokens: no text ends there. Set `model.generation_config.eos_token_id`, and save the model."
            )

    def _resolve_parallel_plans(self, distributed_config):
        """transformers' plans, in which FSDP2 gathers a shared pool when it is visited, not with its first layer."""
        shares_pools = self.config.layers_per_pool > 1
        if shares_pools and distributed_config.pp_size > 1:
            raise ValueError(
                f"`pp_size={distributed_config.pp_size}` puts layers on different ranks, and with "
                f"`layers_per_pool={self.config.layers_per_pool}` they share experts. Use `fsdp_size`, `tp_size` or "
                "`ep_size`."
            )
        if self.config.num_null_experts > 0 and distributed_config.ep_size > 1:
            raise ValueError(
                f"`ep_size={distributed_config.ep_size}` sends every choice to a rank, and no rank holds the "
                f"`num_null_experts={self.config.num_null_experts}`. Use `fsdp_size` or `tp_size`."
            )
        tp_plan, ep_plan, fsdp_plan = super()._resolve_parallel_plans(distributed_config)
        if shares_pools and fsdp_plan:
            # Expert parallelism shards the experts itself.
            pools = (name for name, module in self.named_modules() if isinstance(module, CoEExperts))
            fsdp_plan = dict.fromkeys((name for name in pools if name not in ep_plan), "free_full_weight") | fsdp_plan
        return tp_plan, ep_plan, fsdp_plan

    def save_pretrained(self, save_directory, *args, **kwargs):
        self._compare_with_built()
        # FSDP2 derives `FSDPCoEForCausalLM` in a file of torch's; a checkpoint names and holds the class it came from.
        current = self.__class__
        self.__class__ = next(base for base in current.__mro__ if not base.__module__.startswith("torch."))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = current

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, CoETopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            for buffer in module.buffers():
                init.zeros_(buffer)
        elif isinstance(module, CoESparseMoeBlock) and module.iteration_scale is not None:
            init.ones_(module.iteration_scale)

    def _compare_with_built(self):
        """What a model was built from may not have changed: the file would be another model, or none."""
        built_from = self.base_model.built_from
        # CODEPATH: layers with a pool of their own may have been taken out, those that share one may not
        if self.config.layers_per_pool == 1:
            built_from = built_from | {"num_hidden_layers": len(self.base_model.layers)}
        for name, value in built_from.items():
            if (changed := getattr(self.config, name)) != value:
                raise ValueError(
                    f"`config.{name}={changed!r}` was {value!r} when this model was built: the file would be another "
                    f"model's. Restore it, or load the checkpoint with `from_pretrained(path, {name}={changed!r})`."
                )
        self.config.check_pad_token()
        size = getattr(self.get_input_embeddings(), "num_embeddings", None)
        if size not in (None, self.config.vocab_size):
            raise ValueError(
                f"`config.vocab_size={self.config.vocab_size}`, and the embedding has {size} tokens; change both with "
                "`model.resize_token_embeddings(...)`."
            )

    def set_expert_budget(self, expert_budget: float):  # trf-ignore: TRF033, buffers move with the value
        """From now on a token computes `expert_budget` experts per iteration on average, the others are null experts.

        The null experts' biases move to what `modeling_coe.balancing.calibrate_expert_budget` stored, and training
        with `RouterBalance` holds the new budget. For one call, pass `expert_budget` to `forward` or `generate`.
        An adapter with routers of its own brings their biases along: set the budget after it is loaded.

        Raises:
            ValueError: no null experts, a budget outside what they allow, or one that was not calibrated.
        """
        self._check_expert_budget(expert_budget)
        warn_of_lost_biases(self)
        self.config.expert_budget = float(expert_budget)
        for gate in self._routers():
            null = gate.e_score_correction_bias[:, gate.num_experts :]
            for router in range(null.shape[0]):
                null[router] = gate.null_bias(router, expert_budget)

    def _routers(self) -> list[CoETopKRouter]:
        return [module for module in self.modules() if isinstance(module, CoETopKRouter)]

    def _check_expert_budget(self, expert_budget: float):
        self.config.check_expert_budget(expert_budget)
        is_extreme = self.config.is_extreme_budget(expert_budget)
        if is_extreme or torch.compiler.is_compiling():
            return
        if not self._is_calibrated():
            raise ValueError(
                f"`expert_budget={expert_budget}` is not calibrated in this model: call "
                "`modeling_coe.balancing.calibrate_expert_budget(model, batches)` once, and save the model."
            )

    def _is_calibrated(self) -> bool:
        # PEFT keeps the router that it trains a copy of: that one stays as it was.
        tables = [gate.null_bias_of_budget for gate in self._routers() if gate.null_bias_of_budget is not None]
        if any(table.is_meta for table in tables):
            raise ValueError(
                "The routers' table of budgets is offloaded: load the model without `offload_buffers=True`."
            )
        return any(bool(table.any()) for table in tables)

    def _warn_of_unbalanced_routers(self, where: str):
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains and self.config.router_aux_loss_coef > 0 and not self.config.router_bias:
            logger.warning_once(
                f"CoE: {where} has no load-balancing loss, whatever `router_aux_loss_coef="
                f"{self.config.router_aux_loss_coef}` says. To balance the routers, pass `labels` to the causal "
                "language model, add the `aux_loss` that it returns with `output_router_logits=True`, or train with "
                "`router_bias=True` and `modeling_coe.balancing`, which needs no loss."
            )

    def _grouped_mm_can_dispatch(self) -> bool:
        """Grouped matrix products want rows of whole 16 bytes; without them transformers takes the eager experts."""
        for name in ("hidden_size", "intermediate_size"):
            if (size := getattr(self.config, name)) % 8 != 0:
                message = f"`experts_implementation='grouped_mm'` needs `{name}={size}` to be a multiple of 8."
                logger.warning_once(f"{message} Using the slower eager experts.")
                raise ValueError(message)
        return super()._grouped_mm_can_dispatch()

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Where nobody chooses and transformers would take `grouped_mm`, the same products with less memory."""
        applicable_experts = super().get_correct_experts_implementation(requested_experts)
        return "coe" if requested_experts is None and applicable_experts == "grouped_mm" else applicable_experts


@auto_docstring
class CoEModel(CoEPreTrainedModel):
    def __init__(self, config: CoEConfig):
        super().__init__(config)
        if config.model_type != CoEConfig.model_type:
            raise ValueError(
                f"The configuration has `model_type={config.model_type!r}`, and a CoE is built from one with "
                f"{CoEConfig.model_type!r}; `modeling_coe.upcycle` converts checkpoints of other models."
            )
        config.check()
        config.check_pad_token()
        self.built_from = {name: deepcopy(getattr(config, name)) for name in BUILT_FROM}
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [CoEDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = CoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = CoERotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        # CODEPATH: the biases and the table of budgets of models that have them move by less than bf16 tells apart
        if config.router_bias:
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias", "null_bias_of_budget"]
        # CODEPATH: in models whose layers share a pool, Accelerate's FSDP2 has to gather the pool by itself
        if config.layers_per_pool > 1:
            if is_deepspeed_zero3_enabled():
                raise ValueError(
                    f"`layers_per_pool={config.layers_per_pool}` does not work under DeepSpeed's ZeRO-3, which frees "
                    "the weights of a pool after its first layer. Use FSDP2, ZeRO-2, or `layers_per_pool=1`."
                )
            self._no_split_modules = [*self._no_split_modules, "CoEExperts"]

        # Initialize weights and apply final processing
        self.post_init()

    def __call__(self, *args, **kwargs):
        # transformers would switch the cache off with a warning, at which `torch.compile` breaks the graph.
        if self.gradient_checkpointing and self.training and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        return super().__call__(*args, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        expert_budget: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        r"""
        output_router_logits (`bool`, *optional*):
            Also return the logits of all routers, a tuple of `L * C` fp32 tensors of shape `(T, N + null)`,
            layer-major.
        expert_budget (`float`, *optional*):
            For this call, the mean number of experts per token and iteration; see `set_expert_budget`.
        """
        if expert_budget is not None:
            self._check_expert_budget(expert_budget)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)

        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        # CODEPATH: chains upcycled from Mistral keep its sliding window, the others attend to everything before
        mask_function = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        causal_mask = mask_function(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

        pool = None
        # Returned by the layers, not captured by hooks: those break a compiled graph and a reentrant checkpoint.
        router_logits = ()
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            # CODEPATH: a layer with a pool of its own finds it in itself
            if self.config.layers_per_pool > 1 and layer_idx % self.config.layers_per_pool == 0:
                pool = CoEPool(decoder_layer.mlp.experts)
            output = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                pool=pool,
                output_router_logits=output_router_logits,
                expert_budget=expert_budget,
                **kwargs,
            )
            hidden_states, *logits = output if output_router_logits else (output,)
            router_logits += tuple(logits)

        hidden_states = self.norm(hidden_states)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            router_logits=router_logits if output_router_logits else None,
        )

    def _embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """The embedded tokens, or a readable error where the lookup on CPU raises an IndexError."""
        if isinstance(input_ids, torch.Tensor) and input_ids.numel() == 0:
            raise ValueError(f"`input_ids` of shape {tuple(input_ids.shape)} holds no token; pass at least one.")
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            size = self.config.vocab_size
            outside = input_ids[(input_ids < 0) | (input_ids >= size)].tolist()
            if not outside:
                raise
            raise ValueError(
                f"`input_ids` holds token id {outside[0]}, outside the embedding of {size} tokens. Use the model's "
                "own tokenizer, or `model.resize_token_embeddings(len(tokenizer))`."
            ) from error


def warn_of_lost_biases(model: nn.Module):
    """Where the biases of routers are to change: an adapter's file has them only if it has the whole routers."""
    is_adapted = any(hasattr(module, "merged_adapters") for module in model.modules())
    if is_adapted and not any(
        ".modules_to_save." in name and name.endswith(BIAS) for name, _ in model.named_buffers()
    ):
        logger.warning(
            "The adapter of this model does not hold its routers, so its file will lose the biases that change now. "
            "Adapt it with `lora_config(model, router='full')`, or save the merged model."
        )


def routed_tokens(
    config: CoEConfig,
    input_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    labels: torch.LongTensor | None,
) -> torch.Tensor | None:
    """`[B, S]`, 0 where a token is padding and does not count for the balance of the experts; None if there is none.

    Packed rows have positions in place of a mask: their padding is a row's last padding tokens without a target.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask
    if position_ids is None or labels is None or input_ids is None or config.pad_token_id is None:
        return None
    if labels.shape != input_ids.shape:  # of whole texts, not of tokens
        return None
    padding = (input_ids == config.pad_token_id) & (labels.to(input_ids.device) == -100)
    return 1 - padding.long().flip(-1).cumprod(-1).flip(-1)


def load_balancing_loss_func(
    router_logits: tuple[torch.Tensor, ...],
    num_experts: int,
    top_k: int,
    attention_mask: torch.Tensor | None = None,
    routers_per_pool: int | None = None,
    choice_biases: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    r"""Switch Transformer's load-balancing loss over every router of the model (arXiv 2101.03961, eq. 4-6).

    `N * sum_i f_i * P_i` with f_i the share of (token, router) pairs that chose expert i and P_i its mean probability.
    It is K for balanced routers and at most N * K; 0 if every token is padding. Null experts are left out: it balances
    the experts among themselves, and for balanced routers is the mean number of experts that a token computes.

    Where several layers share a pool it is the mean of the pools' losses, each over all routers that visit the pool:
    every expert is to be used by some visit, not by each.

    Args:
        router_logits (`tuple` of `L * C` tensors of shape `(T, N + null)`): layer-major, as the model returns them.
        num_experts (`int`): N.
        top_k (`int`): K.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 where a token is padding and does not count.
        routers_per_pool (`int`, *optional*): how many routers in succession visit one pool; `None` counts all
            together, as Mixtral's function does.
        choice_biases (`list` of `L * C` tensors of shape `(N + null,)`, *optional*): what each router adds to its
            logits for the choice.
    """
    if routers_per_pool is not None and routers_per_pool < len(router_logits):
        pools = [slice(i, i + routers_per_pool) for i in range(0, len(router_logits), routers_per_pool)]
        biases = [choice_biases and choice_biases[pool] for pool in pools]
        losses = [
            load_balancing_loss_func(router_logits[pool], num_experts, top_k, attention_mask, choice_biases=bias)
            for pool, bias in zip(pools, biases, strict=True)
        ]
        return sum(loss.to(losses[0].device) for loss in losses) / len(losses)
    device = router_logits[0].device
    num_tokens = router_logits[0].shape[0]
    if attention_mask is None:
        token_weight = torch.ones(num_tokens, device=device)
    else:
        # A mask over cached tokens is longer than the tokens routed now.
        sequence_length = num_tokens // attention_mask.shape[0]
        token_weight = attention_mask[:, -sequence_length:].reshape(-1).to(device, torch.float32)
    chosen = torch.zeros(router_logits[0].shape[-1], device=device)
    probability = torch.zeros(num_experts, device=device)
    for router, logits in enumerate(router_logits):
        logits = logits.to(device).float()
        probs = logits[:, :num_experts].softmax(dim=-1)
        choice = probs if choice_biases is None else logits + choice_biases[router].to(device)
        index = choice.topk(top_k, dim=-1).indices
        chosen = chosen.scatter_add(0, index.reshape(-1), token_weight.repeat_interleave(top_k))
        probability = probability + token_weight @ probs
    count = (len(router_logits) * token_weight.sum()).clamp(min=1)
    return num_experts * torch.sum((chosen[:num_experts] / count) * (probability / count))


@auto_docstring
class CoEForCausalLM(CoEPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CoEConfig):
        super().__init__(config)
        self.model = CoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok

        # Initialize weights and apply final processing
        self.post_init()

    def generate(self, *args, expert_budget: float | None = None, **kwargs):
        """transformers' `generate`; `expert_budget` is for this call alone, see `set_expert_budget`."""
        if expert_budget is not None:
            if kwargs.get("assistant_model") is not None:
                raise ValueError(
                    f"`expert_budget={expert_budget}` would reach the `assistant_model` as well; call "
                    f"`model.set_expert_budget({expert_budget})` before."
                )
            kwargs["expert_budget"] = expert_budget
        return super().generate(*args, **kwargs)

    def generate_batch(self, *args, expert_budget: float | None = None, **kwargs):
        """transformers' `generate_batch`, which has no budget of a call: `set_expert_budget` before."""
        if expert_budget is not None:
            raise ValueError(
                f"`expert_budget={expert_budget}` does not reach a continuous batch; call "
                f"`model.set_expert_budget({expert_budget})` before."
            )
        return super().generate_batch(*args, **kwargs)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        expert_budget: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        output_router_logits (`bool`, *optional*):
            Also return the logits of all routers, a tuple of `L * C` fp32 tensors of shape `(T, N + null)`,
            layer-major. The load-balancing loss does not wait for it: in training, `router_aux_loss_coef > 0` alone
            adds it to `loss`.
        skip_logits (`bool`, *optional*):
            With `labels`, compute the same loss 512 tokens at a time and return no logits. The full logits are the
            largest tensor in the training of a small model.
        expert_budget (`float`, *optional*):
            For this call, of `generate` too, the mean number of experts per token and iteration of a model with null
            experts; see `set_expert_budget`.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_coe import CoEForCausalLM

        >>> model = CoEForCausalLM.from_pretrained("runs/smoke")
        >>> tokenizer = AutoTokenizer.from_pretrained("runs/smoke")

        >>> inputs = tokenizer("Question: Tom has 3 apples and buys 4 more.", return_tensors="pt")
        >>> tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=30))[0]
        ```"""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        trains_router = self.training and labels is not None and self.config.router_aux_loss_coef > 0
        if labels is None and past_key_values is None and not output_router_logits:
            self._warn_of_unbalanced_routers("a forward pass without `labels`")

        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or trains_router,
            expert_budget=expert_budget,
            **kwargs,
        )

        loss = logits = None
        if skip_logits and labels is not None:
            loss = self._loss_without_logits(outputs.last_hidden_state, labels, **kwargs)
        else:
            # Newer versions of transformers have `slice_logits_to_keep`; this form works in every supported one.
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
            if labels is not None:
                loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)

        aux_loss = None
        is_decoding = labels is None and past_key_values is not None
        if outputs.router_logits is not None and not is_decoding:
            mask = routed_tokens(self.config, input_ids, attention_mask, position_ids, labels)
            # CODEPATH: pools of one layer are balanced together, as Mixtral's are; shared ones each by itself
            shares_pools = self.config.layers_per_pool > 1
            visits = self.config.layers_per_pool * self.config.num_iterations if shares_pools else None
            biases = self._choice_biases(expert_budget)
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, self.num_experts, self.num_experts_per_tok, mask, visits, biases
            )
            if labels is not None:
                share = self._share_of_batch(labels, loss.device, **kwargs)
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)

        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss if output_router_logits else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )
        # An attribute only, unless router logits were asked for: `output[1]` is Mixtral's, the logits.
        object.__setattr__(output, "aux_loss", aux_loss)
        return output

    def _choice_biases(self, expert_budget: float | None) -> list[torch.Tensor] | None:
        """What each router adds to its logits for the choice, layer-major; None without `router_bias`."""
        # CODEPATH: only models balanced by a bias have one
        if not self.config.router_bias:
            return None
        gates = [layer.mlp.gate for layer in self.model.layers]
        # PEFT's adapter of a parameter hides the methods of the module that it is around.
        routers = [gate if hasattr(gate, "choice_bias") else gate.get_base_layer() for gate in gates]
        iterations = range(self.config.num_iterations)
        return [router.choice_bias(iteration, expert_budget) for router in routers for iteration in iterations]

    def _loss_without_logits(
        self,
        hidden_states: torch.Tensor,
        labels: torch.LongTensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`ForCausalLMLoss` of `[B, S, H]`, whose logits exist for 512 tokens at a time, in the backward pass too.

        `F.linear_cross_entropy` of torch 2.13 rounds the loss of bf16 states to bf16, and would differ from it.
        """
        targets = F.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels
        targets = targets.reshape(-1).to(hidden_states.device)
        if num_items_in_batch is None:
            num_items_in_batch = targets.ne(-100).sum()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden_states.device)

        def summed_loss(states, chunk_targets):
            return F.cross_entropy(self.lm_head(states).float(), chunk_targets, reduction="sum")

        chunks = zip(hidden_states.flatten(0, 1).split(512), targets.split(512), strict=True)
        # torch.func's transforms take no checkpoints.
        transformed = not torch.compiler.is_compiling() and is_transformed()
        run = summed_loss if transformed else partial(checkpoint, summed_loss, use_reentrant=False)
        return sum(run(*chunk) for chunk in chunks) / num_items_in_batch

    @staticmethod
    def _share_of_batch(
        labels: torch.LongTensor,
        device: torch.device,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> torch.Tensor | float:
        """The target tokens here over those of the whole optimizer step, the weight of this micro-batch in its loss.

        The language-model loss has it through `num_items_in_batch`; the auxiliary loss needs the same, or it grows
        with the accumulation steps and the ranks (transformers#48690).
        """
        if num_items_in_batch is None:
            return 1.0
        targets = labels[..., 1:] if shift_labels is None else shift_labels
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(device)
        return targets.ne(-100).sum().to(device) / num_items_in_batch


class CoETaskHead:
    """Makes the base model known to AutoModel, through which transformers' generic heads build it.

    Where this file is a checkpoint's remote code, nothing else does.
    """

    def __init__(self, config):
        AutoModel.register(type(config), CoEModel, exist_ok=True)
        super().__init__(config)

    def train(self, mode: bool = True):
        super().train(mode)
        self._warn_of_unbalanced_routers(type(self).__name__)
        return self


class CoEForSequenceClassification(CoETaskHead, GenericForSequenceClassification, CoEPreTrainedModel):
    pass


class CoEForTokenClassification(CoETaskHead, GenericForTokenClassification, CoEPreTrainedModel):
    pass


class CoEForQuestionAnswering(CoETaskHead, GenericForQuestionAnswering, CoEPreTrainedModel):
    pass


__all__ = [
    "CoEForCausalLM",
    "CoEForQuestionAnswering",
    "CoEForSequenceClassification",
    "CoEForTokenClassification",
    "CoEModel",
    "CoEPreTrainedModel",
    "QuantizedExpertsConfig",  # imported here, its file goes with every checkpoint and registers the quantiser
]

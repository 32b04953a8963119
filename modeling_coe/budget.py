# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a CoE costs before it exists: parameters, FLOPs and training memory in closed form, nothing is allocated.

Shape letters: T tokens of a micro-batch, S sequence, H hidden, I expert width, N experts, K experts per iteration,
C iterations, L layers, P pools, V vocabulary, Q and D the widths of all query and of all key heads.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from .configuration_coe import CoEConfig
from .quantization import block_rows


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZERS = {"adamw": 32, "adamw_8bit": 8, "adamw_4bit": 4, "none": 0}
EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "coe")


def head_widths(config: CoEConfig) -> tuple[int, int]:
    """Q and D, the widths of the query and of the key projection."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim


def router_outputs(config: CoEConfig) -> int:
    """N and the null experts."""
    return config.num_local_experts + config.num_null_experts


def mean_experts(config: CoEConfig) -> float:
    """How many experts a token computes in an iteration: K, or with null experts the mean that their bias holds."""
    return config.num_experts_per_tok if config.num_null_experts == 0 else config.expert_budget


def parameter_tensors(config: CoEConfig) -> list[tuple[str, int, int]]:
    """Every parameter tensor of `CoEForCausalLM` as (component, number of such tensors, elements of one)."""
    V, H, I, L = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers
    N, C, W = config.num_local_experts, config.num_iterations, config.num_shared_experts * config.intermediate_size
    P = L // config.layers_per_pool
    Q, D = head_widths(config)
    tensors = [
        ("embedding", 1, V * H),
        ("attention", 2 * L, H * Q),
        ("attention", 2 * L, H * D),
        ("norms", 2 * L + 1, H),
        ("router", L, (C if config.independent_gating else 1) * router_outputs(config) * H),
        ("experts", P, N * 2 * I * H),
        ("experts", P, N * H * I),
    ]
    if config.attention_bias:
        tensors += [("attention", L, Q), ("attention", 2 * L, D), ("attention", L, H)]
    if config.qk_norm is not None:
        head_dim = Q // config.num_attention_heads
        per_head = config.qk_norm == "head"
        tensors += [("norms", L, head_dim if per_head else Q), ("norms", L, head_dim if per_head else D)]
    if config.num_shared_experts:
        tensors += [("shared_expert", 3 * L, H * W)]
    if config.iteration_scale:
        tensors += [("iteration_scale", L, C)]
    if not config.tie_word_embeddings:
        tensors += [("lm_head", 1, V * H)]
    return tensors


def count_parameters(config: CoEConfig) -> dict[str, int]:
    """Parameters by component; their sum is the total. A tied head counts once, as the embedding."""
    counts = Counter()
    for component, number, elements in parameter_tensors(config):
        counts[component] += number * elements
    return dict(counts)


def count_active_parameters(config: CoEConfig) -> int:
    """The parameters one token can meet: everything but the experts of a pool that all its choices leave out."""
    counts = count_parameters(config)
    choices = config.layers_per_pool * config.num_iterations * config.num_experts_per_tok
    visited = min(config.num_local_experts, choices)
    return sum(counts.values()) - counts["experts"] * (config.num_local_experts - visited) // config.num_local_experts


def count_expert_combinations(config: CoEConfig) -> int:
    """C(N, K) ** C, the ways a token can go through one layer (paper, section 5): an exact integer."""
    return math.comb(config.num_local_experts, config.num_experts_per_tok) ** config.num_iterations


def require_fixed_compute(config: CoEConfig):
    """Raises ValueError for a model with null experts, whose compute no model of K experts for every token equals."""
    if config.num_null_experts > 0:
        raise ValueError(
            f"With `num_null_experts={config.num_null_experts}` a token computes {mean_experts(config)} experts on "
            "average; no MoE of K experts for every token has the same compute."
        )


def equal_compute_moe(config: CoEConfig) -> CoEConfig:
    """The MoE(C*K/N) that the paper compares CoE-C(K/N) with: one iteration, C times the routed experts, and every
    layer has a pool of its own.

    The shared expert stays as it is, so a chain with one computes it C - 1 times more often.

    Raises:
        ValueError: the chain visits more experts than there are, C * K > N, or has null experts: what it computes
            depends on the text.
    """
    require_fixed_compute(config)
    top_k = config.num_iterations * config.num_experts_per_tok
    if top_k > config.num_local_experts:
        raise ValueError(
            f"A chain of {config.num_iterations} x {config.num_experts_per_tok} experts has no equal-compute MoE with "
            f"`num_local_experts={config.num_local_experts}`; it would need {top_k}."
        )
    return CoEConfig(**(config.to_dict() | {"num_iterations": 1, "num_experts_per_tok": top_k, "layers_per_pool": 1}))


def forward_flops(config: CoEConfig, sequence_length: int) -> dict[str, float]:
    """FLOPs of one token's forward pass by component, a multiply-add as two, averaged over a causal sequence.

    With null experts an expectation, of a model that holds its `expert_budget`.
    """
    H, I, L, C = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_iterations
    Q, D = head_widths(config)
    window = min(config.sliding_window or sequence_length, sequence_length)
    # The first `window` tokens see 1, 2, ..., window keys, each later one sees `window`.
    visible = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
    return {
        "attention": L * 2 * (2 * H * Q + 2 * H * D),
        "attention_scores": L * 2 * 2 * Q * visible,
        "router": L * C * 2 * H * router_outputs(config),
        "experts": L * C * mean_experts(config) * 2 * 3 * H * I,
        "shared_expert": L * C * 2 * 3 * H * I * config.num_shared_experts,
        "lm_head": 2 * H * config.vocab_size,
    }


def training_flops(config: CoEConfig, sequence_length: int, gradient_checkpointing: bool = False) -> float:
    """FLOPs of one token's forward and backward: three forwards, and the layers once more when recomputed."""
    flops = forward_flops(config, sequence_length)
    recomputed = sum(flops.values()) - flops["lm_head"] if gradient_checkpointing else 0
    return 3 * sum(flops.values()) + recomputed


def _require_known(setup, **known):
    for name, values in known.items():
        if getattr(setup, name) not in values:
            raise ValueError(f"`{name}={getattr(setup, name)!r}` must be one of {tuple(values)}.")


def _require_positive(setup, *names: str):
    for name in names:
        if getattr(setup, name) < 1:
            raise ValueError(f"`{name}={getattr(setup, name)}` must be at least 1.")


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it.

    Args:
        batch_size: sequences of one micro-batch on one device.
        sequence_length: tokens of a sequence.
        packed: the sequences hold several documents, so that attention has a mask and repeats grouped keys and values.
        dtype: of the weights, and so of the gradients.
        autocast: fp32 weights under bf16 autocast, `bf16: true` of the Trainer.
        optimizer: `adamw`, torchao's `adamw_8bit` and `adamw_4bit`, or `none`.
        optimizer_block_size: values that share one scale in the quantised states; 256 is the Trainer's.
        offload_optimizer: the states live in CPU memory.
        gradient_checkpointing: a layer keeps its input only and is computed again in the backward pass.
        skip_logits: the loss is computed without the full logits.
        experts_implementation: `grouped_mm` or `coe`.
    """

    batch_size: int = 1
    sequence_length: int = 512
    packed: bool = False
    dtype: str = "float32"
    autocast: bool = False
    optimizer: str = "adamw"
    optimizer_block_size: int = 256
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False
    skip_logits: bool = False
    experts_implementation: str = "grouped_mm"

    def __post_init__(self):
        _require_known(self, dtype=BYTES, optimizer=OPTIMIZERS, experts_implementation=EXPERTS_IMPLEMENTATIONS)
        _require_positive(self, "batch_size", "sequence_length")
        if self.autocast and self.dtype != "float32":
            raise ValueError(f"`autocast=True` keeps fp32 weights; with `dtype={self.dtype!r}` leave it off.")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def stream_bytes(self) -> int:
        """Of one element of the residual stream; autocast leaves it in the weights' dtype."""
        return BYTES[self.dtype]

    @property
    def linear_bytes(self) -> int:
        """Of one element that an `nn.Linear` reads or writes."""
        return 2 if self.autocast else BYTES[self.dtype]


def saved_activations(config: CoEConfig, setup: TrainingSetup) -> dict[str, int]:
    """Bytes that autograd keeps between one micro-batch's forward and backward, without recomputation, by component.

    Read off the model's code, per token: an element of the residual stream has r bytes, of a linear layer m bytes.
    """
    T, H, V, L = setup.tokens, config.hidden_size, config.vocab_size, config.num_hidden_layers
    r, m = setup.stream_bytes, setup.linear_bytes
    weight_copies = 0
    if setup.autocast:
        counts = count_parameters(config) | ({"lm_head": V * H} if config.tie_word_embeddings else {})
        weight_copies = 2 * sum(counts.get(name, 0) for name in ("attention", "shared_expert", "lm_head"))
    # Token ids and targets (int64), the head's input, and the fp32 log-softmax of the logits.
    head = r * H if setup.skip_logits else m * H + 4 * V
    return {
        "norms": T * (2 * L + 1) * _saved_norm(H, 1, r),
        "attention": T * L * _saved_attention(config, setup),
        "router": L * config.num_iterations * _saved_router(config, setup),
        "experts": T * L * config.num_iterations * _saved_experts(config, setup),
        "shared_expert": T * L * config.num_iterations * _saved_shared_expert(config, setup),
        "loss": T * (16 + head),
        "weight_copies": weight_copies,
    }


def _saved_norm(width: int, rows: int, element: int) -> int:
    """An RMSNorm of `rows` rows: its input in fp32, the normalised values as they came, a fp32 rsqrt per row."""
    return 4 * width + element * width + 4 * rows


def _saved_inputs(linears: int, width: int, setup: TrainingSetup) -> int:
    """What linears of one common input keep of it: the input itself, or under autocast a bf16 copy each."""
    return linears * 2 * width if setup.autocast else setup.stream_bytes * width


def _saved_attention(config: CoEConfig, setup: TrainingSetup) -> int:
    Q, D = head_widths(config)
    m = setup.linear_bytes
    # Queries, keys, values, output, and the fp32 log-sum-exp per head; RoPE's tables are shared by all layers.
    keys = Q if setup.packed else D
    mask = m * setup.sequence_length if setup.packed else 0
    saved = (
        mask + _saved_inputs(3, config.hidden_size, setup) + m * (2 * Q + 2 * keys) + 4 * config.num_attention_heads
    )
    if config.qk_norm is not None:
        per_head = config.qk_norm == "head"
        saved += _saved_norm(Q, config.num_attention_heads if per_head else 1, m)
        saved += _saved_norm(D, config.num_key_value_heads if per_head else 1, m)
    return saved


def _saved_router(config: CoEConfig, setup: TrainingSetup) -> int:
    """One iteration's router, for all T tokens."""
    N, K, H, r = router_outputs(config), config.num_experts_per_tok, config.hidden_size, setup.stream_bytes
    # x_{t-1}, which the experts and the shared expert keep too, the softmax, the chosen indices (int64).
    saved = r * H + 4 * N + 8 * K
    if config.num_null_experts > 0:
        saved += N  # which null experts were not chosen
    if config.norm_topk_prob:
        saved += 4 * K + 4
    if config.router_aux_loss_coef > 0:
        saved += 4 * config.num_local_experts
    if config.router_jitter_noise > 0:
        saved += r * H
    return setup.tokens * saved


def _saved_experts(config: CoEConfig, setup: TrainingSetup) -> int:
    """One iteration's experts, per token; `grouped_mm` keeps rows for null experts too."""
    K, H, I = config.num_experts_per_tok, config.hidden_size, config.intermediate_size
    e = _experts_bytes(setup)
    scale = setup.stream_bytes * H if config.iteration_scale else 0
    if setup.experts_implementation == "coe":
        # Per choice: gate and up, its place in the order (int64), its weight (fp32).
        return scale + round(mean_experts(config) * (2 * I * e + 8)) + K * 4
    # Per choice: three permutations (int64), the gathered input, gate and up, silu(gate), its product with up,
    # the expert's output, its weight (fp32).
    return scale + K * (3 * 8 + e * (H + 2 * I + I + I + H) + 4)


def _experts_bytes(setup: TrainingSetup) -> int:
    """Of one element inside the experts: autocast reaches `coe`, and not transformers' `grouped_mm`."""
    return setup.linear_bytes if setup.experts_implementation == "coe" else setup.stream_bytes


def _saved_shared_expert(config: CoEConfig, setup: TrainingSetup) -> int:
    """One iteration's shared expert, per token: gate, up, silu(gate) and the product; its input is the router's."""
    width = config.num_shared_experts * config.intermediate_size
    copies = _saved_inputs(2, config.hidden_size, setup) if setup.autocast and width else 0
    return copies + 4 * setup.linear_bytes * width


def optimizer_bytes(config: CoEConfig, setup: TrainingSetup) -> int:
    """Exactly what the optimizer's states occupy, wherever they live."""
    bits = OPTIMIZERS[setup.optimizer]
    if bits == 0:
        return 0
    total = 0
    for _, number, elements in parameter_tensors(config):
        # The step count is a fp32 scalar; both moments have the dtype of the weights.
        state = 4 + 2 * elements * BYTES[setup.dtype]
        if bits < 32 and elements >= 4096 and elements % setup.optimizer_block_size == 0:
            # torchao: codes, a fp32 scale per block, a fp32 table of the 2^bits values a code stands for.
            moment = elements * bits // 8 + 4 * (elements // setup.optimizer_block_size) + 4 * 2**bits
            state = 4 + 2 * moment
        total += number * state
    return total


def kv_cache_bytes(config: CoEConfig, batch_size: int, length: int, dtype: str = "bfloat16") -> int:
    """Keys and values of `batch_size` sequences of `length` tokens; a chain needs no more of them than a MoE."""
    _, D = head_widths(config)
    kept = min(config.sliding_window or length, length)
    return 2 * config.num_hidden_layers * D * batch_size * kept * BYTES[dtype]


@dataclass(frozen=True)
class ServingSetup:
    """How a model is served, as far as memory depends on it.

    Args:
        batch_size: sequences that are decoded together.
        length: tokens of a sequence, prompt and answer.
        dtype: of activations, cache and whatever is not quantised.
        expert_bits: of the experts' weights, 8 or 4; None leaves them in `dtype`.
        rest_bits: 8 for attention, embeddings, shared expert and head; None leaves them.
        group_size: 4-bit weights that share a scale.
        on_cpu: 4-bit weights lie as torch's CPU kernel wants them: whole blocks of rows, a zero beside every scale.
    """

    batch_size: int = 1
    length: int = 4096
    dtype: str = "bfloat16"
    expert_bits: int | None = None
    rest_bits: int | None = None
    group_size: int = 32
    on_cpu: bool = True

    def __post_init__(self):
        _require_known(self, dtype=BYTES, expert_bits=(None, 8, 4), rest_bits=(None, 8), group_size=(32, 64))
        _require_positive(self, "batch_size", "length")


def weight_bytes(config: CoEConfig, setup: ServingSetup) -> dict[str, int]:
    """What the weights occupy in memory, by component."""
    H, I, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    N, W, width = config.num_local_experts, config.num_shared_experts * config.intermediate_size, BYTES[setup.dtype]
    Q, D = head_widths(config)
    counts = count_parameters(config)
    pools = counts["experts"] // (3 * N * H * I)
    scales = {"attention": L * (Q + 2 * D + H), "embedding": V, "lm_head": V, "shared_expert": L * (2 * W + H)}
    scales["experts"] = pools * N * (2 * I + H)
    if setup.expert_bits == 4:
        block = block_rows() if setup.on_cpu else 0
        if block:
            counts["experts"] = pools * N * sum((O + -O % block) * C for O, C in ((2 * I, H), (H, I)))
        scales["experts"] = counts["experts"] // setup.group_size * (2 if block else 1)
    sizes = {}
    for component, count in counts.items():
        bits = setup.expert_bits if component == "experts" else setup.rest_bits if component in scales else None
        sizes[component] = count * width if bits is None else count * bits // 8 + scales[component] * width
    return sizes


def serving_memory(config: CoEConfig, setup: ServingSetup) -> dict[str, int]:
    """Bytes on the device while the longest prompt is read, the highest point of serving; their sum is the prediction.

    `activations` are those of the experts of one visit, for all tokens at once, beside the residual stream; no null
    experts are reckoned with, for a prompt may want few.
    """
    T, H, I = setup.batch_size * setup.length, config.hidden_size, config.intermediate_size
    K, width = config.num_experts_per_tok, BYTES[setup.dtype]
    # Per choice: gate and up, their product, the output; one at a time also the input, and the parts beside the whole.
    choice = 3 * I + H if setup.expert_bits is None else 4 * I + H
    return {
        "weights": sum(weight_bytes(config, setup).values()),
        "cache": kv_cache_bytes(config, setup.batch_size, setup.length, setup.dtype),
        "activations": T * width * (4 * H + K * choice),
    }


def decoded_token_bytes(config: CoEConfig, setup: ServingSetup) -> float:
    """Bytes read from memory for one token of one sequence, with experts chosen evenly: what bounds the speed.

    A batch reads an expert once in a visit, however many of its tokens chose it.
    """
    sizes = weight_bytes(config, setup)
    experts = sizes.pop("experts")
    if not config.tie_word_embeddings:
        del sizes["embedding"]
    N = config.num_local_experts
    hit = 1 - (1 - mean_experts(config) / N) ** setup.batch_size
    pools = count_parameters(config)["experts"] // (3 * N * config.hidden_size * config.intermediate_size)
    visits = config.num_hidden_layers * config.num_iterations / pools
    step = sum(sizes.values()) + experts * visits * hit
    return step / setup.batch_size + kv_cache_bytes(config, 1, setup.length, setup.dtype)


def training_memory(config: CoEConfig, setup: TrainingSetup) -> dict[str, int]:
    """Bytes on the device at the highest point of an optimizer step, by component; their sum is the prediction.

    `activations` are kept through the whole backward pass, `backward` is the larger of two transients: the logits with
    their gradient, or the backward pass of one layer, recomputed if it is checkpointed. Neither the allocator's
    fragmentation nor the driver's own memory (about half a GiB on CUDA) is part of it.
    """
    total, width = sum(count_parameters(config).values()), BYTES[setup.dtype]
    T, H, L = setup.tokens, config.hidden_size, config.num_hidden_layers
    saved = saved_activations(config, setup)
    loss, copies = saved.pop("loss"), saved.pop("weight_copies")
    kept, layer = sum(saved.values()), 0
    if setup.gradient_checkpointing:
        layer = kept // L
        kept = L * T * H * setup.stream_bytes
        # The routers' logits outlive their layer for the load-balancing loss.
        kept += L * config.num_iterations * T * 8 * router_outputs(config) * (config.router_aux_loss_coef > 0)
    return {
        "weights": total * width,
        "gradients": total * width,
        "optimizer": 0 if setup.offload_optimizer else optimizer_bytes(config, setup),
        "activations": kept + copies,
        "backward": max(loss + _logits_transient(config, setup), layer + _layer_transient(config, setup)),
    }


def largest_micro_batch(config: CoEConfig, setup: TrainingSetup, budget: int) -> int:
    """The most sequences of a micro-batch whose predicted peak is at most `budget` bytes; 0 if not even one fits."""

    def fits(batch_size: int) -> bool:
        return sum(training_memory(config, replace(setup, batch_size=batch_size)).values()) <= budget

    size = 0
    for bit in reversed(range(20)):
        if fits(size + 2**bit):
            size += 2**bit
    return size


def _logits_transient(config: CoEConfig, setup: TrainingSetup) -> int:
    """The gradients of the log-softmax and of the logits, both fp32, and the head's new weight gradient."""
    V = config.vocab_size
    gradient = V * config.hidden_size * BYTES[setup.dtype]
    if not setup.skip_logits:
        return setup.tokens * 8 * V + gradient
    # One chunk's log-softmax and the same two gradients, and the sum of the chunks' weight gradients so far.
    return min(512, setup.tokens) * 12 * V + 2 * gradient


def _layer_transient(config: CoEConfig, setup: TrainingSetup) -> int:
    """The gradients of one iteration's expert inputs and hidden values, and of the layer's expert pool."""
    K, H, I = config.num_experts_per_tok, config.hidden_size, config.intermediate_size
    e = _experts_bytes(setup)
    pool = 3 * config.num_local_experts * H * I * BYTES[setup.dtype]
    if setup.experts_implementation == "coe":
        return setup.tokens * (K * e * (H + 2 * I) + 2 * setup.stream_bytes * H) + pool
    # The weighted outputs are fp32. When the pool's gradients are complete, the layer has given back more than these.
    return max(setup.tokens * (K * (4 * H + e * 3 * I) + 2 * e * H), pool)

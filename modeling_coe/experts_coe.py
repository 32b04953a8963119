# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The memory-efficient experts forward, `experts_implementation="coe"`, for CoE and every fused-expert model.

Importing this file registers it: `model.set_experts_implementation("coe")` then works for Mixtral, OLMoE and the rest.

One autograd function keeps the block input and the gate and up projections, nothing else of its size. The routing
weights multiply the activations, of width I, not the outputs, of width H; backward gathers the tokens and applies the
SiLU again and finds the router's gradient as `sum(dA * A)`. The idea is SonicMoE's (arXiv 2512.14080).

Shape letters: T tokens, H hidden, I expert width, N experts, K experts per token, S = T*K rows sorted by expert.
"""

from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging


logger = logging.get_logger(__name__)


class HandedOnWeights:
    """The weights of an expert pool as its last visit returned them, () before the first visit."""

    def __init__(self, weights: tuple[torch.Tensor, ...]):
        self.weights = weights


# A context variable, for other code calls the experts too, with three arguments: expert parallelism, PEFT.
_HANDED_ON: ContextVar[HandedOnWeights | None] = ContextVar("handed_on", default=None)


@contextmanager
def one_weight_gradient(weights: tuple[torch.Tensor, ...] = ()):
    """Within it, visits of one expert pool add their weight gradients up in one buffer, not in one of N*3*I*H each.

    The weights go through the visits as views: each hands them to the next, and backward hands the sum from visit to
    visit. To go on in another layer, give the `weights` of the yielded object to that layer's call; across a
    checkpointed function, pass them in and out as tensors, for recomputation must start from what the first run saw.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield HandedOnWeights(())
        return
    handed_on = HandedOnWeights(weights)
    token = _HANDED_ON.set(handed_on)
    try:
        yield handed_on
    finally:
        _HANDED_ON.reset(token)


def coe_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`sum_k top_k_weights[:, k] * E_{top_k_index[:, k]}(x)`; index N (no expert, or another rank's) adds nothing.

    Rows of the index N come last and are not computed; while compiling, where shapes are static, they may be.
    What the autograd function cannot express runs through transformers' `grouped_mm`, with a warning: biases,
    transposed or interleaved weights, gates that are not SwiGLU's, norms after an expert, sharded weights, devices
    other than CPU and CUDA. Packed weights, torchao's for instance, are used one expert at a time. While compiling,
    exporting or under `torch.func` it is `grouped_mm` too: there the compiler decides what backward recomputes. ONNX
    cannot express that one: exporting to it is `batched_mm`, which gathers the weights of every row,
    `12 * T * K * I * H` bytes in fp32.
    Decoding, at most N rows without gradients, is transformers' `batched_mm` on accelerators and one product for each
    expert that was hit on CPU.

    Args:
        self (`nn.Module`): a module decorated by `use_experts_implementation`.
        hidden_states (`torch.Tensor` of shape `(T, H)`): x.
        top_k_index (`torch.LongTensor` of shape `(T, K)`): values in `[0, N]`.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): routing weights.

    Raises:
        RuntimeError: a backward pass with `create_graph=True`.
    """
    rows, on_cpu = top_k_index.numel(), hidden_states.device.type == "cpu"
    decodes = not torch.is_grad_enabled() and rows <= self.num_experts
    handed_on = None if torch.compiler.is_compiling() else _HANDED_ON.get()
    weights = (handed_on and handed_on.weights) or (self.gate_up_proj, self.down_proj)
    fallback = None
    if is_packed(weights[0]):
        return _expert_by_expert(self, hidden_states, top_k_index, top_k_weights)
    if torch.onnx.is_in_onnx_export():
        fallback = "batched_mm"
    elif torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        fallback = "batched_mm" if decodes and not on_cpu else "grouped_mm"
    elif unsupported := _unsupported(self, hidden_states, weights):
        logger.warning_once(f"`experts_implementation='coe'` does not support {unsupported}: using 'grouped_mm'.")
        fallback = "grouped_mm"
    elif decodes:
        same_dtype = hidden_states.dtype == self.down_proj.dtype and not torch.is_autocast_enabled("cpu")
        if on_cpu and same_dtype:
            return _expert_by_expert(self, hidden_states, top_k_index, top_k_weights)
        fallback = "grouped_mm" if on_cpu else "batched_mm"
    if fallback is not None:
        return ALL_EXPERTS_FUNCTIONS[fallback](self, hidden_states, top_k_index, top_k_weights)

    # Of the weights at hand: an adapter would be merged anew for the module's own.
    dtype, device_type = weights[1].dtype, hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    # transformers before 5.17 does not say whether other ranks hold experts.
    expert_parallel = vars(self).get("_is_expert_parallel", True)
    output, *weights = _Experts.apply(hidden_states, top_k_index, top_k_weights, *weights, dtype, expert_parallel)
    if handed_on is not None:
        handed_on.weights = tuple(weights)
    return output


ALL_EXPERTS_FUNCTIONS.register("coe", coe_experts_forward)


def is_packed(weight: torch.Tensor) -> bool:
    """Whether a tensor wraps others, as quantised weights do; sharded weights are not meant."""
    # Asked of the class: Dynamo, tracing `is_traceable_wrapper_subclass(weight)`, says no.
    return hasattr(type(weight), "__tensor_flatten__") and not isinstance(weight, DTensor)


def no_slices(experts: nn.Module) -> str | None:
    """What keeps these experts from being computed one at a time with packed weights, in words, or None."""
    if not experts.has_gate:
        return "no gate"
    if experts.has_bias or vars(experts).get("has_post_expert_norm", False):
        return "expert biases or norms"
    return "transposed expert weights" if experts.is_transposed else None


@torch.compiler.disable
def _expert_by_expert(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`F.linear` with the slices of the experts that were hit, all that packed weights are asked to know.

    Decoding on CPU too, where a grouped product pays for the experts without rows as well. Measured, that one catches
    up at N rows, in fp32 and bf16, for 8 and 64 experts, small and large.
    """
    if unsupported := no_slices(experts):
        raise ValueError(f"Packed expert weights do not go with {unsupported}; use `experts_implementation='eager'`.")
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    sizes = Counter(expert.tolist())
    absent = sizes.pop(experts.num_experts, 0)  # index N, whose rows come last

    def linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parts = rows.split([*sizes.values(), absent])
        products = [F.linear(part, weight[index]) for part, index in zip(parts, sizes, strict=False)]
        return torch.cat([*products, rows.new_zeros(absent, weight.shape[1])])

    with_gradients = torch.is_grad_enabled()
    # Inference mode refuses to make the view that a slice of a packed weight is; leaving it turns gradients on.
    with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
        gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
        rows = hidden_states.to(gate_up_proj.dtype)[order // top_k_index.shape[-1]]
        activation = experts._apply_gate(linear(rows, gate_up_proj)) * top_k_weights.reshape(-1)[order, None]
        rows = linear(activation.to(down_proj.dtype), down_proj)[torch.argsort(order)]
        return rows.view(*top_k_index.shape, hidden_states.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def _unsupported(
    experts: nn.Module, hidden_states: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor]
) -> str | None:
    """What keeps these experts from the autograd function, in words, or None."""
    if not experts.has_gate or type(experts)._apply_gate.__name__ != "_default_apply_gate":
        return f"the gate of {type(experts).__name__}"
    if not isinstance(experts.act_fn, (SiLUActivation, nn.SiLU)):
        return f"the activation {type(experts.act_fn).__name__}"
    if experts.has_bias or vars(experts).get("has_post_expert_norm", False):
        return "expert biases and norms"
    if experts.is_transposed or not experts.is_concatenated:
        return "transposed or interleaved expert weights"
    for weight in weights:
        if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point() or weight.itemsize < 2:
            return f"expert weights of type {type(weight).__name__}, {weight.dtype}"
    if hidden_states.device.type not in ("cpu", "cuda"):
        return f"the device {hidden_states.device.type}"
    return None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, dtype, expert_parallel):
        expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ids = torch.arange(gate_up_proj.shape[0], device=order.device)
        offsets = torch.searchsorted(expert, ids, right=True, out_int32=True)
        # Rows of the index N come last. To leave them out one must wait for their number, which only CPU has at hand.
        order = order[: offsets[-1]] if order.device.type == "cpu" else order
        groups = _Groups(offsets, dtype, zero_tail=expert_parallel)

        token = order // top_k_index.shape[-1]
        gate_up = groups.mm(hidden_states.to(dtype).index_select(0, token), gate_up_proj.transpose(1, 2))
        gate, up = gate_up.chunk(2, dim=-1)
        activation = F.silu(gate).mul_(up).mul_(top_k_weights.reshape(-1)[order, None])
        output = _sum_over_experts(groups.mm(activation, down_proj.transpose(1, 2)), order, top_k_index.shape)

        ctx.save_for_backward(hidden_states, gate_up, top_k_weights, order, gate_up_proj, down_proj)
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        views = gate_up_proj.view_as(gate_up_proj), down_proj.view_as(down_proj)
        # Else the next visit would compute the gradient of a frozen weight.
        frozen = [view for view, needed in zip(views, ctx.needs_input_grad[3:5], strict=True) if not needed]
        ctx.mark_non_differentiable(*frozen)
        return output.to(hidden_states.dtype), *views

    @staticmethod
    def backward(ctx, grad_output, grad_gate_up_proj, grad_down_proj):
        _refuse_create_graph("experts")
        if grad_output is None:
            return None, None, None, grad_gate_up_proj, grad_down_proj, None, None
        if is_transformed(grad_output):
            return _Experts.batched_backward(ctx, grad_output, grad_gate_up_proj, grad_down_proj)
        hidden_states, gate_up, top_k_weights, order, gate_up_proj, down_proj = ctx.saved_tensors
        needs_input, _, needs_router, needs_gate_up, needs_down = ctx.needs_input_grad[:5]
        groups = ctx.groups
        grad_input = grad_router = None
        token = order // top_k_weights.shape[-1]
        weights = top_k_weights.reshape(-1)[order, None]
        gate, up = gate_up.chunk(2, dim=-1)

        silu = F.silu(gate)
        grad_rows = grad_output.to(groups.dtype).index_select(0, token)
        grad_activation = groups.mm(grad_rows, down_proj)
        if needs_router or needs_down:
            activation = silu * up
            if needs_router:
                grad_sorted = (grad_activation * activation).sum(dim=-1, dtype=top_k_weights.dtype)
                grad_router = torch.zeros_like(top_k_weights)
                grad_router.view(-1).scatter_(0, order, grad_sorted)
            if needs_down:
                grad_down_proj = groups.add_outer(grad_down_proj, grad_rows, activation.mul_(weights))
            del activation
        del grad_rows
        if needs_input or needs_gate_up:
            grad_activation.mul_(weights)
            grad_gate_up = torch.empty_like(gate_up)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
            torch.mul(grad_activation, silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_activation.mul_(up), gate, grad_input=grad_gate)
            del silu, grad_activation
            if needs_gate_up:
                rows = hidden_states.to(groups.dtype).index_select(0, token)
                grad_gate_up_proj = groups.add_outer(grad_gate_up_proj, grad_gate_up, rows)
                del rows
            if needs_input:
                grad_input = _sum_over_experts(groups.mm(grad_gate_up, gate_up_proj), order, top_k_weights.shape)
        return grad_input, None, grad_router, grad_gate_up_proj, grad_down_proj, None, None

    @staticmethod
    def batched_backward(ctx, grad_output, *totals):
        """For many gradients at once (`is_grads_batched=True`, `vmap`): those of a loop that autograd can batch."""
        hidden_states, _, top_k_weights, order, *weights = ctx.saved_tensors
        dtype, ends = ctx.groups.dtype, ctx.groups.offsets.tolist()

        def loop(inputs, routing, gate_up_proj, down_proj):
            output = torch.zeros_like(inputs)
            for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                token = order[start:end] // top_k_weights.shape[-1]
                gate, up = F.linear(inputs[token].to(dtype), gate_up_proj[expert].to(dtype)).chunk(2, dim=-1)
                activation = F.silu(gate) * up * routing.reshape(-1)[order[start:end], None]
                rows = F.linear(activation.to(dtype), down_proj[expert].to(dtype))
                output = output.index_add(0, token, rows.to(output.dtype))
            return output

        _, pullback = torch.func.vjp(loop, hidden_states, top_k_weights, *weights)
        grad_input, grad_router, *grads = pullback(grad_output)
        grads = [grad if total is None else total + grad for total, grad in zip(totals, grads, strict=True)]
        return grad_input, None, grad_router, *grads, None, None


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether `torch.func` (`grad`, `vmap`, ...) or `is_grads_batched=True` is at work.

    The names are private in torch 2.10 to 2.13, which has no public ones.
    """
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return torch._C._are_functorch_transforms_active() or any(legacy(tensor) for tensor in tensors)


class _Groups:
    """Matrix products of S rows sorted by expert, expert e's ending at `offsets[e]`, computed in `dtype`.

    With `zero_tail` the rows after the last group, which belong to other ranks' experts, come out as zero.
    """

    def __init__(self, offsets: torch.Tensor, dtype: torch.dtype, zero_tail: bool):
        self.offsets = offsets
        self.dtype = dtype
        self.zero_tail = zero_tail

    def mm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`[S, A]`, `[N, A, B]` -> `[S, B]`."""
        if self._has_kernel(rows, weight):
            output = F.grouped_mm(rows, weight.to(self.dtype), offs=self.offsets)
            # The kernel does not write the rows after the last group.
            if self.zero_tail:
                tail = torch.arange(output.shape[0], device=output.device) >= self.offsets[-1]
                output.masked_fill_(tail[:, None], 0)
            elif output.device.type == "cpu":
                output[self.offsets[-1] :].zero_()
            return output
        output = rows.new_empty(rows.shape[0], weight.shape[-1])
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            if end > start:
                torch.mm(rows[start:end], weight[expert].to(self.dtype), out=output[start:end])
            start = end
        output[start:].zero_()
        return output

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`[S, A]`, `[S, B]` -> `[N, A, B]`, each group's sum of outer products: the gradient of a weight."""
        if self._has_kernel(left, right):
            return F.grouped_mm(left.t(), right, offs=self.offsets)
        output = left.new_empty(self.offsets.shape[0], left.shape[-1], right.shape[-1])
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            torch.mm(left[start:end].t(), right[start:end], out=output[expert])
            start = end
        return output

    def add_outer(self, total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`total + outer(left, right)`, in place; without a total the outer products alone."""
        if total is None:
            return self.outer(left, right)
        if total.device.type != "cpu" or total.dtype != self.dtype:
            return total.add_(self.outer(left, right))
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            total[expert].addmm_(left[start:end].t(), right[start:end])
            start = end
        return total

    def _has_kernel(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        """torch's grouped product takes neither fp64 nor rows that are not whole 16 bytes; a loop of products does."""
        if self.dtype == torch.float64:
            return False
        if left.device.type == "cuda" and torch.cuda.get_device_capability(left.device) < (8, 0):
            return False
        sizes = (left.shape[-1], *right.shape[-2:]) if right.dim() == 3 else (left.shape[-1], right.shape[-1])
        whole = all(size * self.dtype.itemsize % 16 == 0 for size in sizes)
        return whole and left.data_ptr() % 16 == right.data_ptr() % 16 == 0


def _sum_over_experts(rows: torch.Tensor, order: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each token's K rows of `[S, H]` -> `[T, H]`: a gather that sums on the way, always in the same order."""
    is_whole = order.shape[0] == shape.numel()
    if not is_whole:
        rows = F.pad(rows, (0, 0, 0, 1))  # what the rows that were left out add
    position = order.new_full((shape.numel(),), order.shape[0]).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    return F.embedding_bag(position.view(shape), rows, mode="sum")


def _refuse_create_graph(name: str):
    """Gradients without a graph of their own would leave terms out of a second derivative, silently."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"The {name} of `experts_implementation='coe'` have no second derivative, which `create_graph=True` asks "
            "for. Use fp32 and `model.set_experts_implementation('grouped_mm')`."
        )


def router_linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden_states @ weight.T` in fp32, `[T, H]`, `[N, H]` -> `[T, N]`; backward keeps no fp32 copy of either."""
    plain = hidden_states.dtype == weight.dtype == torch.float32 or torch.compiler.is_compiling()
    if plain or is_transformed():
        return F.linear(hidden_states.float(), weight.float())
    return _RouterLinear.apply(hidden_states, weight)


class _RouterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight):
        ctx.save_for_backward(hidden_states, weight)
        return F.linear(hidden_states.float(), weight.float())

    @staticmethod
    def backward(ctx, grad_logits):
        _refuse_create_graph("router")
        hidden_states, weight = ctx.saved_tensors
        grad_input = (grad_logits @ weight.float()).to(hidden_states.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_logits.t() @ hidden_states.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight


__all__ = ["coe_experts_forward", "is_packed", "is_transformed", "no_slices", "one_weight_gradient", "router_linear"]

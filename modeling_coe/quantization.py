# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Experts in 8 or 4 bits, for CoE and every other model whose experts `experts_implementation="coe"` runs:

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=QuantizedExpertsConfig(bits=4))

Loading quantises tensor by tensor, saving writes the integers, and loading those needs no full-precision copy. A file
knows no machine: `X` holds the rows of all experts one below the other, as int8 or two 4-bit integers to a byte, each
plus 8, the first in the low half; `X_scale` holds what they are multiplied by. In memory on CPU, 4-bit weights lie as
torch's kernel wants them there.

Why our own: other quantisers skip the fused experts (bitsandbytes), take them apart into hundreds of linear layers
(GPTQModel, auto-round, llm-compressor), expand them at every use (experts4bit-qlora, torchao on CPU) or run on GPUs
alone, while torch has fast products with 8-bit and 4-bit weights on CPU.
"""

import functools
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .experts_coe import no_slices


logger = logging.get_logger(__name__)

METHOD = "quantized_experts"
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
aten = torch.ops.aten


class QuantizedWeight(torch.Tensor):
    """A matrix `[O, I]`, or one for each expert `[N, O, I]`, in 8 or 4 bits: a frozen operand of `F.linear`.

    `W[n]` is expert n's matrix. `torch.baddbmm(W, B, A)`, by which PEFT adds its low-rank factors, is not multiplied
    out: products with the sum are `x W' + x A' B'`. Adding to W in place, PEFT's merge, rounds the sum to W's bits and
    warns of what that loses.

    Args:
        values: int8 `[N, O, I]`; of 4-bit weights uint8 `[N, O, I / 2]`, or what the CPU's kernel made of them.
        scale: of a row or of a group in it, `[N, O, groups]`; for the kernel `[N, groups, O, 2]`, zeros beside it.
        block: rows in a block of that kernel's layout, which differs between CPUs; 0 as in a file.
        update: `(B, A, alpha)` to be added.
    """

    @staticmethod
    def __new__(cls, values, scale=None, shape=None, bits=None, block=0, update=None, requires_grad=False):
        if isinstance(values, cls):  # accelerate makes a parameter of what it moved by calling the parameter's class
            return nn.Parameter(values, requires_grad)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale=None, shape=None, bits=None, block=0, update=None, requires_grad=False):
        if isinstance(values, QuantizedWeight):
            return
        self.values, self.scale = values, scale
        self.bits, self.block, self.update = bits, block, update
        self.slices = {}  # kept, for to make one takes half as long as its product with one row

    @classmethod
    def quantize(cls, weight: torch.Tensor, bits: int, group_size: int) -> "QuantizedWeight":
        """Rounds to the nearest multiples of one scale for a row (8 bits) or a group (4 bits), matrix by matrix."""
        if isinstance(weight, cls):
            raise ValueError(
                f"This weight is already in {weight.bits} bits and cannot be quantised again to {bits} bits: load the "
                "full-precision checkpoint with a `quantization_config`."
            )
        matrices = weight if weight.dim() == 3 else weight[None]
        parts = [_round(matrix, bits, group_size if bits == 4 else matrix.shape[1]) for matrix in matrices]
        values, scale = (torch.stack(part).view(*weight.shape[:-1], -1) for part in zip(*parts, strict=True))
        return cls(values, scale, weight.shape, bits).pack()

    def pack(self) -> "QuantizedWeight":
        """Laid out for this CPU's kernels: 4 bits in blocks of rows; 8 bits at an address that a mapped file lacks."""
        if self.bits == 8 and self.device.type == "cpu":
            self.values = _aligned(self.values)
        rows, block = self.shape[-2], block_rows() if self.device.type == "cpu" and _has_kernel(self) else 0
        if self.bits == 8 or self.block == block:
            return self
        if self.block:
            return self.unpack().pack()
        missing = -rows % block
        values = self.values.new_empty(*self.shape[:-2], rows + missing, self.shape[-1] // 2)
        matrices = [_select(self, expert) for expert in range(len(self))] if self.dim() == 3 else [self]
        # Written one by one into place: what is freed in between lets the heap shrink again.
        for matrix, target in zip(matrices, values.view(-1, *values.shape[-2:]), strict=True):
            integers = F.pad(matrix.integers() + 8, (0, 0, 0, missing)).int()
            target.copy_(aten._convert_weight_to_int4pack_for_cpu(integers, 1).view_as(target))
        scale = F.pad(self.scale, (0, 0, 0, missing)).transpose(-1, -2)
        scale = torch.stack([scale, torch.zeros_like(scale)], dim=-1)
        return QuantizedWeight(values, scale, self.shape, 4, block=block)

    def __setstate__(self, state):
        """From a pickle, whose CPU may have had another layout."""
        vars(self).update(state)
        vars(self).update(vars(self.pack()))

    def unpack(self) -> "QuantizedWeight":
        """Laid out as in a file."""
        if not self.block:
            return self
        return QuantizedWeight(_as_bytes(self.integers()), self.row_scale().contiguous(), self.shape, 4)

    def integers(self) -> torch.Tensor:
        """int8 `[N, O, I]`."""
        if self.bits == 8:
            return self.values
        halves = self.values & 15, self.values >> 4
        if not self.block:
            return torch.stack(halves, dim=-1).flatten(-2).view(torch.int8) - 8
        # The kernel's blocks of 32 or 64 rows: column by column, the first half of the rows in the low halves.
        half = self.block // 2
        low, high = (part.view(*self.shape[:-2], -1, self.shape[-1], half) for part in halves)
        rows = torch.cat([low, high], dim=-1).transpose(-1, -2).flatten(-3, -2)
        return rows[..., : self.shape[-2], :].view(torch.int8) - 8

    def row_scale(self) -> torch.Tensor:
        """`[N, O, groups]`."""
        return self.scale[..., 0].transpose(-1, -2)[..., : self.shape[-2], :] if self.block else self.scale

    def dequantize(self) -> torch.Tensor:
        scale = self.row_scale()
        groups = self.integers().to(self.dtype).unflatten(-1, (scale.shape[-1], -1))
        return (groups * scale[..., None]).flatten(-2)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def element_size(self) -> float:
        """Bytes, scales included: a fraction, by which `get_memory_footprint()` multiplies the number of weights."""
        return self.nbytes / self.numel()

    def share_memory_(self) -> "QuantizedWeight":
        self.values.share_memory_()
        self.scale.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.values.is_shared() and self.scale.is_shared()

    def storage(self):
        """Asked for by `safetensors.torch.save_model`; what lies in memory is in two tensors."""
        raise ValueError(f"One tensor in a file cannot hold {self}: save the model with `save_pretrained`.")

    def __repr__(self):
        return (
            f"QuantizedWeight(shape={tuple(self.shape)}, bits={self.bits}, dtype={self.dtype}, device={self.device})"
        )

    def __tensor_flatten__(self):
        return ["values", "scale"], (self.shape, self.bits, self.block)

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return QuantizedWeight(inner["values"], inner["scale"], *meta)

    def _map(self, function) -> "QuantizedWeight":
        return QuantizedWeight(
            function(self.values), function(self.scale), self.shape, self.bits, self.block, self.update
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        weight, kwargs = args[0], kwargs or {}
        if not isinstance(weight, cls):
            raise _unknown(func)
        if func in (aten.detach.default, aten.alias.default):
            return weight._map(lambda tensor: tensor)
        if func is aten.clone.default:
            return weight._map(torch.clone)
        if func is aten._to_copy.default:
            return _move(weight, torch.device(kwargs.get("device") or weight.device), kwargs.get("dtype"))
        if func is aten.copy_.default:
            return _copy(weight, args[1])
        if func in (aten.add_.Tensor, aten.sub_.Tensor):
            return _add(weight, args[1] if func is aten.add_.Tensor else -args[1])
        raise _unknown(func)


# `torch.load` reads what `torch.save(model.state_dict())` wrote.
torch.serialization.add_safe_globals([QuantizedWeight])


def _unknown(operation) -> NotImplementedError:
    return NotImplementedError(
        f"Weights in 8 or 4 bits know no `{operation}`; `model.dequantize()` makes ordinary weights of them."
    )


def _round(matrix: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers as in a file and the scales `[O, groups]`.

    A group's value of largest magnitude becomes the lowest integer, for there is one more below zero than above.
    """
    lowest = -(2 ** (bits - 1))
    groups = matrix.float().unflatten(-1, (-1, group_size))
    extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    scale = (extreme / lowest).to(matrix.dtype)
    integers = (groups / scale).nan_to_num(0.0).round_().clamp_(lowest, -lowest - 1).to(torch.int8).flatten(-2)
    return _as_bytes(integers) if bits == 4 else integers, scale.squeeze(-1)


def _as_bytes(integers: torch.Tensor) -> torch.Tensor:
    """Pairs of 4-bit integers, each plus 8: `[..., I]` -> uint8 `[..., I / 2]`."""
    first, second = (integers + 8).view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return first | second << 4


@functools.cache
def block_rows() -> int:
    """Rows of a block of the CPU kernel for 4 bits: 64 with AVX-512, 32 with AVX2, 0 where it knows no blocks."""
    numbered = torch.arange(4, dtype=torch.int32).repeat_interleave(16)[:, None].expand(64, 32).contiguous()
    # Of the two rows in the first byte, the second is half a block further down.
    return 32 * (aten._convert_weight_to_int4pack_for_cpu(numbered, 1).flatten()[0].item() >> 4)


def _has_kernel(weight: QuantizedWeight) -> bool:
    """8 bits: the kernel reads 16 columns at once, and over the end of a row of another length."""
    known = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and (weight.bits == 4 or weight.shape[-1] % 16 == 0)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Torch's 8-bit kernel ends the process where it reads rows from no multiple of 32 bytes, weights from none of 16.

    What torch allocates is a multiple of 64, as is every row of it whose width the kernel takes.
    """
    if tensor.is_meta or torch.compiler.is_compiling():
        return tensor
    return tensor if tensor.data_ptr() % 32 == 0 else tensor.clone()


def _multiply(rows: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """`x W'` by the CPU's kernels, else with W expanded."""
    rows = rows.to(weight.dtype).contiguous()
    on_cpu = weight.device.type == "cpu" and _has_kernel(weight) and (weight.bits == 8 or weight.block)
    # The kernels' time grows with every row; from about 64 on, a product with the expanded weight is faster.
    if not on_cpu or len(rows) > 64:
        return rows @ weight.dequantize().t()
    if weight.bits == 8:
        return torch._weight_int8pack_mm(_aligned(rows), weight.values, weight.scale.view(-1))
    group_size = weight.shape[1] // weight.scale.shape[0]
    output = aten._weight_int4pack_mm_for_cpu(rows, weight.values, group_size, weight.scale)
    return output[:, : weight.shape[0]]


class _Product(torch.autograd.Function):
    """`x W'`; in backward W is expanded, and has no gradient."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.weight = weight
        return _multiply(rows, weight)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ ctx.weight.dequantize(), None


def _linear(input: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    # An autograd function costs as much as the product of one row.
    product = _Product.apply if torch.is_grad_enabled() else _multiply
    output = product(input.flatten(0, -2), weight).view(*input.shape[:-1], weight.shape[0])
    if weight.update is not None:
        B, A, alpha = weight.update
        output = output + alpha * F.linear(F.linear(input.to(A.dtype), A), B)
    return output if bias is None else output + bias


def _embedding(ids: torch.Tensor, weight: QuantizedWeight, *args, **kwargs) -> torch.Tensor:
    # `values[ids]` would take a negative id from the end.
    return F.embedding(ids, weight.values).to(weight.dtype) * F.embedding(ids, weight.scale)


def _select(weight: QuantizedWeight, expert: int | slice) -> QuantizedWeight:
    if weight.dim() != 3 or not isinstance(expert, (int, slice)):
        raise IndexError(
            f"`[{expert}]` does not select whole experts of {weight}: take one integer or slice of the weight of all "
            "experts, or index its `dequantize()`; `model.dequantize()` makes ordinary weights of all."
        )
    if isinstance(expert, int) and expert in weight.slices:
        return weight.slices[expert]
    update = weight.update
    if update is not None:
        update = update[0][expert], update[1][expert], update[2]
    values, scale = weight.values[expert], weight.scale[expert]
    shape = values.shape[:-2] + weight.shape[1:]
    matrix = QuantizedWeight(values, scale, shape, weight.bits, weight.block, update)
    if update is None and isinstance(expert, int):
        weight.slices[expert] = matrix
    return matrix


def _baddbmm(weight: QuantizedWeight, B: torch.Tensor, A: torch.Tensor, *, alpha: float = 1) -> QuantizedWeight:
    # Unbound once, all experts' gradients of a factor are stacked once; each slice would have its own, of all experts.
    update = B.unbind(), A.unbind(), alpha
    return QuantizedWeight(weight.values, weight.scale, weight.shape, weight.bits, weight.block, update)


def _set_data(weight: QuantizedWeight, other: torch.Tensor):
    """`weight.data = other`, by which PEFT's `prepare_model_for_kbit_training` changes the dtype."""
    if not isinstance(other, QuantizedWeight):
        raise ValueError(f"`.data = ...` of {weight} takes other weights in few bits, not a tensor in {other.dtype}.")
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(weight, other)
    vars(weight).update(vars(other), slices={})


_FUNCTIONS = {
    torch.Tensor.data.__set__: _set_data,
    F.linear: _linear,
    F.embedding: _embedding,
    torch.Tensor.__getitem__: _select,
    torch.baddbmm: _baddbmm,
}


def _move(weight: QuantizedWeight, device: torch.device, dtype: torch.dtype | None) -> QuantizedWeight:
    weight = weight if device.type == weight.device.type else weight.unpack()
    values, scale = weight.values.to(device), weight.scale.to(device, dtype)
    return QuantizedWeight(values, scale, weight.shape, weight.bits, weight.block).pack()


def _copy(weight: QuantizedWeight, other: torch.Tensor) -> QuantizedWeight:
    if not isinstance(other, QuantizedWeight):
        raise ValueError(
            f"A tensor in {other.dtype} is not rounded into {weight}: load the full-precision checkpoint with "
            "`from_pretrained(path, quantization_config=...)`."
        )
    scales = [each.row_scale().shape for each in (other, weight)]
    if other.bits != weight.bits or scales[0] != scales[1] or other.shape != weight.shape:
        raise ValueError(
            f"{other} with scales {list(scales[0])} cannot be copied into {weight} with scales {list(scales[1])}: "
            "load the model with the bits and the group size of the weights to be copied."
        )
    other = _move(other, weight.device, weight.dtype)
    weight.values.copy_(other.values)
    weight.scale.copy_(other.scale)
    return weight


def _add(weight: QuantizedWeight, delta: torch.Tensor) -> QuantizedWeight:
    before = weight.dequantize()
    group_size = weight.shape[-1] // weight.row_scale().shape[-1]
    merged = QuantizedWeight.quantize(before + delta, weight.bits, group_size)
    lost = (merged.dequantize() - before - delta).norm() / delta.norm()
    logger.warning(
        f"Merged into a weight of {weight.bits} bits: rounding the sum adds an error of {lost:.0%} of the update. "
        "`model.dequantize()` before the merge keeps all of it."
    )
    weight.values.copy_(merged.values)
    weight.scale.copy_(merged.scale)
    return weight


class _QuantizedNames:
    """The names of a model's weights in few bits, whenever DistributedDataParallel asks which it shall leave alone.

    It would flatten and send them, frozen as they are, and every rank has read them from the same file.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __iter__(self):
        for name, weight in self.model.named_parameters():
            if isinstance(weight, QuantizedWeight):
                yield from (name, f"base_model.model.{name}")  # as PEFT's wrapper calls it


class QuantizedExpertsConfig(QuantizationConfigMixin):
    """For `from_pretrained(quantization_config=...)`.

    Args:
        bits: of the experts' weights, 8 (a scale for each row) or 4.
        group_size: 32 or 64 neighbouring 4-bit weights share a scale.
        rest_bits: 8 for attention, shared expert, embeddings and the head of a language model as well; None leaves
            them. Routers, norms and the heads of other tasks, which are new and learn, always stay. Where head and
            embeddings are one tensor, such a model runs on one device: accelerate knows tied tensors by an address,
            which these have not.

    Raises:
        ValueError: any other value, or a name that is none of these.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int = 32,
        rest_bits: int | None = None,
        quant_method: str = METHOD,  # stored configurations have it
        **unknown,
    ):
        for name, value in unknown.items():
            raise ValueError(f"`{name}={value!r}` is unknown; there are `bits`, `group_size` and `rest_bits`.")
        for name, value, known in (
            ("quant_method", quant_method, (METHOD,)),
            ("bits", bits, (8, 4)),
            ("group_size", group_size, (32, 64)),
            ("rest_bits", rest_bits, (None, 8)),
        ):
            if value not in known:
                raise ValueError(f"`{name}={value!r}` must be one of {known}.")
        self.quant_method, self.bits, self.group_size, self.rest_bits = quant_method, bits, group_size, rest_bits


class AlreadyQuantizedExperts(QuantizedExpertsConfig):
    """A file's configuration; transformers refuses to quantise again with one of another class.

    It names both classes and nothing else, as no hook sees the two: `CoEPreTrainedModel.from_pretrained` says more.
    """


class ExpertsQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` ask: which weights to quantise, and how they lie in a file."""

    is_trainable = True  # adapters on them

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args, device_map=None, **kwargs):
        devices = device_map if isinstance(device_map, dict) else {}
        on_disk = [name for name, device in devices.items() if device == "disk"]
        if on_disk:
            raise ValueError(
                f"Weights in 8 or 4 bits are not offloaded to disk, where the `device_map` puts {on_disk}: name other "
                'devices, or allow `device_map="auto"` more `max_memory`, of which it keeps some free for a layer.'
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        self.bits = bits_by_name(model, self.quantization_config)
        model.set_experts_implementation("coe")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        return param_name in self.bits

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes of a weight, scales included, for `device_map="auto"`; 4 bits as on CPU, where they take most."""
        width = param.dtype.itemsize
        if param_name not in self.bits:
            return width
        if self.bits[param_name] == 8:
            return 1 + width / param.shape[-1]
        group_size, rows, block = self.quantization_config.group_size, param.shape[-2], block_rows()
        if block == 0:
            return 0.5 + width / group_size
        return (0.5 + 2 * width / group_size) * (rows + -rows % block) / rows

    def get_quantize_ops(self):
        return _Quantize(self)

    def get_weight_conversions(self):
        if not self.pre_quantized:
            return []
        names = EXPERT_WEIGHTS if self.quantization_config.rest_bits is None else (*EXPERT_WEIGHTS, "weight")
        return [WeightConverter([f"{name}$", f"{name}_scale$"], name, [_Deserialize(self)]) for name in names]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        missing = [name for name in self.bits if not isinstance(parameters[name], QuantizedWeight)]
        if missing:
            raise ValueError(
                f"The checkpoint does not hold {missing} as {self.quantization_config.bits}-bit integers with their "
                "`_scale`; download it again, or quantise the original once more."
            )
        _let_go_of_the_file(model)
        model._ddp_params_and_buffers_to_ignore = _QuantizedNames(model)
        # Files hold the fused tensors; the model's own conversions would take them apart into experts.
        model._weight_conversions = []
        shares = quantized_share(model)
        logger.warning(
            "Share of the weights: "
            + "; ".join(f"{name} {share:.1%} in {bits} bits" for (name, bits), share in shares.items())
        )

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        state = {}
        for name, tensor in model.state_dict().items():
            state[name] = tensor
            if isinstance(tensor, QuantizedWeight):
                weight = tensor.unpack()
                state[name], state[f"{name}_scale"] = weight.values.flatten(0, -2), weight.scale.flatten(0, -2)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        """Ordinary weights, which learn as those of an original checkpoint; under PEFT's adapters, frozen."""
        learns = not any(hasattr(module, "merged_adapters") for module in model.modules())
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if isinstance(weight, QuantizedWeight):
                    # transformers may pass the name of the model's dtype.
                    weight = weight.dequantize().to(dtype if isinstance(dtype, torch.dtype) else weight.dtype)
                    setattr(module, name, nn.Parameter(weight, requires_grad=learns))
        model.tie_weights()
        return model


if METHOD not in AUTO_QUANTIZER_MAPPING:  # a checkpoint's own copy of this file may come second
    register_quantization_config(METHOD)(AlreadyQuantizedExperts)
    register_quantizer(METHOD)(ExpertsQuantizer)


def bits_by_name(model: PreTrainedModel, config: QuantizedExpertsConfig) -> dict[str, int]:
    """The parameters to quantise, by their full names.

    Raises:
        ValueError: a model without fused experts, experts that `coe` does not run, widths that no groups divide.
    """
    bits = {}
    for name, module in model.named_modules():
        if "is_transposed" in vars(module):  # set by transformers' `use_experts_implementation`
            if unsupported := no_slices(module):
                raise ValueError(f"`{name}` cannot be quantised: it has {unsupported}.")
            for weight in EXPERT_WEIGHTS:
                width = module.get_parameter(weight).shape[-1]
                if config.bits == 4 and width % config.group_size:
                    raise ValueError(
                        f"`group_size={config.group_size}` does not divide the width {width} of `{name}.{weight}`; "
                        "take another group, or `bits=8`."
                    )
                bits[f"{name}.{weight}"] = config.bits
    if not bits:
        raise ValueError(f"{type(model).__name__} has no fused experts to quantise.")
    if config.rest_bits is not None:
        known = {*model.base_model.modules(), model.get_output_embeddings()}
        for name, module in model.named_modules():
            routes = name.rsplit(".", 1)[-1].endswith(("gate", "router"))
            if isinstance(module, (nn.Linear, nn.Embedding)) and module in known and not routes:
                bits[f"{name}.weight"] = config.rest_bits
    return bits


class _Quantize(ConversionOps):
    def __init__(self, quantizer: ExpertsQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict, full_layer_name=None, **kwargs):
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        bits, group_size = self.quantizer.bits[full_layer_name], self.quantizer.quantization_config.group_size
        quantized = QuantizedWeight.quantize(weight, bits, group_size)
        return {full_layer_name: nn.Parameter(quantized, requires_grad=False)}


class _Deserialize(ConversionOps):
    def __init__(self, hf_quantizer: ExpertsQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        tensors = {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in input_dict.items()}
        scale = next((tensor for name, tensor in tensors.items() if "_scale" in name), None)
        values = next((tensor for name, tensor in tensors.items() if "_scale" not in name), None)
        bits = self.hf_quantizer.bits.get(full_layer_name)
        empty = model.get_parameter(full_layer_name)
        if bits is None:
            full = values if scale is None else values * scale  # a head that an earlier version stored in integers
            return {full_layer_name: full.to(empty.dtype)}
        shape, dtype = empty.shape, torch.int8 if bits == 8 else torch.uint8
        if values is None or scale is None or values.dtype != dtype or values.numel() * 8 != shape.numel() * bits:
            return {}  # named when loading ends
        values = values.view(*shape[:-1], -1)
        weight = QuantizedWeight(values, scale.view(*shape[:-1], -1).to(empty.dtype), shape, bits).pack()
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}


def _let_go_of_the_file(model: nn.Module):
    """Copies what still lies in the mapped file, or its pages of the weights that were laid out anew stay resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, QuantizedWeight):
            tensor.data = tensor.data.clone()
        elif not tensor.block:
            tensor.values, tensor.scale = tensor.values.clone(), tensor.scale.clone()


def quantized_share(model: nn.Module) -> dict[tuple[str, int], float]:
    """The share of all weights that each component holds in so many bits: `{("experts", 4): 0.87, ...}`.

    Whoever quantised them: of tensors that wrap others, the largest inside counts, and uint8 holds two weights.
    """
    counts = Counter()
    for name, parameter in model.named_parameters():
        number, bits = parameter.numel(), 8 * parameter.element_size()
        if isinstance(parameter, QuantizedWeight):
            bits = parameter.bits
        elif is_traceable_wrapper_subclass(parameter):
            inner = (vars(parameter).get(key) for key in parameter.__tensor_flatten__()[0])
            bits = round(8 * max(tensor.nbytes for tensor in inner if tensor is not None) / number)
        elif parameter.dtype == torch.uint8:
            number, bits = 2 * number, 4
        parts = name.split(".")
        component = next((value for key, value in COMPONENTS.items() if key in parts), "other")
        if parts[-2].endswith("norm"):
            component = "other"
        counts[component, bits] += number
    total = sum(counts.values())
    return {key: count / total for key, count in counts.most_common()}


COMPONENTS = {
    "experts": "experts",
    "self_attn": "attention",
    "shared_expert": "shared expert",
    "gate": "routers",
    "embed_tokens": "embeddings",
    "lm_head": "head",
}

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Balanced experts without a loss (arXiv 2408.15664), and a budget of experts per token, held alike (2509.01322).

The biases that this moves are in every CoE with `router_bias=True`, and in every transformers model whose routers have
an `e_score_correction_bias`: DeepSeek-V3, GLM-4-MoE and their kin, in which nothing else updates them.

    Trainer(model, ..., callbacks=[RouterBiasCallback()])

    balance = RouterBalance(model)  # or in a loop of one's own, after `optimizer.step()`:
    balance.step()

Shape letters: T tokens, N experts, K experts per token, R routers of one module.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from numbers import Real
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from .modeling_coe import BIAS, BUDGET_STEPS, CoETopKRouter, routed_tokens, warn_of_lost_biases


# The routers that a `RouterBalance` moves.
_BALANCED = WeakSet()
# The balances of the trainings that have begun and not ended, as when a user interrupts one.
_IN_TRAINING = WeakSet()
# The inputs of a model that tell its padding.
COUNTED_BY = ("input_ids", "attention_mask", "position_ids", "labels")


class RouterBalance:
    """Counts the experts that tokens choose in training, and moves each router's bias against the imbalance.

    `step()` adds `rate` to the bias of every expert that was chosen less often than the mean of its router and takes
    it from the others. The bias of null experts moves as one, towards `config.expert_budget` experts per token. What
    counts since the last step: every forward pass in training mode, of all ranks, without its padding, and without
    what gradient checkpointing repeats.

    Args:
        model (`nn.Module`): the model in training, PEFT's or another wrapper around it included.
        rate (`float`, *optional*, defaults to 1e-3): how far a bias moves in one step, in units of what it is added
            to: logits in CoE; scores after a sigmoid in DeepSeek-V3, which was trained with 1e-3.

    Raises:
        ValueError: a rate that is not positive, or a model without such biases.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3):
        self.rate = _positive(rate)
        self.opened_by, self.is_counting, self.token_weight = None, False, None
        self.routers = {name: module for name, module in model.named_modules() if _bias(module) is not None}
        if not self.routers:
            raise ValueError(
                f"{type(model).__name__} has no `{BIAS}` that could balance its experts. A CoE has one in each router "
                "with `router_bias=True` in its configuration."
            )
        if any(module in _BALANCED for module in self.routers.values()):
            raise ValueError(
                f"{type(model).__name__} is balanced already, and two would move its biases twice as far; call "
                "`remove()` of the first."
            )
        called = {
            name: _experts_beside(model, name)
            for name, module in self.routers.items()
            if not isinstance(module, CoETopKRouter)
        }
        _BALANCED.update(self.routers.values())
        warn_of_lost_biases(model)
        self.counts = {
            name: torch.zeros_like(_rows(module), dtype=torch.long) for name, module in self.routers.items()
        }
        self.hooks = []
        for name, module in self.routers.items():
            if name in called:
                count = partial(self._count_call, name)
                self.hooks.append(called[name].register_forward_pre_hook(count, with_kwargs=True))
            else:
                self.hooks.append(module.register_forward_hook(partial(self._count_chain, name)))
        counted = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
        self.config = getattr(counted, "config", None)
        # Losses of their own call the model below the head, which the head calls as well.
        for module in {counted, getattr(counted, "base_model", counted)}:
            self.hooks.append(module.register_forward_pre_hook(self._start, with_kwargs=True))
            # Also after an error, or what comes next would be counted.
            self.hooks.append(module.register_forward_hook(self._stop, always_call=True))

    @torch.no_grad()
    def step(self):
        """Moves the biases by what was counted since the last step, and counts anew.

        Raises:
            ValueError: `config.expert_budget` has become one that the null experts do not allow.
        """
        if getattr(self.config, "num_null_experts", 0) > 0:
            self.config.check_expert_budget(self.config.expert_budget)
        if dist.is_available() and dist.is_initialized():
            for counts in self.counts.values():
                dist.all_reduce(counts)
        for name, module in self.routers.items():
            counts, bias = self.counts[name], _rows(module)
            null = module.num_null_experts if isinstance(module, CoETopKRouter) else 0
            N = bias.shape[-1] - null
            experts = counts[:, :N]
            # N times the mean's excess over an expert, in whole numbers, so that all ranks find the same sign.
            bias[:, :N] += self.rate * torch.sign(experts.sum(-1, keepdim=True) - N * experts)
            if null > 0:
                # Where an extreme budget had put them, no step would lead back.
                if not self.config.is_extreme_budget(self.config.expert_budget):
                    bias[:, N:].nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)
                wanted = (1 - self.config.expert_budget / module.top_k) * counts.sum(-1, dtype=torch.float)
                bias[:, N:] += self.rate * torch.sign(wanted - counts[:, N:].sum(-1))[:, None].to(bias.dtype)
            counts.zero_()
        # A forward pass that the user interrupted closed nothing.
        self.opened_by, self.is_counting, self.token_weight = None, False, None

    def remove(self):
        """Stops counting."""
        _BALANCED.difference_update(self.routers.values())
        _IN_TRAINING.discard(self)
        for hook in self.hooks:
            hook.remove()

    # A forward pass opens and closes the count: gradient checkpointing repeats layers after its end.
    def _start(self, model: nn.Module, args: tuple, kwargs: dict):
        if self.opened_by not in (None, model) and any(module is model for module in self.opened_by.modules()):
            return  # the head, which knows the labels, calls the model below it
        self.opened_by = model
        self.is_counting = model.training and torch.is_grad_enabled()
        inputs = dict(zip(COUNTED_BY[:3], args, strict=False)) | kwargs
        self.token_weight = routed_tokens(self.config, *(inputs.get(name) for name in COUNTED_BY))

    def _stop(self, model: nn.Module, args: tuple, output: object):
        if self.opened_by is model:
            self.opened_by, self.is_counting, self.token_weight = None, False, None

    def _count_chain(self, name: str, gate: CoETopKRouter, args: tuple, output: tuple):
        if self.is_counting:
            self._add(name, args[1] % gate.weight.shape[0], output[2])

    def _count_call(self, name: str, experts: nn.Module, args: tuple, kwargs: dict):
        if self.is_counting:
            values = (*args, *kwargs.values())
            self._add(name, 0, next(value for value in values if value.dtype == torch.long))

    def _add(self, name: str, router: int, index: torch.Tensor):
        """`[T, K]`, the experts that the tokens chose; all null experts have the index N and one column of it."""
        counts = self.counts[name] = self.counts[name].to(index.device)
        weight = torch.ones_like(index)
        if self.token_weight is not None:
            sequence_length = index.shape[0] // self.token_weight.shape[0]
            token_weight = self.token_weight[:, -sequence_length:].reshape(-1, 1)
            weight = token_weight.to(index.device, torch.long).expand_as(index)
        counts[router].index_add_(0, index.reshape(-1), weight.reshape(-1))


class RouterBiasCallback(TrainerCallback):
    """`RouterBalance` for Trainer: after every optimizer step the biases move by `rate`.

    A training that begins takes the model over from one that was interrupted.
    """

    def __init__(self, rate: float = 1e-3):
        self.rate = _positive(rate)
        self.balance = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)
        modules = set(model.modules())
        for balance in [one for one in _IN_TRAINING if not modules.isdisjoint(one.routers.values())]:
            balance.remove()
        self.balance = RouterBalance(model, self.rate)
        _IN_TRAINING.add(self.balance)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.balance.step()

    def on_train_end(self, args, state, control, **kwargs):
        if self.balance is not None:
            self.balance.remove()
            self.balance = None


@torch.no_grad()
def calibrate_expert_budget(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]):
    """Stores in the model which bias of its null experts gives which mean number of experts per token.

    A token chooses its j-th best null expert if that one's logit, with the bias, is above that of its j-th worst among
    its K best experts: the bias for a budget is a quantile of these margins. Routers see what those before them made,
    so each of the 17 budgets takes a forward pass over the batches. `set_expert_budget(x)` and the argument
    `expert_budget=x` then find the bias; the budget that is set does not change.

    Args:
        model (`PreTrainedModel`): a CoE with null experts.
        batches (iterable of `dict`): inputs of the model, text like that which it will see; some thousand tokens.

    Raises:
        ValueError: a model without null experts, or no batches.
    """
    config, batches = model.config, [] if batches is None else list(batches)
    if not getattr(config, "num_null_experts", 0):
        raise ValueError(f"{type(model).__name__} has no null experts: there is no budget to calibrate.")
    if not batches or not all(isinstance(batch, Mapping) for batch in batches):
        kinds = sorted({type(batch).__name__ for batch in batches})
        raise ValueError(
            f"`batches` has {kinds or 'nothing'} in it; pass a list of at least one dict of model inputs."
        )
    low, high = config.smallest_expert_budget, config.num_experts_per_tok
    gates = [module for module in model.modules() if isinstance(module, CoETopKRouter)]
    warn_of_lost_biases(model)
    before = [gate.null_bias_of_budget.clone() for gate in gates]
    was_training = model.training
    model.eval()
    try:
        for step in range(BUDGET_STEPS):
            portion = step / (BUDGET_STEPS - 1)
            quantiles = defaultdict(list)
            for batch in batches:
                weight = routed_tokens(config, *(batch.get(name) for name in COUNTED_BY))
                store = partial(_store_quantile, quantiles, weight, step)
                hooks = [gate.register_forward_pre_hook(store) for gate in gates]
                try:
                    # With a cache, attention would not keep the documents of a packed row apart.
                    model(**{"use_cache": False, **batch}, expert_budget=low + (high - low) * portion)
                finally:
                    for hook in hooks:
                        hook.remove()
    except BaseException:
        for gate, table in zip(gates, before, strict=True):
            gate.null_bias_of_budget.copy_(table)
        raise
    finally:
        model.train(was_training)


def _store_quantile(
    quantiles: dict[tuple, list], weight: torch.Tensor | None, step: int, gate: CoETopKRouter, args: tuple
):
    """Before router t routes: what its null bias must be for the budget of this step, the mean over the batches."""
    hidden_states, iteration = args[:2]
    router = iteration % gate.weight.shape[0]
    margins = _null_margins(gate, gate.logits(hidden_states, iteration), router)
    if weight is not None:
        margins = margins[weight.reshape(-1).to(margins.device).bool()]
        if margins.numel() == 0:
            raise ValueError("A batch of `batches` is padding alone; leave it out.")
    quantiles[gate, router].append(torch.quantile(margins.flatten(), 1 - step / (BUDGET_STEPS - 1)))
    gate.null_bias_of_budget[router, step] = torch.stack(quantiles[gate, router]).mean()


def _null_margins(gate: CoETopKRouter, logits: torch.Tensor, router: int) -> torch.Tensor:
    """Logits `[T, N + null]` -> `[T, J]`: above which bias of the null experts a token chooses 1, 2, ... J of them."""
    N, J = gate.num_experts, min(gate.top_k, gate.num_null_experts)
    experts = logits[:, :N] + gate.e_score_correction_bias[router, :N]
    worst_first = experts.topk(gate.top_k).values.flip(-1)
    return worst_first[:, :J] - logits[:, N:].topk(J).values


def _positive(rate: float) -> float:
    is_number = isinstance(rate, Real) and not isinstance(rate, bool)
    if not (is_number and math.isfinite(rate) and rate > 0):
        raise ValueError(f"`rate={rate!r}` must be a positive number; DeepSeek-V3 was trained with 1e-3.")
    return rate


def _bias(module: nn.Module) -> torch.Tensor | None:
    return module._buffers.get(BIAS, module._parameters.get(BIAS))


def _rows(module: nn.Module) -> torch.Tensor:
    """The bias as `[R, N]`, whatever shape a model gives it; a view, to be changed in place."""
    bias = _bias(module)
    return bias.data.view(-1, bias.shape[-1])


def _experts_beside(model: nn.Module, name: str) -> nn.Module:
    """The experts of the block that a router is, or is in."""
    path = name
    while True:
        experts = getattr(model.get_submodule(path), "experts", None)
        if isinstance(experts, nn.Module):
            return experts
        if not path:
            raise ValueError(f"Found no `experts` in the block of `{name}`, so nothing tells which it chooses.")
        path = path.rpartition(".")[0]


__all__ = ["RouterBalance", "RouterBiasCallback", "calibrate_expert_budget"]

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Which experts fire in which iteration, and what each iteration changes.

    routing = record_routing(model, **tokenizer(texts, return_tensors="pt", padding=True))
    print(routing.entropy, routing.change)
    plot_transitions(routing).savefig("transitions.png")

Shape letters: L layers, C iterations, N experts, K experts per iteration, T tokens that are not padding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .modeling_coe import CoESparseMoeBlock, CoETopKRouter


@dataclass(frozen=True)
class Routing:
    """The choices of every router: `experts[l, t, i]` are the K experts of token i in iteration t of layer l.

    A null expert has the index N and is no visit. `change[l, t]` is `|x_t - x_{t-1}| / |x_{t-1}|`, averaged over the
    tokens. `loss[i]` is what the model pays for the token after token i; NaN after the last of a text.
    """

    experts: torch.Tensor  # [L, C, T, K]
    num_experts: int
    change: torch.Tensor  # [L, C]
    loss: torch.Tensor | None = None  # [T]

    @property
    def chosen(self) -> torch.Tensor:
        """`[L, C, T, N]`, 1 where a token visits an expert."""
        return F.one_hot(self.experts, self.num_experts + 1)[..., :-1].sum(dim=-2).float()

    @property
    def experts_per_token(self) -> torch.Tensor:
        """`[L, C, T]`: how many experts a token computes; K unless it chose null experts."""
        return (self.experts < self.num_experts).sum(dim=-1).float()

    @property
    def load(self) -> torch.Tensor:
        """`[L, C, N]`: the share of an iteration's visits that each expert gets; 1 / N where the load is even."""
        visits = self.chosen.sum(dim=-2)
        return visits / visits.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def entropy(self) -> torch.Tensor:
        """`[L, C]`: the entropy of the load over log N; 1 for an even load, 0 if one expert does everything.

        It is 0 in a pool of one expert, where log N is 0.
        """
        return torch.special.entr(self.load).sum(dim=-1) / torch.tensor(max(self.num_experts, 2)).log()

    @property
    def transitions(self) -> torch.Tensor:
        """`[L, C - 1, N, N]`: of the tokens that visit expert i, the share whose next iteration visits expert j.

        A row sums to K, less where tokens chose null experts; it is 0 where no token visits i.
        """
        now, then = self.chosen[:, :-1], self.chosen[:, 1:]
        return now.transpose(-1, -2) @ then / now.sum(dim=-2).clamp(min=1)[..., None]

    @property
    def revisits(self) -> torch.Tensor:
        """`[L, C - 1]`: the share of an iteration's visits that go to an expert of the iteration before."""
        now, then = self.chosen[:, :-1], self.chosen[:, 1:]
        return (now * then).sum(dim=(-1, -2)) / then.sum(dim=(-1, -2)).clamp(min=1)

    def visits_by_kind(self, kinds: torch.Tensor) -> torch.Tensor:
        """`[L, C, G, N]`: the share of all visits by kind and expert; `kinds` `[T]` numbers the kind of each token.

        Raises:
            ValueError: not one kind for each token.
        """
        return self._shares_by_kind(kinds).float()

    def _shares_by_kind(self, kinds: torch.Tensor) -> torch.Tensor:
        visits = (self._one_hot(kinds).T @ self.chosen).double()
        return visits / visits.sum(dim=(-1, -2), keepdim=True).clamp(min=1)

    def experts_by_kind(self, kinds: torch.Tensor) -> torch.Tensor:
        """`[L, C, G]`: the mean number of experts that a token of each kind computes; `kinds` `[T]`."""
        one_hot = self._one_hot(kinds)
        return self.experts_per_token @ one_hot / one_hot.sum(dim=0).clamp(min=1)

    def experts_by_loss(self, groups: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
        """Do hard tokens get more? The tokens in groups of equal size from the easiest next token to the hardest:
        the mean loss of each group, `[groups]`, and the mean number of experts that its tokens compute,
        `[L, C, groups]`.
        """
        if self.loss is None:
            raise ValueError("This record has no losses: `record_routing` a causal language model, not its base.")
        known = ~self.loss.isnan()
        order = self.loss[known].argsort()
        parts = order.tensor_split(groups)
        loss = torch.stack([self.loss[known][part].mean() for part in parts])
        experts = self.experts_per_token[..., known]
        return loss, torch.stack([experts[..., part].mean(dim=-1) for part in parts], dim=-1)

    def _one_hot(self, kinds: torch.Tensor) -> torch.Tensor:
        if kinds.shape != (tokens := self.experts.shape[2:3]):
            raise ValueError(
                f"`kinds` of shape {tuple(kinds.shape)} must give one kind for each of {tokens[0]} tokens."
            )
        return F.one_hot(kinds).float()

    def specialisation(self, kinds: torch.Tensor) -> torch.Tensor:
        """`[L, C]`: mutual information of a visit's kind of token and expert over the entropy of the kinds.

        0 where every kind visits the experts alike, or all visits are of one kind; 1 where the expert tells the kind.
        """
        joint = self._shares_by_kind(kinds)

        def entropy(shares: torch.Tensor) -> torch.Tensor:
            return torch.special.entr(shares).sum(dim=-1)

        by_kind, by_expert = entropy(joint.sum(dim=-1)), entropy(joint.sum(dim=-2))
        told = (by_kind + by_expert - entropy(joint.flatten(-2))) / by_kind
        # Where they are of one kind, `by_kind` is 0 or what rounding leaves of it.
        return told.where(joint.any(dim=-1).sum(dim=-1) > 1, 0.0).float()


@contextmanager
def watched_choices(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within it, what every router of a CoE chooses, `[T, K]` in the order of the calls; a null expert has index N."""
    choices = []
    routers = [module for module in model.modules() if isinstance(module, CoETopKRouter)]
    hooks = [router.register_forward_hook(lambda gate, args, output: choices.append(output[2])) for router in routers]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def record_routing(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
) -> Routing:
    """The routing of `input_ids` `[B, S]` by a CoE model in evaluation mode; padding is left out.

    What else the model takes goes to it: `expert_budget`, for instance.

    Raises:
        ValueError: the model is in training mode, `input_ids` has another shape, or all of it is padding.
    """
    if model.training:
        raise ValueError("The model is in training mode, where routers may be jittered; call `model.eval()` first.")
    if input_ids.dim() != 2:
        raise ValueError(
            f"`input_ids` of shape {tuple(input_ids.shape)} must be `[batch, length]`; see `unsqueeze(0)`."
        )
    if attention_mask is not None and not attention_mask.any():
        raise ValueError("`attention_mask` leaves no token: all of `input_ids` is padding.")
    config = model.config
    blocks = [module for module in model.modules() if isinstance(module, CoESparseMoeBlock)]
    states, hooks = [[] for _ in blocks], []
    for block, chain in zip(blocks, states, strict=True):
        hooks += [block.gate.register_forward_pre_hook(partial(_keep_input, chain))]
        hooks += [block.register_forward_hook(partial(_keep_last, chain))]
    try:
        with watched_choices(model) as choices:
            output = model(input_ids, attention_mask=attention_mask, output_router_logits=True, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    keep = keep.flatten().bool()
    experts = torch.stack(choices)[:, keep].unflatten(0, (config.num_hidden_layers, config.num_iterations))
    chains = torch.stack([torch.stack(chain) for chain in states])[:, :, keep].float()
    change = (chains.diff(dim=1).norm(dim=-1) / chains[:, :-1].norm(dim=-1)).mean(dim=-1)
    loss = _next_token_loss(output.logits, input_ids, attention_mask)[keep].cpu() if "logits" in output else None
    return Routing(experts.cpu(), config.num_local_experts, change.cpu(), loss)


def _next_token_loss(
    logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """`[B * S]`, the loss of the token after each; NaN where there is none."""
    targets = F.pad(input_ids[:, 1:], (0, 1))
    has_next = F.pad(torch.ones_like(input_ids) if attention_mask is None else attention_mask, (0, 1))[:, 1:].bool()
    loss = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return loss.masked_fill(~has_next, float("nan")).flatten()


def _keep_input(chain: list[torch.Tensor], gate: CoETopKRouter, inputs: tuple):
    """x_{t-1}, which router t sees."""
    chain.append(inputs[0])


def _keep_last(chain: list[torch.Tensor], block: CoESparseMoeBlock, inputs: tuple, output: tuple[torch.Tensor, ...]):
    """x_C, from what the block returns before the router logits."""
    output = output[0].flatten(0, 1)
    chain.append(chain[0] + output if block.has_chain_residual else output)


def plot_routing(routing: Routing):
    """A matplotlib figure: the load of every expert, a panel for each iteration, a row for each layer."""
    from matplotlib.figure import Figure  # an optional dependency: `pip install modeling-coe[train]`

    L, C, N = routing.load.shape
    figure = Figure(figsize=(3.2 + 2.4 * C, 1.6 + 0.32 * L), layout="constrained")
    axes = figure.subplots(1, C, sharey=True, squeeze=False)[0]
    relative = (routing.load * N).numpy()  # 1 is an even load
    for iteration, axis in enumerate(axes):
        image = axis.imshow(relative[:, iteration], aspect="auto", cmap="Blues", vmin=0, vmax=max(2, relative.max()))
        entropy = routing.entropy[:, iteration].mean()
        axis.set(title=f"iteration {iteration + 1}: entropy {entropy:.2f}", xlabel="expert", yticks=range(L))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="load, 1 = even")
    return figure


def plot_cost(routing: Routing, tokens: list[str], columns: int = 96, lines: int = 30):
    """A matplotlib figure: the text, each token coloured by the mean number of experts that it computes an iteration.

    Args:
        routing (`Routing`): the record.
        tokens (`list[str]`): the text of each of the first tokens of the record.
        columns (`int`), lines (`int`): characters of a line, and lines; what comes after is not shown.
    """
    from matplotlib.cm import ScalarMappable  # an optional dependency: `pip install modeling-coe[train]`
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    cost = routing.experts_per_token.mean(dim=(0, 1))[: len(tokens)]
    color = ScalarMappable(Normalize(cost.min().item(), cost.max().item()), "YlOrRd")
    places, line, column = [], 0, 0
    for token, value in zip(tokens, cost.tolist(), strict=True):
        for piece in token.splitlines(keepends=True):
            text = piece.rstrip("\n")
            if column + len(text) > columns:
                line, column = line + 1, 0
            places.append((line, column, text or "¶", value))
            column += len(text)
            if piece.endswith("\n"):
                line, column = line + 1, 0
    places = [place for place in places if place[0] < lines]
    height = max(line for line, *_ in places) + 1
    # A character of DejaVu Sans Mono is 0.602 of its size wide; 9 points.
    figure = Figure(figsize=(columns * 0.602 * 9 / 72 + 0.3, 0.2 * height + 1.0), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, columns), ylim=(height, 0))
    axis.set_axis_off()
    for line, column, text, value in places:
        axis.add_patch(Rectangle((column, line), len(text), 0.92, color=color.to_rgba(value), linewidth=0))
        dark = value > (color.norm.vmin + 2 * color.norm.vmax) / 3
        style = {"family": "DejaVu Sans Mono", "fontsize": 9, "va": "center", "color": "white" if dark else "black"}
        axis.text(column, line + 0.46, text.replace("$", r"\$"), **style)
    figure.colorbar(color, ax=axis, location="bottom", aspect=50, label="experts a token computes, mean of iterations")
    return figure


def plot_transitions(routing: Routing):
    """A matplotlib figure: where the tokens of an expert go next, a panel for each layer and each pair of iterations.

    Shown is the share of an expert's tokens over what an even choice, K / N, would give.
    """
    from matplotlib.figure import Figure  # an optional dependency: `pip install modeling-coe[train]`

    L, pairs, N = routing.transitions.shape[:3]
    if pairs == 0:
        raise ValueError("One iteration has no transitions; take a model with `num_iterations` of at least 2.")
    relative = (routing.transitions * N / routing.experts.shape[-1]).numpy()
    figure = Figure(figsize=(0.8 + 2.6 * L, 0.4 + 2.6 * pairs), layout="constrained")
    axes = figure.subplots(pairs, L, squeeze=False)
    for pair, row in enumerate(axes):
        for layer, axis in enumerate(row):
            image = axis.imshow(relative[layer, pair], cmap="Blues", vmin=0, vmax=max(4, N / 8))
            again = f"{routing.revisits[layer, pair]:.0%} chosen again"
            axis.set_title(f"layer {layer}, {again}", fontsize=9)
            axis.set(xlabel=f"expert in iteration {pair + 2}", ylabel=f"expert in iteration {pair + 1}")
    figure.colorbar(image, ax=axes, label="visits, 1 = even", extend="max")
    return figure

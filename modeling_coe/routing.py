# Copyright 2026 The Chain-of-Experts team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which experts fire in which iteration.

    routing = record_routing(model, **tokenizer(texts, return_tensors="pt", padding=True))
    print(routing.entropy)
    plot_routing(routing).savefig("routing.png")

Shape letters: L layers, C iterations, N experts, K experts per iteration, T tokens that are not padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Routing:
    """The choices of every router: `experts[l, t, i]` are the K experts of token i in iteration t of layer l."""

    experts: torch.Tensor  # [L, C, T, K]
    num_experts: int

    @property
    def chosen(self) -> torch.Tensor:
        """`[L, C, T, N]`, 1 where a token visits an expert."""
        return F.one_hot(self.experts, self.num_experts).sum(dim=-2).float()

    @property
    def load(self) -> torch.Tensor:
        """`[L, C, N]`: the share of an iteration's visits that each expert gets; 1 / N where the load is even."""
        return self.chosen.mean(dim=-2) / self.experts.shape[-1]

    @property
    def entropy(self) -> torch.Tensor:
        """`[L, C]`: the entropy of the load over log N; 1 for an even load, 0 if one expert does everything."""
        return torch.special.entr(self.load).sum(dim=-1) / torch.tensor(self.num_experts).log()

    @property
    def transitions(self) -> torch.Tensor:
        """`[L, C - 1, N, N]`: of the tokens that visit expert i, the share whose next iteration visits expert j.

        A row sums to K; it is 0 where no token visits i.
        """
        now, then = self.chosen[:, :-1], self.chosen[:, 1:]
        return now.transpose(-1, -2) @ then / now.sum(dim=-2).clamp(min=1)[..., None]

    @property
    def revisits(self) -> torch.Tensor:
        """`[L, C - 1]`: the share of an iteration's visits that go to an expert of the iteration before."""
        return (self.chosen[:, :-1] * self.chosen[:, 1:]).sum(dim=-1).mean(dim=-1) / self.experts.shape[-1]


@torch.no_grad()
def record_routing(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
) -> Routing:
    """The routing of `input_ids` `[B, S]` by a CoE model in evaluation mode; padding is left out."""
    if model.training:
        raise ValueError("The model is in training mode, where routers may be jittered; call `model.eval()` first.")
    config = model.config
    logits = model(input_ids, attention_mask=attention_mask, output_router_logits=True, **kwargs).router_logits
    experts = torch.stack([layer.topk(config.num_experts_per_tok, dim=-1).indices for layer in logits])
    if attention_mask is not None:
        experts = experts[:, attention_mask.flatten().bool()]
    experts = experts.unflatten(0, (config.num_hidden_layers, config.num_iterations))
    return Routing(experts.cpu(), config.num_local_experts)


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

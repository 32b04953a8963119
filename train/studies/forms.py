# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Forms of the block that are not in the model, for tables to try: `form: normalised_router` in a row.

python train/studies/forms.py normalised_router --config configuration/pretrain/smoke.yaml
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from modeling_coe.configuration_coe import CoEConfig
from modeling_coe.experts_coe import router_linear
from modeling_coe.modeling_coe import CoETopKRouter
from modeling_coe.train import pretrain


def normalised_router():
    """Logits are cosines of input and weights, times a scale that each router learns (UniPool, arXiv 2605.06665)."""
    build = CoETopKRouter.__init__

    def build_with_scale(router: CoETopKRouter, config: CoEConfig):
        build(router, config)
        # Logits of unit variance to begin with: the cosine of random directions has a variance of 1 / H.
        router.logit_scale = nn.Parameter(torch.full((len(router.weight),), config.hidden_size**0.5))

    def logits(router: CoETopKRouter, hidden_states: torch.Tensor, iteration: int) -> torch.Tensor:
        number = iteration % len(router.weight)
        cosines = router_linear(F.normalize(hidden_states, dim=-1), F.normalize(router.weight[number], dim=-1))
        return router.logit_scale[number] * cosines

    CoETopKRouter.__init__, CoETopKRouter.logits = build_with_scale, logits


FORMS = {"normalised_router": normalised_router}


if __name__ == "__main__":
    FORMS[sys.argv[1]]()
    pretrain.main(sys.argv[2:])

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Experts that several layers share may learn at a rate of their own, and routers' biases move at theirs."""

from torch.optim import Optimizer
from transformers import Trainer

from modeling_coe.balancing import RouterBiasCallback, calibrate_expert_budget


POOL = ".mlp.experts."


class PoolRate:
    """For a `Trainer` subclass, in front of it: shared pools learn at `pool_learning_rate_factor` times the rate.

    Expert Tying (arXiv 2606.16825) divides their rate by the root of the number of layers, under Muon. Under AdamW,
    whose steps do not grow with the gradient, undivided rates were no worse here: hence the default of 1.

    Raises:
        ValueError: a factor other than 1 for a model in which no layers share experts.
    """

    def create_optimizer(self, *args, **kwargs):
        factor = self.args.pool_learning_rate_factor
        model = self.accelerator.unwrap_model(self.model)
        if factor != 1 and model.config.layers_per_pool == 1:
            raise ValueError(
                f"`pool_learning_rate_factor={factor}` is for experts that several layers share, and this model has "
                "`layers_per_pool=1`; leave it out."
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        if factor != 1:
            pool = {parameter for name, parameter in self.model.named_parameters() if POOL in name}
            give_rate(optimizer, pool, factor)
        return optimizer


def give_rate(optimizer: Optimizer, parameters: set, factor: float):
    """Move `parameters` to groups whose learning rate is `factor` times that of the group they were in."""
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in parameters]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in parameters]
            optimizer.add_param_group(group | {"params": moved, "lr": factor * group["lr"]})


def balancing(config, rate: float) -> list[RouterBiasCallback]:
    """What moves the routers' biases in training, if the model has them."""
    return [RouterBiasCallback(rate)] if getattr(config, "router_bias", False) and rate > 0 else []


def calibrate(trainer: Trainer, batches: int = 4):
    """Make `set_expert_budget` work on a trained model with null experts, by its first training batches."""
    if getattr(trainer.model.config, "num_null_experts", 0) > 0:
        rows = zip(range(batches), trainer.get_eval_dataloader(trainer.train_dataset), strict=False)
        calibrate_expert_budget(trainer.model, [trainer._prepare_inputs(batch) for _, batch in rows])

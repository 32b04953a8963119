# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""LoRA for the whole chain: attention, the fused experts and the routers, and a count of what really learns."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from .configuration_coe import CoEConfig
from .modeling_coe import (
    CoEForCausalLM,
    CoEForQuestionAnswering,
    CoEForSequenceClassification,
    CoEForTokenClassification,
)


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARED_EXPERT = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTERS = ("full", "lora", "none")
# By its task PEFT knows which head is new, trains it and saves it.
TASKS = {
    CoEForCausalLM: "CAUSAL_LM",
    CoEForSequenceClassification: "SEQ_CLS",
    CoEForTokenClassification: "TOKEN_CLS",
    CoEForQuestionAnswering: "QUESTION_ANS",
}
COMPONENTS = {"self_attn": "attention", "experts": "experts", "shared_expert": "shared_expert", "gate": "router"}


def lora_config(
    model: nn.Module, experts: bool = True, router: str = "full", r: int = 8, lora_alpha: int | None = None, **kwargs
) -> LoraConfig:
    """A `peft.LoraConfig` for attention, the experts and the routers of a CoE model.

    The fused experts are parameters and no `nn.Linear`, so PEFT leaves them alone unless `target_parameters` names
    them; `LoraConfig(target_modules="all-linear")` adapts attention and the shared expert only.

    Args:
        model: a CoE model of any head; its configuration decides what there is to adapt.
        experts: adapt the routed and the shared experts.
        router: `"full"` trains the routers themselves (C * N * H parameters a layer), `"lora"` a rank-r update of
            each, `"none"` freezes them.
        r: rank; an expert pool has `r * N * (2 * H + 3 * I)` parameters a layer.
        lora_alpha: the update is scaled by `lora_alpha / r`; `2 * r` by default.
        kwargs: any other field of `LoraConfig`; adapted parameters know neither `lora_dropout` nor `use_dora`.
            `target_modules`, `target_parameters` and `modules_to_save` are lists, added to those above.

    Raises:
        ValueError: not a CoE model, an unknown `router`, or a text where a list is added to.
    """
    from peft import LoraConfig

    config = model.config
    if not isinstance(config, CoEConfig):
        raise ValueError(f"`model` has a {type(config).__name__}; `lora_config` adapts CoE models only.")
    if router not in ROUTERS:
        raise ValueError(f"`router={router!r}` must be one of {ROUTERS}.")
    modules, parameters = list(ATTENTION), []
    if experts:
        parameters += EXPERTS
        modules += SHARED_EXPERT if config.num_shared_experts else ()
    if router == "lora":
        parameters += ["mlp.gate.weight"]
    options = {
        "r": r,
        "lora_alpha": 2 * r if lora_alpha is None else lora_alpha,
        "target_modules": modules,
        "target_parameters": parameters,
        "modules_to_save": ["mlp.gate"] if router == "full" else [],
        "task_type": next((task for head, task in TASKS.items() if isinstance(model, head)), None),
    }
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        more = kwargs.pop(name, None) or []
        if isinstance(more, str):
            raise ValueError(f"`{name}={more!r}` is added to {options[name]}; give a list of names.")
        options[name] = [*options[name], *more] or None
    return LoraConfig(**(options | kwargs))


def count_adapted(model: PeftModel) -> dict[str, int]:
    """Trainable parameters by component: attention, experts, shared_expert, router, and other for the rest.

    Raises:
        ValueError: nothing is trainable, or a tensor named in `target_parameters` has no adapter.
    """
    counts, adapted = Counter(), set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            component = next((value for key, value in COMPONENTS.items() if key in name.split(".")), "other")
            counts[component] += parameter.numel()
            adapted.add(component)
    wanted = set(model.peft_config[model.active_adapter].target_parameters or ())
    if not counts:
        raise ValueError("No parameter of the model is trainable; load the adapter with `is_trainable=True`.")
    if wanted & set(EXPERTS) and "experts" not in adapted:
        raise ValueError(f"`target_parameters={sorted(wanted)}` names the experts, but none has an adapter.")
    return dict(counts)


__all__ = ["count_adapted", "lora_config"]

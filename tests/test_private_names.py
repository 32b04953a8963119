# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Every private name of another library that the package uses, in one place: an update that loses one says so here."""

import ast
import pkgutil
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# Where it comes from; what is set on an instance is named with the class, and found in its source.
NAMES = {
    "_C": "torch:_C",
    "_are_functorch_transforms_active": "torch:_C._are_functorch_transforms_active",
    "_functorch": "torch:_C._functorch.is_legacy_batchedtensor",
    "_weight_int8pack_mm": "torch:_weight_int8pack_mm",
    "_weight_int4pack_mm_for_cpu": "torch:ops.aten._weight_int4pack_mm_for_cpu",
    "_convert_weight_to_int4pack_for_cpu": "torch:ops.aten._convert_weight_to_int4pack_for_cpu",
    "_to_copy": "torch:ops.aten._to_copy",
    "_make_wrapper_subclass": "torch:Tensor._make_wrapper_subclass",
    "_buffers": "torch.nn:Module.named_buffers",
    "_parameters": "torch.nn:Module.named_parameters",
    "_ddp_params_and_buffers_to_ignore": "torch.nn.parallel:DistributedDataParallel.__init__",
    "_load_from_state_dict": "torch.nn:Module._load_from_state_dict",
    "_apply": "torch.nn:Module._apply",
    "_apply_gate": "transformers.integrations.moe:_default_apply_gate",
    "_is_expert_parallel": "transformers.integrations.moe:use_experts_implementation",
    "_attn_implementation": "transformers:PreTrainedConfig._attn_implementation",
    "_init_weights": "transformers:PreTrainedModel._init_weights",
    "_grouped_mm_can_dispatch": "transformers:PreTrainedModel._grouped_mm_can_dispatch",
    "_resolve_parallel_plans": "transformers:PreTrainedModel._resolve_parallel_plans",
    "_weight_conversions": "transformers:PreTrainedModel.save_pretrained",
    "_prepare_inputs": "transformers:Trainer._prepare_inputs",
    "_save_checkpoint": "transformers:Trainer._save_checkpoint",
    "_save_optimizer_and_scheduler": "transformers:Trainer._save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler": "transformers:Trainer._load_optimizer_and_scheduler",
    "_load_from_checkpoint": "transformers:Trainer._load_from_checkpoint",
    "_issue_warnings_after_load": "transformers:Trainer._issue_warnings_after_load",
    "_VALID_DICT_FIELDS": "transformers:TrainingArguments._VALID_DICT_FIELDS",
    "_get_formatter": "argparse:ArgumentParser._get_formatter",
    "_actions": "argparse:ArgumentParser.add_argument",
    "_replace": "collections:namedtuple",
    "_set_vocab_gpt2": "modeling_coe.train.to_gguf:main",  # of llama.cpp's converter, which is no package
    "_get_output_dir": "transformers:Trainer._get_output_dir",
}


def private_names_in_use() -> set[str]:
    """Attributes that begin with one underscore and that the package does not define itself."""
    used, own = set(), set()
    for path in (*ROOT.glob("modeling_coe/*.py"), *ROOT.glob("train/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                is_own = isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) == "self"
                (own if is_own else used).add(node.attr)
            elif isinstance(node, ast.FunctionDef) and not calls_super(node):
                own.add(node.name)
    return {name for name in used - own if name.startswith("_") and not name.startswith("__")}


def calls_super(function: ast.FunctionDef) -> bool:
    """Whether a method extends the one of the same name in the library's class."""
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == function.name)
    return any(isinstance(call.value, ast.Call) and getattr(call.value.func, "id", "") == "super" for call in calls)


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_that_the_package_uses_exists(name):
    try:
        pkgutil.resolve_name(NAMES[name])
    except AttributeError as error:
        raise AssertionError(f"{NAMES[name]}, which `{name}` needs, is gone from this version: {error}") from error


def test_no_private_name_is_used_that_is_not_listed():
    assert private_names_in_use() <= set(NAMES)
    assert set(NAMES) <= private_names_in_use()

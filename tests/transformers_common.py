# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""transformers' own common tests of models and configurations, for CoE and for Mixtral: `make test-transformers`.

python tests/transformers_common.py .cache/transformers-5.23.0 [name of a test ...]

They come from the source distribution of the transformers that is installed. It leaves out three files that they
import: the tests of generation and of exporting, and a table of configuration values. Those are empty here.
"""

import importlib
import os
import sys
import types
import unittest
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")  # which two tests read

import torch
import transformers
from transformers.models.auto import modeling_auto

import modeling_coe


# Tests that fail, or are skipped where Mixtral's are not, although nothing is wrong, and why.
FUSED = "CoE's experts are fused on disk too: there is no conversion to test."
EXPECTED = {
    "test_can_load_from_already_mapped_keys": FUSED,
    "test_reverse_loading_mapping": FUSED,
    "test_model_weights_reload_no_missing_tied_weights": "The test takes every tensor out of a checkpoint and loads "
    "it; CoE refuses what its configuration announces and the file lacks, and names it (test_checkpoint.py).",
    "test_moe_models_record_router_logits": "CoE's layers return the router logits; no hook has to record them. Hooks "
    "break a compiled graph and reentrant checkpointing. test_output_router_logits_from_config passes.",
}
# By these tables the suite knows which labels a class wants.
TABLES = {
    "Model": "MODEL_MAPPING_NAMES",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "ForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "ForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def import_suite(folder: Path) -> tuple[type, type]:
    """The test classes of an unpacked source distribution, as a package of another name than `tests`."""
    if f"-{transformers.__version__}" not in folder.name:
        raise ValueError(f"`{folder}` is not transformers {transformers.__version__}, which is installed.")
    suite = types.ModuleType("suite")
    suite.__path__ = [str(folder / "tests")]
    missing = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": {}},
    }
    for name, contents in missing.items():
        module = sys.modules[f"suite.{name}"] = types.ModuleType(f"suite.{name}")
        sys.modules.setdefault(f"suite.{name.split('.')[0]}", types.ModuleType(name.split(".")[0]))
        vars(module).update(contents)
    sys.modules["suite"] = suite
    transformers.utils.direct_transformers_import = lambda path: transformers  # it looks for a repository
    return tuple(importlib.import_module(f"suite.test_{kind}_common") for kind in ("modeling", "configuration"))


class ModelTester:
    """What the suite asks of a model's tester: a small configuration and inputs."""

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers = SIZES["hidden_size"], SIZES["num_hidden_layers"]
    num_attention_heads = SIZES["num_attention_heads"]

    def __init__(self, parent: unittest.TestCase, config_class: type, options: dict):
        self.parent, self.config_class, self.options = parent, config_class, options
        self.base_model_class = parent.all_model_classes[0]

    def get_config(self):
        return self.config_class(**SIZES, **self.options)

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(3, SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def test_case(name: str, module: types.ModuleType, prefix: str, suites: tuple, **options) -> type:
    """A test class of the suite for the models of `module` whose names start with `prefix`."""
    modeling, configuration = suites
    classes = tuple(getattr(module, prefix + head) for head in HEADS)
    config_class = getattr(module, f"{prefix}Config")

    def set_up(self):
        self.model_tester = ModelTester(self, config_class, options)
        self.config_tester = configuration.ConfigTester(self, config_class=config_class, hidden_size=32)

    methods = {
        "all_model_classes": classes,
        "setUp": set_up,
        "test_config": lambda self: self.config_tester.run_common_tests(),
    }
    bases = (modeling.ModelTesterMixin, modeling.GenerationTesterMixin, unittest.TestCase)
    return type(name, bases, methods)


def run(case: type, names: list[str]) -> dict[str, str]:
    """Each test's outcome: "passed", "skipped: reason" or "failed: last line of the traceback"."""
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    tests = [test for test in tests if not names or test._testMethodName in names]
    result = unittest.TextTestRunner(verbosity=1).run(unittest.TestSuite(tests))
    outcomes = {test._testMethodName: "passed" for test in tests}
    for test, trace in (*result.failures, *result.errors):
        outcomes[str(test).split()[0]] = "failed: " + trace.strip().splitlines()[-1][:200]
    for test, reason in result.skipped:
        if not outcomes[str(test).split()[0]].startswith("failed"):
            outcomes[str(test).split()[0]] = "skipped: " + reason
    return outcomes


def main(folder: str, *names: str) -> int:
    for head, table in TABLES.items():
        getattr(modeling_auto, table)["coe"] = f"CoE{head}"
    suites = import_suite(Path(folder))
    # With `silu`, the default of both, CoE's own experts are at work; the suite's own testers have `gelu`.
    coe = run(test_case("CoETest", modeling_coe, "CoE", suites), list(names))
    pools = run(test_case("CoEPoolTest", modeling_coe, "CoE", suites, layers_per_pool=2), list(names))
    mixtral = run(test_case("MixtralTest", transformers, "Mixtral", suites), list(names))
    bad = 0
    for test, outcome in coe.items():
        for label, got in {"CoE": outcome, "CoE, one pool for two layers": pools[test]}.items():
            same_skip = got.startswith("skipped") and mixtral[test].startswith("skipped")
            if got != "passed" and not same_skip:
                reason = EXPECTED.get(test)
                bad += reason is None
                print(f"{label}: {test}: {got}\n    Mixtral: {mixtral[test]}\n    {reason or 'NOT EXPECTED'}")
    for label, outcomes in {"CoE": coe, "CoE, one pool for two layers": pools, "Mixtral": mixtral}.items():
        counts = [sum(o.startswith(kind) for o in outcomes.values()) for kind in ("passed", "skipped", "failed")]
        print(f"{label}: {counts[0]} passed, {counts[1]} skipped, {counts[2]} failed")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

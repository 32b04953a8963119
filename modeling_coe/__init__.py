# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Chain-of-Experts for HuggingFace Transformers. Importing the package registers CoE with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_peft_available

from .adapters import count_adapted, lora_config
from .configuration_coe import CoEConfig
from .modeling_coe import (
    CoEForCausalLM,
    CoEForQuestionAnswering,
    CoEForSequenceClassification,
    CoEForTokenClassification,
    CoEModel,
    CoEPreTrainedModel,
)
from .quantization import QuantizedExpertsConfig, quantized_share
from .upcycling import downcycle, upcycle


__version__ = "0.1.0"

AutoConfig.register("coe", CoEConfig)
CoEConfig.register_for_auto_class()
for auto_class, model_class in {
    AutoModel: CoEModel,
    AutoModelForCausalLM: CoEForCausalLM,
    AutoModelForSequenceClassification: CoEForSequenceClassification,
    AutoModelForTokenClassification: CoEForTokenClassification,
    AutoModelForQuestionAnswering: CoEForQuestionAnswering,
}.items():
    auto_class.register(CoEConfig, model_class)
    # `save_pretrained` then writes the Python files beside the weights.
    model_class.register_for_auto_class(auto_class.__name__)
# By this table Trainer knows that label smoothing has to shift the labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["coe"] = "CoEForCausalLM"
if is_peft_available():
    from peft.utils import constants

    # Each of PEFT's tuners, configured without targets, adapts what it adapts in Mixtral, or else in Llama. The
    # feed-forward modules of both have no counterpart in CoE: its experts are parameters.
    EXISTING = {"q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm", "post_attention_layernorm", "norm"}
    for table_name, table in vars(constants).items():
        if table_name.endswith("_MODULES_MAPPING"):
            table["coe"] = [name for name in table.get("mixtral", table.get("llama", ())) if name in EXISTING]


def register_with_vllm():
    """vLLM's plugin, named in pyproject.toml: CoE runs on vLLM's transformers backend, without remote code.

    vLLM 0.32 leaves the block as it is and replaces the experts alone, which it calls once per iteration.
    """
    from vllm import ModelRegistry

    backend = "vllm.model_executor.models.transformers:TransformersMoEForCausalLM"
    ModelRegistry.register_model("CoEForCausalLM", backend)


__all__ = [
    "CoEConfig",
    "CoEForCausalLM",
    "CoEForQuestionAnswering",
    "CoEForSequenceClassification",
    "CoEForTokenClassification",
    "CoEModel",
    "CoEPreTrainedModel",
    "QuantizedExpertsConfig",
    "count_adapted",
    "downcycle",
    "lora_config",
    "quantized_share",
    "register_with_vllm",
    "upcycle",
]

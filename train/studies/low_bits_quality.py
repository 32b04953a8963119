# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What 8 and 4 bits cost: validation loss and problems solved of trained checkpoints, and errors along the chain.

    python train/studies/low_bits_quality.py --models runs/c1 runs/c2 --output low_bits_quality.json

Round to nearest, without calibration. The errors are those of the states that enter each visit of the experts, layer
by layer and iteration by iteration: the norm of the difference from the full model's over the norm of that model's.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_coe import QuantizedExpertsConfig
from modeling_coe.train.arguments import DataArguments
from modeling_coe.train.data import as_problems, load_documents, losses, solve
from modeling_coe.train.report import environment
from modeling_coe.train.runs import write_json


VARIANTS = {
    "full": None,
    "bf16": None,
    "int8": {"bits": 8},
    "int4, groups of 32": {"bits": 4},
    "int4, rest int8": {"bits": 4, "rest_bits": 8},
}


@torch.inference_mode()
def states(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """What enters the experts, visit by visit, and the last hidden state."""
    entered = []

    def remember(module, arguments):
        entered.append(arguments[0].float())

    hooks = [layer.mlp.experts.register_forward_pre_hook(remember) for layer in model.model.layers]
    output = model.model(ids).last_hidden_state.float()
    for hook in hooks:
        hook.remove()
    return [*entered, output]


def measure(path: str, problems: int) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(path)
    documents = load_documents(DataArguments(train_problems=20000, validation_problems=200))["validation"]
    ids = tokenizer(as_problems(documents, 16)["prompt"][:], return_tensors="pt", padding=True).input_ids
    rows, exact = {}, None
    for name, options in VARIANTS.items():
        config = {"quantization_config": QuantizedExpertsConfig(**options)} if options else {}
        dtype = "bfloat16" if name == "bf16" else "float32"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **config).eval()
        entered = states(model, ids)
        exact = exact or entered
        answers = solve(model, tokenizer, as_problems(documents, problems), 50, 40)
        rows[name] = {
            "validation_loss": round(losses(model, tokenizer, documents, 50)["validation_loss"], 5),
            "share_solved": sum(answer["solved"] for answer in answers) / len(answers),
            "errors": [round(((a - b).norm() / b.norm()).item(), 5) for a, b in zip(entered, exact, strict=True)],
        }
        rows[name]["change"] = round(rows[name]["validation_loss"] - rows["full"]["validation_loss"], 5)
        print(path, name, json.dumps(rows[name]), flush=True)
    shape = ("num_iterations", "num_experts_per_tok", "num_local_experts", "num_hidden_layers", "hidden_size")
    return {"model": {name: getattr(model.config, name) for name in shape}, "problems": len(answers), "results": rows}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of trained chains, on word problems")
    parser.add_argument("--problems", type=int, default=100, help="answered by each")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {Path(path).name: measure(path, options.problems) for path in options.models}
    if options.output:
        write_json(options.output, {"machine": environment(torch.device("cpu")), "models": results})


if __name__ == "__main__":
    main()

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Score a checkpoint or an adapter: validation loss, share of problems solved, and lm_eval tasks, into facts.json:

    coe-eval --model runs/finetune_lora --dataset path/or/hub-id --scored_problems 100
    coe-eval --model runs/smoke --tasks my_task --task_folder path/to/yaml --output_dir runs/smoke/eval

The loss is per token of whole documents (`validation_loss`, as pretraining reports it) and, where there are questions,
of the answers alone (`answer_loss`, as fine-tuning does); answers are generated greedily, in batches. Tasks need
`pip install lm_eval`; a folder of local YAML tasks works offline.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import modeling_coe  # noqa: F401, registers CoE with the Auto classes
from modeling_coe.train.arguments import (
    CheckpointArguments,
    DataArguments,
    command_line,
    parse,
    require_least,
    require_weights,
)
from modeling_coe.train.data import (
    load_documents,
    load_tokenizer,
    score,
    short_enough,
    turn_dial,
    with_final_answer,
)
from modeling_coe.train.report import environment, keep_output_short
from modeling_coe.train.runs import result_folder, write_json


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass
class EvaluationArguments:
    """What to score, and where to write it."""

    output_dir: str = field(default="runs/evaluation", metadata={"help": "Takes facts.json and samples.json."})
    batch_size: int = field(default=16, metadata={"help": "Documents and prompts at a time."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "lm_eval tasks, by name."})
    task_folder: str | None = field(default=None, metadata={"help": "Folder with YAML files of local lm_eval tasks."})
    task_limit: int | None = field(default=None, metadata={"help": "Score only the first examples of each task."})
    seed: int = field(default=42, metadata={"help": "Of generated or split documents; the training run's."})
    expert_budget: float | None = field(
        default=None, metadata={"help": "Experts a token and iteration, on average, of a model with null experts."}
    )

    def __post_init__(self):
        require_least(self, {"batch_size": 1, "task_limit": 1, "seed": 0})


def load(arguments: CheckpointArguments) -> PreTrainedModel:
    """The model in evaluation mode; an adapter is merged into its base model, unless it lies in the same folder."""
    # Of such a folder transformers loads both, and PEFT would apply the adapter once more.
    has_adapter, has_base = ((Path(arguments.model) / f"{name}config.json").is_file() for name in ("adapter_", ""))
    if has_adapter and not has_base:
        model = AutoPeftModelForCausalLM.from_pretrained(
            arguments.model, **arguments.load_options()
        ).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, **arguments.load_options())
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def find_tasks(arguments: EvaluationArguments) -> TaskManager | None:
    """lm_eval's tasks and those of `task_folder`; None if none is asked for.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: naming a task that is not there, and the nearest that is.
    """
    if not arguments.tasks:
        return None
    if find_spec("lm_eval") is None:
        raise ImportError(f"`tasks={arguments.tasks}` need lm_eval; `pip install lm_eval`, or leave them out.")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=arguments.task_folder)
    for name in arguments.tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" Did you mean {near[0]}?" if near else " Name its folder with `task_folder`."
            raise ValueError(f"`tasks={arguments.tasks}`: lm_eval has no task {name!r}.{hint}")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: EvaluationArguments,
    manager: TaskManager,
) -> dict:
    """lm_eval's metrics of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size),
        tasks=arguments.tasks,
        task_manager=manager,
        limit=arguments.task_limit,
        bootstrap_iters=0,
    )["results"]
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results.items()
    }


@command_line
def main(arguments: list[str] | None = None):
    model_arguments, data, evaluation = parse(
        CheckpointArguments, DataArguments, EvaluationArguments, arguments=arguments, description=__doc__
    )
    keep_output_short()
    require_weights(model_arguments.model)
    output = Path(evaluation.output_dir).expanduser()
    with result_folder(output, ("facts.json", "samples.json"), data.dataset):
        evaluate(model_arguments, data, evaluation, output)


def evaluate(model_arguments: CheckpointArguments, data: DataArguments, evaluation: EvaluationArguments, output: Path):
    """Score the model and write what came out to `output`."""
    manager = find_tasks(evaluation)
    model = load(model_arguments)
    turn_dial(model, evaluation.expert_budget)
    tokenizer = load_tokenizer(model_arguments.tokenizer or model_arguments.model, None, model.config.vocab_size)
    documents = load_documents(data, evaluation.seed, tokenizer)["validation"]
    length = min(data.sequence_length, model.config.max_position_embeddings)
    documents = short_enough(documents, "validation", tokenizer, length, data.drop_long_documents)

    scores, answers = score(
        model, tokenizer, documents, data.scored_problems, evaluation.batch_size, data.max_new_tokens
    )
    facts = {
        "model": model_arguments.model,
        "dataset": data.dataset,
        "validation_documents": len(documents),
        "expert_budget": getattr(model.config, "expert_budget", None),
        **scores,
        "perplexity": math.exp(min(scores["validation_loss"], math.log(sys.float_info.max))),
        "scored_problems": len(with_final_answer(answers)),
    }
    surroundings = environment(model.device)
    write_json(output / "facts.json", facts | surroundings)
    write_json(output / "samples.json", answers)
    if manager is not None:
        facts["tasks"] = run_tasks(model, tokenizer, evaluation, manager)
        write_json(output / "facts.json", facts | surroundings)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()

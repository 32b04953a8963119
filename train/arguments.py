# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The typed arguments of the scripts: a recipe (`--config x.yaml`) gives the values, the command line overrides them.

model, data, training = parse(ModelArguments, DataArguments, PretrainArguments)
"""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import TrlParser


@dataclass
class ModelArguments:
    """Which model, and with which tokenizer."""

    model: str = field(
        default="configuration/models/coe_tiny.json",
        metadata={"help": "A preset (config.json) to start from random weights, or a checkpoint folder or Hub id."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "A tokenizer folder or Hub id. Default: a byte-level BPE trained on the training split."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "`sdpa` (default), `eager`, `flash_attention_2`, `flex_attention`."}
    )

    def __post_init__(self):
        if not self.model:
            raise ValueError("`model` is empty; name a preset such as configuration/models/coe_tiny.json.")


@dataclass
class DataArguments:
    """Which documents, how they are laid out, and what is scored on the held-out ones."""

    dataset: str = field(
        default="word_problems",
        metadata={"help": "`word_problems` (generated), a JSON/JSONL/Parquet file or folder of them, or a Hub id."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of a plain-text dataset."})
    question_column: str = field(default="question", metadata={"help": "Column of a question-answer dataset."})
    answer_column: str = field(default="answer", metadata={"help": "Column of a question-answer dataset."})
    validation_size: int | None = field(
        default=None,
        metadata={"help": "Documents to hold out of a dataset that has neither a validation nor a test split."},
    )
    max_train_documents: int | None = field(default=None, metadata={"help": "Use only the first ones. Default: all."})
    max_validation_documents: int | None = field(default=None, metadata={"help": "Likewise, of the held-out split."})
    problem_level: int = field(default=1, metadata={"help": "Level of the generated problems, 1 (easiest) to 4."})
    train_problems: int = field(default=20_000, metadata={"help": "Generated problems to train on."})
    validation_problems: int = field(default=500, metadata={"help": "Generated problems to hold out."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens of a packed block; the longest document."})
    split_long_documents: bool = field(
        default=False, metadata={"help": "Cut documents longer than `sequence_length` instead of refusing them."}
    )
    scored_problems: int = field(
        default=200, metadata={"help": "Held-out problems answered by greedy decoding at each evaluation; 0 for none."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest generated answer."})

    def __post_init__(self):
        for name in ("sequence_length", "max_new_tokens", "train_problems", "validation_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must be at least 1.")
        for name in ("max_train_documents", "max_validation_documents", "validation_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` must be at least 1; leave it out for the default.")
        if self.scored_problems < 0:
            raise ValueError(f"`scored_problems={self.scored_problems}` must be 0 (none) or positive.")


@dataclass
class PretrainArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults of a pretraining run, checkpointed and resumed exactly."""

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Checkpoints, results and the final model."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay; not on norms."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Any scheduler of Trainer."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between points of the loss curve."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: `no`, `steps` or `epoch`."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Complete checkpoints to keep."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false: it hides a NaN loss."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The collator needs every column."})
    include_num_input_tokens_seen: str = field(default="all", metadata={"help": "The x axis of the loss curve."})

    def __post_init__(self):
        super().__post_init__()
        if self.logging_nan_inf_filter:
            raise ValueError("`logging_nan_inf_filter=True` would hide a NaN loss; leave it false.")
        if self.load_best_model_at_end:
            raise ValueError("`load_best_model_at_end=True` is not supported: pretraining keeps the last model.")
        if self.save_strategy == "steps" and self.save_steps % self.logging_steps != 0:
            raise ValueError(
                f"`save_steps={self.save_steps}` must be a multiple of `logging_steps={self.logging_steps}`, or the "
                "loss curve of a resumed run would differ from that of an uninterrupted one."
            )


def parse(*argument_classes: type, arguments: list[str] | None = None) -> tuple:
    """One instance of each class, from `--config recipe.yaml` and the command line; unknown keys fail."""
    return TrlParser(argument_classes).parse_args_and_config(arguments)

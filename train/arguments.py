# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The typed arguments of the scripts: a recipe (`--config x.yaml`) gives the values, the command line overrides them.

model, data, training = parse(ModelArguments, DataArguments, PretrainArguments)
"""

import difflib
import itertools
import json
import math
import sys
import textwrap
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields
from functools import wraps
from inspect import signature
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from accelerate.utils import gather_object
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments, get_scheduler
from transformers.distributed import DistributedConfig
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from trl import SFTConfig, TrlParser

from modeling_coe import CoEConfig
from modeling_coe.adapters import ROUTERS
from modeling_coe.budget import TrainingSetup, largest_micro_batch
from modeling_coe.folders import require_model


@dataclass
class ModelArguments:
    """Which model, and with which tokenizer."""

    model: str = field(
        default="configuration/models/coe_tiny.json",
        metadata={"help": "A checkpoint folder or Hub id; for pretraining also a preset (.json): random weights."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "A tokenizer folder or Hub id. Default: the checkpoint's; a new one (BPE) for a preset."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "`sdpa` (default), `eager`, `flash_attention_2`, `flex_attention`."}
    )
    experts_implementation: str | None = field(
        default=None, metadata={"help": "`coe` (default; keeps least for backward), `grouped_mm`, `eager`."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights: `float32`, or `bfloat16` with an optimizer that rounds stochastically."},
    )

    def __post_init__(self):
        require_model("model", find_configuration(self.model))
        if self.tokenizer is not None:
            require_model("tokenizer", self.tokenizer, "tokenizer_config.json")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"`dtype={self.dtype}` must be float32 or bfloat16.")

    @property
    def is_preset(self) -> bool:
        """Whether the model is a configuration without weights."""
        return is_preset(self.model)

    def load_options(self) -> dict[str, str]:
        """The keyword arguments of `from_config` and `from_pretrained`."""
        options = {name: getattr(self, name) for name in ("attn_implementation", "experts_implementation", "dtype")}
        return {name: value for name, value in options.items() if value is not None}


@dataclass
class CheckpointArguments(ModelArguments):
    """Which trained model, and how it is loaded."""

    model: str = field(default="runs/smoke", metadata={"help": "A checkpoint or adapter: a folder or a Hub id."})
    tokenizer: str | None = field(default=None, metadata={"help": "Another tokenizer than the checkpoint's."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: `float32` or `bfloat16`."})


def read_config(model: str) -> CoEConfig:
    """The configuration of a preset, a checkpoint or a model on the Hub.

    Raises:
        ValueError: it is not that of a Chain-of-Experts.
    """
    found = find_configuration(model)
    if (Path(found) / "adapter_config.json").is_file() and not (Path(found) / "config.json").is_file():
        raise ValueError(f"`model={model}` is an adapter; merge it into its base model first, and name the result.")
    kind = PreTrainedConfig.get_config_dict(found)[0].get("model_type")
    if kind != CoEConfig.model_type:
        what = f"a model of the type {kind!r}" if kind else "a configuration without `model_type`"
        raise ValueError(
            f"`model={model}` is {what}, not a Chain-of-Experts ('{CoEConfig.model_type}'); coe-upcycle converts "
            "checkpoints, and `coe-pretrain --help` lists presets."
        )
    return AutoConfig.from_pretrained(found)


def is_preset(model: str) -> bool:
    """A configuration's file; a run's folder may be called `x.json` too."""
    return Path(model).suffix == ".json" and not Path(model).is_dir()


def require_weights(model: str):
    """Raise where a script that starts from a checkpoint was given a preset."""
    if is_preset(model):
        raise ValueError(f"`model={model}` is a preset without weights; name a checkpoint, or pretrain it.")


def require_context(sequence_length: int, model: str, config: PreTrainedConfig):
    """Raise where the sequences are longer than those that the model has positions for."""
    if sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"`sequence_length={sequence_length}` exceeds the context of {model}, "
            f"`max_position_embeddings={config.max_position_embeddings}`; shorten it."
        )


@dataclass
class LayoutArguments:
    """How transformers' `DistributedConfig` shards the model over the processes; all 1: Accelerate decides (DDP, ...).

    Processes = dp_replicate_size * fsdp_size * tp_size. Expert parallelism uses the ranks of the others.
    """

    fsdp_size: int = field(default=1, metadata={"help": "Ranks that shard all weights and see different rows."})
    tp_size: int = field(default=1, metadata={"help": "Ranks that share every matrix and see the same rows."})
    ep_size: int = field(
        default=1,
        metadata={
            "help": "Ranks that hold different experts: a multiple of tp_size, a divisor of fsdp_size * tp_size."
        },
    )
    dp_replicate_size: int = field(default=1, metadata={"help": "Copies of such a group, one per node for instance."})

    def __post_init__(self):
        require_least(self, dict.fromkeys(vars(self), 1))

    def distributed_config(self) -> DistributedConfig | None:
        """For `from_pretrained(distributed_config=...)`; None when nothing is to be sharded."""
        sizes = vars(self)
        return None if all(size == 1 for size in sizes.values()) else DistributedConfig(**sizes)


@dataclass
class DataArguments:
    """Which documents, how they are laid out, and what is scored on those of the validation split."""

    dataset: str = field(
        default="word_problems",
        metadata={"help": "`word_problems` (generated), a JSON/JSONL/Parquet file or folder of them, or a Hub id."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    text_column: str | None = field(default=None, metadata={"help": "Column of plain texts. Default: `text`."})
    question_column: str | None = field(default=None, metadata={"help": "Column of questions. Default: `question`."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of answers. Default: `answer`."})
    validation_size: int | None = field(
        default=None,
        metadata={"help": "Documents to validate on, of a dataset that has neither a validation nor a test split."},
    )
    max_train_documents: int | None = field(default=None, metadata={"help": "Use only the first ones. Default: all."})
    max_validation_documents: int | None = field(default=None, metadata={"help": "Likewise, of the validation split."})
    problem_level: int = field(default=1, metadata={"help": "Level of the generated problems, 1 (easiest) to 4."})
    train_problems: int = field(default=20_000, metadata={"help": "Generated problems to train on."})
    validation_problems: int = field(default=500, metadata={"help": "Generated problems to validate on."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens of a packed block; the longest document."})
    split_long_documents: bool = field(
        default=False, metadata={"help": "Cut documents longer than `sequence_length` instead of refusing them."}
    )
    drop_long_documents: bool = field(
        default=False, metadata={"help": "Fine-tuning: leave out longer documents instead of refusing them."}
    )
    scored_problems: int = field(
        default=200,
        metadata={"help": "Validation problems answered by greedy decoding at each evaluation; 0 for none."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest generated answer."})

    def __post_init__(self):
        names = "sequence_length max_new_tokens train_problems validation_problems max_train_documents".split()
        require_least(self, dict.fromkeys([*names, "max_validation_documents", "validation_size"], 1))
        require_least(self, {"scored_problems": 0})


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
    report_to: None | str | list[str] = field(  # noqa: RUF036, the parser wants None first
        default="tensorboard", metadata={"help": "`tensorboard`, `wandb`, `trackio`, several of them, or `none`."}
    )
    skip_logits: bool = field(
        default=False,
        metadata={"help": "Compute the same training loss in less memory, without the full logits."},
    )
    draw_by_name: bool = field(
        default=False,
        metadata={
            "help": "From a preset, equal modules of different models start with equal weights, for comparisons."
        },
    )
    pool_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "Times the learning rate, for experts that several layers share."}
    )
    router_bias_rate: float = field(
        default=1e-3,
        metadata={"help": "How far the routers' balancing biases move in a step, in models that have them; 0: not."},
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The collator needs every column."})
    include_num_input_tokens_seen: str = field(default="all", metadata={"help": "The x axis of the loss curve."})

    def __post_init__(self):
        check_values(self)
        for name in ("prediction_loss_only", "label_names"):
            if value := getattr(self, name):
                raise ValueError(f"`{name}={value}` would leave no validation loss of every token. Leave it out.")
        super().__post_init__()
        check_schedule(self)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        check_pool_rate(self.pool_learning_rate_factor)
        require_least(self, {"router_bias_rate": 0})
        check_curve(self)


@dataclass
class FinetuneArguments(SFTConfig):
    """`trl.SFTConfig` with the defaults of a fine-tuning run; `sequence_length` is its `max_length`."""

    output_dir: str = field(default="runs/finetune", metadata={"help": "Checkpoints, results and the final model."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Any scheduler of Trainer."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: `no`, `steps` or `epoch`."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Complete checkpoints to keep."})
    # None is off, as False is, and no use of a name that transformers 5.23 deprecates.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Keep a layer's input only; recompute."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Autocast to bf16, which CPUs compute slowly."})
    max_length: int | None = field(default=None, metadata={"help": "Not here: set `sequence_length`."})
    dataset_text_field: str | None = field(default=None, metadata={"help": "Not here: set `text_column`."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false: it hides a NaN loss."})
    pool_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "Times the learning rate, for experts that several layers share."}
    )
    router_bias_rate: float = field(
        default=1e-3,
        metadata={"help": "How far the routers' balancing biases move in a step without LoRA; 0: not."},
    )
    include_num_input_tokens_seen: str = field(default="non_padding", metadata={"help": "The curve's x axis."})
    report_to: None | str | list[str] = field(  # noqa: RUF036, the parser wants None first
        default="tensorboard", metadata={"help": "`tensorboard`, `wandb`, `trackio`, several of them, or `none`."}
    )

    def __post_init__(self):
        for name, ours in {"max_length": "sequence_length", "dataset_text_field": "text_column"}.items():
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}={getattr(self, name)}` is TRL's name; set `{ours}` instead.")
        for name, remedy in {
            "chat_template_path": "save a tokenizer with that chat template, and name it with `tokenizer`",
            "model_init_kwargs": "set `dtype` itself, or save the model with another configuration",
        }.items():
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}={getattr(self, name)}` would have no effect here: {remedy}.")
        self.dataset_text_field = "text"
        check_values(self)
        super().__post_init__()
        check_schedule(self)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        check_pool_rate(self.pool_learning_rate_factor)
        require_least(self, {"router_bias_rate": 0})


# A run that is resumed exactly, and a folder whose content is known, have no room for these options of Trainer.
REFUSED = {
    "logging_nan_inf_filter": "it would hide a NaN loss",
    "load_best_model_at_end": "a run keeps its last model",
    "save_only_model": "a run that was killed could not continue as if nothing had happened",
    "ignore_data_skip": "a resumed run would see the first documents again",
    "push_to_hub": "coe-publish uploads a finished run",
    "batch_eval_metrics": "the validation loss is computed over all batches at once",
}
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "save_total_limit": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "label_smoothing_factor": 0,
    "warmup_steps": 0,
    "num_train_epochs": 0,
    "seed": 0,
    "data_seed": 0,
    "eval_accumulation_steps": 1,
}


def check_values(training: TrainingArguments):
    """Refuse by name what Trainer ignores, fails on from inside, or trains wrongly with."""
    for name, reason in REFUSED.items():
        if getattr(training, name):
            raise ValueError(f"`{name}=True` is not supported: {reason}. Leave it out.")
    require_least(training, LEAST)
    if (seen := training.include_num_input_tokens_seen) in (False, "no"):
        raise ValueError(
            f"`include_num_input_tokens_seen={seen}`: the loss curve counts them; take `all` or `non_padding`."
        )
    if training.max_steps == 0 or training.max_steps < -1:
        raise ValueError(f"`max_steps={training.max_steps}` must be at least 1; leave it out to train whole epochs.")
    if training.max_steps == -1 and training.num_train_epochs == 0:
        raise ValueError("`num_train_epochs=0` trains nothing; raise it, or set `max_steps`.")
    for name in training._VALID_DICT_FIELDS:
        if isinstance(text := getattr(training, name), str) and text.startswith("{"):
            try:
                json.loads(text)
            except ValueError as error:
                raise ValueError(f'`{name}={text}` is no JSON: {error}. Quote keys and texts with ".') from error


def check_schedule(training: TrainingArguments):
    """Build the learning rate's schedule once, for an optimizer of nothing, to see that its arguments fit it."""
    steps, options = max(training.max_steps, 1), training.lr_scheduler_kwargs or {}
    try:
        # Some schedules drop what they do not know.
        signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(training.lr_scheduler_type)]).bind_partial(**options)
        get_scheduler(
            training.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate),
            num_warmup_steps=training.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_kwargs={training.lr_scheduler_kwargs}` do not fit `lr_scheduler_type="
            f"{training.lr_scheduler_type}`: {error}."
        ) from error


def check_curve(training: TrainingArguments):
    """Refuse checkpoints between two points of the loss curve; Trainer rounds shares of the steps up."""
    if training.save_strategy != "steps" or training.logging_strategy != "steps":
        return
    steps, saving, logging = training.max_steps, training.save_steps, training.logging_steps
    rounded = ""
    if steps > 0 and (saving < 1 or logging < 1):
        saving, logging = (math.ceil(steps * number) if number < 1 else number for number in (saving, logging))
        rounded = f" ({saving} and {logging} of {steps} steps)"
    is_mixed = (0 < saving < 1) != (logging < 1)
    if is_mixed or not math.isclose(saving / logging, round(saving / logging)):
        raise ValueError(
            f"`save_steps={training.save_steps}` must be a multiple of `logging_steps={training.logging_steps}`"
            f"{rounded}, or the loss curve of a resumed run would differ from that of an uninterrupted one."
        )


def require_least(arguments, least: dict[str, float]):
    """Raise for the first value, if there is one, that is below its least one, or not finite."""
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and not smallest <= value < math.inf:
            raise ValueError(f"`{name}={value}` must be at least {smallest}, and finite.")


def check_pool_rate(factor: float):
    """
    Raises:
        ValueError: a factor of the learning rate that is not a finite number above 0.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"`pool_learning_rate_factor={factor}` must be a finite number above 0.")


@dataclass
class LoraArguments:
    """Train adapters in place of the weights."""

    lora: bool = field(default=False, metadata={"help": "LoRA; otherwise all weights are trained."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the updates."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scales them by alpha / r. Default: 2 r."})
    lora_experts: bool = field(default=True, metadata={"help": "Adapt the experts, not attention alone."})
    lora_router: str = field(default="full", metadata={"help": "`full`, `lora` or `none`."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the frozen experts in 4 bits."})

    def __post_init__(self):
        if not self.lora:
            for option in fields(self):
                if (value := getattr(self, option.name)) != option.default:
                    raise ValueError(f"`{option.name}={value}` has a meaning for LoRA alone; set `lora=true` with it.")
        require_least(self, {"lora_r": 1, "lora_alpha": 1})
        if self.lora_router not in ROUTERS:
            raise ValueError(f"`lora_router={self.lora_router}` must be one of {ROUTERS}.")


# What `modeling_coe.budget` calls the optimizers of Trainer, and whether their states leave the device.
TRAINER_OPTIMIZERS = {
    "adamw_torch": ("adamw", False),
    "adamw_torch_fused": ("adamw", False),
    "adamw_torch_8bit": ("adamw_8bit", False),
    "adamw_torch_4bit": ("adamw_4bit", False),
    "adamw_bnb_8bit": ("adamw_8bit", False),
    "paged_adamw_32bit": ("adamw", True),
    "paged_adamw_8bit": ("adamw_8bit", True),
}


def training_setup(model: ModelArguments, training: TrainingArguments, sequence_length: int) -> TrainingSetup:
    """The recipe as `modeling_coe.budget` predicts its memory.

    Raises:
        ValueError: an optimizer whose memory is not known.
    """
    if training.optim not in TRAINER_OPTIMIZERS:
        raise ValueError(
            f"The memory of `optim={training.optim}` is not known, only that of {tuple(TRAINER_OPTIMIZERS)}."
        )
    optimizer, offload = TRAINER_OPTIMIZERS[training.optim]
    return TrainingSetup(
        batch_size=training.per_device_train_batch_size,
        sequence_length=sequence_length,
        packed=True,
        dtype=model.dtype,
        autocast=training.bf16 and model.dtype == "float32",
        optimizer=optimizer,
        offload_optimizer=offload,
        gradient_checkpointing=training.gradient_checkpointing,
        skip_logits=training.skip_logits,
        experts_implementation=model.experts_implementation or "coe",
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a training run may take on each rank's `device`: what is free, less half a GiB for kernels and
    fragments, on the one with the least, so that all ranks fit the same micro-batch.

    Raises:
        ValueError: not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"`auto_find_batch_size=true` fits CUDA GPUs, this is {device}; choose the batch yourself.")
    return min(gather_object([torch.cuda.mem_get_info(device)[0]])) - 2**29


def fit_micro_batch(
    training: TrainingArguments, config: CoEConfig, setup: TrainingSetup, memory: int
) -> TrainingArguments:
    """`auto_find_batch_size` with the tokens of a step kept: the largest micro-batch predicted to fit `memory` bytes.

    Where Trainer halves the batch and trains on fewer tokens a step, accumulation makes up for it here.

    Raises:
        ValueError: not one sequence fits.
    """
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    largest = largest_micro_batch(config, setup, memory)
    if largest == 0:
        raise ValueError(
            f"Not one sequence of {setup.sequence_length} tokens fits {memory / 2**30:.1f} GiB; "
            "`coe-plan` tells what to change."
        )
    size = max(divisor for divisor in range(1, min(largest, rows) + 1) if rows % divisor == 0)
    fitted = copy(training)
    fitted.per_device_train_batch_size, fitted.gradient_accumulation_steps = size, rows // size
    fitted.auto_find_batch_size = False
    return fitted


def command_line(main: Callable) -> Callable:
    """For the `main` of a script: what a user can mend ends in a message, not in a traceback.

    Called with a list of arguments, as tests and other programs do, `main` raises as ever.
    """

    @wraps(main)
    def run(arguments: list[str] | None = None):
        if arguments is not None or sys.flags.dev_mode:
            return main(arguments)
        try:
            return main()
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            sys.exit(f"error: {error}\n(PYTHONDEVMODE=1 in the environment shows the traceback.)")
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            sys.exit(130)

    return run


class RawHelp(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every option."""


class Parser(TrlParser):
    """TRL's parser, which raises where argparse prints several hundred options and exits.

    Its help lists the options that a class defines itself under the class's first line. What a class inherits, such
    as the options of `TrainingArguments`, comes last, and with `--help-all` only.
    """

    def error(self, message: str):
        raise ValueError(f"{message[:1].upper()}{message[1:]}. `--help` lists the options.")

    def format_help(self) -> str:
        sections = {"Help and recipe": ["help", "help_all", "config"]}
        sections |= {one.__doc__.partition("\n")[0]: list(one.__annotations__) for one in self.dataclass_types}
        own = set(itertools.chain(*sections.values()))
        inherited = [name for one in self.dataclass_types for name in one.__dataclass_fields__ if name not in own]
        if self.shows_all:
            sections["Inherited from transformers and TRL"] = inherited
        for action in self._actions:
            # One spelling of the two that are understood, and no `(default: None)`.
            action.option_strings = action.option_strings[-1:] if action.dest == "help" else action.option_strings[:1]
            action.metavar = None if action.choices else "VALUE"
            action.default = SUPPRESS if action.default is None else action.default
        formatter = self._get_formatter()
        formatter.add_text(f"{self.prog} [--config RECIPE] [--option VALUE ...]")
        formatter.add_text(self.description)
        for title, names in sections.items():
            formatter.start_section(title.rstrip("."))
            # Without `--no_lora_experts`, which is `--lora_experts false`.
            shown = [action for action in self._actions if action.dest in names and action.const is not False]
            formatter.add_arguments(shown)
            formatter.end_section()
        if inherited and not self.shows_all:
            formatter.add_text(f"{len(inherited)} more options, of transformers and TRL, are listed by --help-all.")
        return formatter.format_help()


def parse(*argument_classes: type, arguments: list[str] | None = None, description: str | None = None) -> tuple:
    """One instance of each class, from `--config recipe.yaml` and the command line, which wins.

    Raises:
        ValueError: a recipe that cannot be read, an unknown key, or a value that the key does not take.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(argument_classes, allow_abbrev=False, description=description, formatter_class=RawHelp)
    parser.shows_all = "--help-all" in arguments
    parser.add_argument("--help-all", action="help", dest="help_all", help="show the inherited options too, and exit")
    parser.add_argument("--config", help="Recipe (YAML): values for any of these options; the command line wins.")
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = parser.error
    first.add_argument("--config", action="append")
    if len(recipes := first.parse_known_args(arguments)[0].config or []) > 1:
        raise ValueError(f"`--config` is given {len(recipes)} times, {recipes}; name one recipe.")
    for recipe in recipes:
        types = {name: kind for one in argument_classes for name, kind in get_type_hints(one).items()}
        words, structures = read_recipe(Path(find_configuration(recipe)), types)
        refuse_unknown([*words, *structures], parser, f"The recipe {recipe}")
        parser.set_defaults_with_config(**structures)
        arguments = [*(f"--{key}={word}" for key, word in words.items()), *arguments]
    unknown = parser.parse_known_args(arguments)[1]
    refuse_unknown([word for word in unknown if word.startswith("-")] or unknown, parser, "The command line")
    return tuple(parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[: len(argument_classes)])


def refuse_unknown(keys: list[str], parser: ArgumentParser, place: str):
    """Raise for the first key that is no option of `parser`, with the nearest one that is."""
    options = {action.dest for action in parser._actions}
    for key in keys:
        name = key.lstrip("-").partition("=")[0].replace("-", "_")
        if name not in options or key.startswith("-"):
            near = difflib.get_close_matches(name, options, n=1)
            remedy = f"did you mean `{near[0]}`?" if near else "`--help` lists the options."
            raise ValueError(f"{place} has `{key}`, which is no option of this script; {remedy}")


def find_configuration(name: str) -> str:
    """`name` itself where it exists; a `configuration/...` that does not is the one the package came with."""
    installed = Path(__file__).parents[1] / name
    is_ours = name.startswith("configuration/") and not Path(name).exists() and installed.is_file()
    return str(installed) if is_ours else name


def shipped(*folders: str) -> str:
    """For a help text: the configurations that came with the package, by folder."""
    root = Path(__file__).parents[1] / "configuration"
    text = "\nThese came with the package. Such a path is found from any folder:\n"
    for folder in folders:
        names = " ".join(sorted(path.name for path in (root / folder).iterdir()))
        text += f"\n    configuration/{folder}/\n" + textwrap.indent(textwrap.fill(names, 100), " " * 8)
    return text


def read_recipe(path: Path, types: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The plain values of a YAML file as they are written, for argparse to convert and check, and the other ones.

    As written: `eval_strategy: no` is the word, not False, and `3e-4` a number, whatever YAML makes of them.

    Raises:
        ValueError: no such file, no YAML mapping in UTF-8, a key twice, or a list, a mapping or nothing for a key of
            another type.
    """
    if not path.is_file():
        raise ValueError(
            f"`config={path}`: no such file; name a YAML recipe, such as configuration/pretrain/smoke.yaml."
        )
    try:
        text = path.read_text(encoding="utf-8")
        written, values, node = yaml.load(text, Loader=yaml.BaseLoader), yaml.safe_load(text), yaml.compose(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`config={path}` cannot be read as YAML in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`config={path}` must hold lines of `key: value`, not {values!r}.")
    if "model_type" in values:
        raise ValueError(f"`config={path}` is the configuration of a model; name it as `model`.")
    keys = [key.value for key, _ in node.value]
    for key, what in {"<<": "merges another mapping", "config": "names another recipe"}.items():
        if key in keys:
            raise ValueError(f"`config={path}` {what} (`{key}`), which a recipe does not; write its keys out.")
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"`config={path}` has `{twice[0]}` {len(twice)} times; keep the one that is meant.")
    words, structures = {}, {}
    for (key, word), value in zip(written.items(), values.values(), strict=True):
        kind = types.get(key, str)
        union = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        kinds = {get_origin(part) or part: get_args(part) for part in union}
        is_list = list in kinds and (isinstance(word, list) or str not in kinds)
        if is_list:
            (item,) = kinds[list] or (str,)
            try:
                structures[key] = [item(part) for part in (word if isinstance(word, list) else [word])]
            except (TypeError, ValueError) as error:
                raise ValueError(f"`{key}: {value}` in {path}: `{key}` takes a list of {item.__name__}.") from error
        elif (value is None and type(None) in kinds) or (isinstance(value, dict) and dict in kinds):
            structures[key] = value
        elif value is None or isinstance(value, list | dict):
            raise ValueError(f"`{key}: {json.dumps(value)}` in {path}: `{key}` takes one plain value.")
        else:
            words[key] = word
    return words, structures

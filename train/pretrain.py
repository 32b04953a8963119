# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Pretrain a CoE model from a preset and let it speak. Two minutes on a laptop's CPU, no data, no network:

    coe-pretrain --config configuration/pretrain/smoke.yaml

On your own text (a folder with train.jsonl and test.jsonl, a file or a Hub id), on all GPUs of a machine:

    accelerate launch -m modeling_coe.train.pretrain --config configuration/pretrain/paper.yaml --dataset my/dataset

A run that was killed continues from its newest complete checkpoint with the same command. `output_dir` holds the
final model with its tokenizer, loss_curve.jsonl and .png, samples.json and facts.json.
"""

import zlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, set_seed
from transformers.distributed import DistributedConfig

import modeling_coe  # noqa: F401, registers CoE with the Auto classes
from modeling_coe.folders import facts_of
from modeling_coe.train.arguments import (
    DataArguments,
    LayoutArguments,
    ModelArguments,
    PretrainArguments,
    command_line,
    fit_micro_batch,
    free_memory,
    parse,
    read_config,
    require_context,
    shipped,
    training_setup,
)
from modeling_coe.train.checkpoints import (
    AtomicCheckpoints,
    ShardedCheckpoints,
    checkpoint_to_resume,
    train_from,
)
from modeling_coe.train.data import (
    as_problems,
    collate,
    load_documents,
    load_tokenizer,
    pack,
    share_solved,
    solve,
    with_final_answer,
)
from modeling_coe.train.optimizer import PoolRate, balancing, calibrate
from modeling_coe.train.report import (
    ROUTING_HEALTH,
    Curve,
    RoutingHealth,
    facts_of_run,
    keep_output_short,
    peak_memory,
    print_result,
    save_model,
    show_progress,
    write_results,
)
from modeling_coe.train.runs import match_record, record_of, run_folder


class Pretrainer(AtomicCheckpoints, RoutingHealth, PoolRate, ShardedCheckpoints, Trainer):
    """Trainer that writes whole checkpoints, stops at a NaN, and scores the validation problems when it evaluates."""

    def __init__(self, *args, problems: Dataset, max_new_tokens: int, **kwargs):
        super().__init__(*args, preprocess_logits_for_metrics=sum_of_losses, compute_metrics=loss_per_token, **kwargs)
        self.problems, self.max_new_tokens = problems, max_new_tokens
        self.answers, self.metrics, self.evaluated_step = [], {}, None

    def log(self, logs: dict[str, float], start_time: float | None = None):
        known = {row["step"] for row in self.state.log_history if "eval_loss" in row}
        if "eval_loss" not in logs or self.state.global_step not in known:  # a finished run may be evaluated again
            super().log(logs | {"memory_gib": peak_memory(self.args.device)}, start_time)

    def compute_loss(self, model, inputs, *args, **kwargs):
        # The evaluation wants the logits.
        return super().compute_loss(
            model, inputs | {"skip_logits": self.args.skip_logits and model.training}, *args, **kwargs
        )

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs | {"ignore_keys": ["aux_loss", "router_logits"]})
        output.metrics["eval_loss"] = output.metrics.pop("eval_loss_per_token")
        if len(self.problems):
            self.answers = solve(
                self.model,
                self.processing_class,
                self.problems,
                self.args.per_device_eval_batch_size,
                self.max_new_tokens,
            )
            if (share := share_solved(self.answers)) is not None:
                output.metrics["eval_solved"] = share
        self.metrics, self.evaluated_step = output.metrics, self.state.global_step
        return output


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`[B, S, V]`, `[B, S]` -> the summed loss and the number of targets of each row, `[B, 2]`."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return torch.stack([losses.sum(-1), labels[:, 1:].ne(-100).sum(-1)], dim=-1)


def loss_per_token(evaluation) -> dict[str, float]:
    """Every validation token counts the same, however the rows were batched."""
    total, count = evaluation.predictions.astype(np.float64).sum(axis=0)
    return {"loss_per_token": total / count}


def build_model(
    arguments: ModelArguments,
    tokenizer,
    sequence_length: int,
    layout: DistributedConfig | None,
    resumed: Path | None,
    draw_seed: int | None,
):
    """A model with random weights from a preset, or the pretrained one of a checkpoint; sharded by a layout."""
    if draw_seed is not None and not arguments.is_preset:
        raise ValueError(
            f"`draw_by_name=True` initialises the weights, but `model={arguments.model}` has weights; drop it."
        )
    config = read_config(arguments.model)
    require_context(sequence_length, arguments.model, config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    options = arguments.load_options()
    source = arguments.model if layout is None or resumed is None else str(resumed)
    if source != arguments.model or not arguments.is_preset:
        return AutoModelForCausalLM.from_pretrained(source, config=config, distributed_config=layout, **options)
    model = AutoModelForCausalLM.from_config(config, **options)
    if draw_seed is not None:
        draw_by_name(model, draw_seed)
    if layout is None:
        return model
    # Every rank draws the same weights and keeps its part of them.
    weights = {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return type(model).from_pretrained(None, config=config, state_dict=weights, distributed_config=layout, **options)


def draw_by_name(model, seed: int):
    """Draw the weights of every module anew, from the seed and the module's name.

    Models with the same modules then start with the same weights in them, whatever else they have: most of the
    difference between two seeds is that of their initialisation, and it falls out of a comparison paired by seed.
    """
    for name, module in model.named_modules():
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        model._init_weights(module)


@command_line
def main(arguments: list[str] | None = None):
    classes = (ModelArguments, DataArguments, LayoutArguments, PretrainArguments)
    description = __doc__ + shipped("pretrain", "models")
    model_arguments, data_arguments, layout, training = parse(*classes, arguments=arguments, description=description)
    keep_output_short()
    if data_arguments.drop_long_documents:
        raise ValueError("`drop_long_documents=true` is for fine-tuning; set `split_long_documents=true` here.")
    config = read_config(model_arguments.model)
    output = Path(training.output_dir)
    with (
        run_folder(output, model_arguments.model, data_arguments.dataset)
        if training.process_index == 0
        else nullcontext()
    ):
        pretrain(model_arguments, data_arguments, layout, training, config.vocab_size)


def pretrain(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    layout: LayoutArguments,
    training: PretrainArguments,
    vocab_size: int,
):
    """From documents to the final model and its facts, in a folder that is this run's."""
    output = Path(training.output_dir)
    set_seed(training.seed)
    base = facts_of(model_arguments.model)
    name = model_arguments.tokenizer or (None if model_arguments.is_preset else model_arguments.model)
    with training.main_process_first():
        tokenizer = None if name is None else load_tokenizer(name, None, vocab_size)
        documents = load_documents(data_arguments, training.seed, tokenizer)
        if tokenizer is None:
            tokenizer = load_tokenizer(None, documents["train"], vocab_size)
        length, split = data_arguments.sequence_length, data_arguments.split_long_documents
        blocks = {key: pack(rows, tokenizer, length, split) for key, rows in documents.items()}
    checkpoint = checkpoint_to_resume(output, training.resume_from_checkpoint)
    draw_seed = training.seed if training.draw_by_name else None
    model = build_model(model_arguments, tokenizer, length, layout.distributed_config(), checkpoint, draw_seed)
    fitted = training
    if training.auto_find_batch_size:
        memory = free_memory(training.device)
        fitted = fit_micro_batch(training, model.config, training_setup(model_arguments, training, length), memory)

    if training.process_index == 0:
        settings = {"sequence_length": length, "split_long_documents": split}
        # What was asked for: fitted to a card with other memory, the run goes on with the same rows a step.
        record = record_of(model_arguments.model, model.config, tokenizer, training, documents["train"], **settings)
        match_record(output, record)
    trainer = Pretrainer(
        model=model,
        args=fitted,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[Curve(), *balancing(model.config, training.router_bias_rate)],
        problems=as_problems(documents["validation"], data_arguments.scored_problems),
        max_new_tokens=data_arguments.max_new_tokens,
    )
    show_progress(trainer)

    has_trained = train_from(trainer, checkpoint)
    calibrate(trainer)
    if trainer.evaluated_step != trainer.state.global_step:
        trainer.evaluate()
    trainer.model.config.use_cache = True  # Trainer switched it off, and it is saved
    save_model(trainer, has_trained)
    if trainer.is_world_process_zero():
        report(trainer, model_arguments, data_arguments, base, checkpoint, has_trained)


def report(
    trainer: Pretrainer,
    model: ModelArguments,
    data: DataArguments,
    base: dict | None,
    checkpoint: Path | None,
    is_new: bool,
):
    """Write facts.json, samples.json and loss_curve.png, and print the result with two samples."""
    at_start = [row["eval_loss"] for row in trainer.state.log_history if row["step"] == 0 and "eval_loss" in row]
    facts = {
        "model": model.model,
        "base": base,
        "dataset": data.dataset,
        "parameters": trainer.model.num_parameters(),
        "validation_loss_before": at_start[0] if at_start else None,
        "validation_loss": trainer.metrics["eval_loss"],
        "share_solved": trainer.metrics.get("eval_solved"),
        "scored_problems": len(with_final_answer(trainer.answers)),
        "routing_health": {name: value for name, value in trainer.metrics.items() if name.startswith(ROUTING_HEALTH)},
        **facts_of_run(trainer, checkpoint, is_new),
    }
    write_results(trainer, facts, trainer.answers, Path(model.model).stem)
    for answer in trainer.answers[:2]:
        print(f"\n{answer['prompt']}{answer['generated']}\n({'solved' if answer['solved'] else 'not solved'})")
    print_result(facts, Path(trainer.args.output_dir))


if __name__ == "__main__":
    main()

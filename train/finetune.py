# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a CoE checkpoint on your own questions and answers, all weights or LoRA, with TRL's SFTTrainer:

    coe-finetune --config configuration/finetune/lora.yaml --model runs/smoke --dataset path/or/hub-id

The dataset has the columns `question` and `answer` (`--question_column`, `--answer_column`), `prompt` and
`completion`, `messages`, or `text`; messages are laid out by the tokenizer's chat template. The loss is that of the
answers. A run that was killed continues from its newest complete checkpoint with the same command. `output_dir` holds
the model or the adapter, the tokenizer, loss_curve.jsonl and .png, samples.json, and facts.json with the validation
loss before and after.
"""

from contextlib import nullcontext
from copy import copy
from functools import partial
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    set_seed,
)
from transformers.distributed import DistributedConfig
from trl import SFTTrainer

from modeling_coe import QuantizedExpertsConfig, quantized_share
from modeling_coe.adapters import count_adapted, lora_config
from modeling_coe.folders import facts_of, refuse_adapter
from modeling_coe.train.arguments import (
    DataArguments,
    FinetuneArguments,
    LayoutArguments,
    LoraArguments,
    ModelArguments,
    command_line,
    parse,
    read_config,
    require_context,
    require_weights,
    shipped,
)
from modeling_coe.train.checkpoints import (
    AtomicCheckpoints,
    ShardedCheckpoints,
    checkpoint_to_resume,
    train_from,
)
from modeling_coe.train.data import load_documents, load_tokenizer, score, short_enough, with_final_answer
from modeling_coe.train.optimizer import PoolRate, balancing, calibrate
from modeling_coe.train.report import (
    Curve,
    RoutingHealth,
    facts_of_run,
    keep_output_short,
    print_result,
    save_model,
    show_progress,
    write_results,
)
from modeling_coe.train.runs import keep_scores, match_record, record_of, run_folder


class Finetuner(AtomicCheckpoints, RoutingHealth, PoolRate, ShardedCheckpoints, SFTTrainer):
    """SFTTrainer that writes whole checkpoints, stops at a NaN, and logs how a validation batch is routed."""

    def create_model_card(self, *args, **kwargs):
        """None: TRL's says that the model is a fine-tuned version of None. coe-publish writes one."""


def load_model(
    arguments: ModelArguments,
    lora: LoraArguments,
    sequence_length: int,
    layout: DistributedConfig | None = None,
    resumed: Path | None = None,
) -> PreTrainedModel:
    """The checkpoint, its experts in 4 bits if asked for, sharded by a layout.

    Raises:
        ValueError: a preset or an adapter in place of a checkpoint, sequences longer than the context, or LoRA with a
            layout.
    """
    require_weights(arguments.model)
    config = read_config(arguments.model)
    refuse_adapter("model", arguments.model)
    require_context(sequence_length, arguments.model, config)
    if lora.lora and layout is not None:
        raise ValueError(
            "`lora=true` does not go with a layout; leave the sizes at 1 and let Accelerate shard (fsdp2)."
        )
    options = arguments.load_options()
    if lora.load_in_4bit:
        options["quantization_config"] = QuantizedExpertsConfig(bits=4)
    source = arguments.model if layout is None or resumed is None else str(resumed)
    # A checkpoint says `use_cache=False`, of the training; the configuration is that of the model it began with.
    model = AutoModelForCausalLM.from_pretrained(source, config=config, distributed_config=layout, **options)
    if lora.load_in_4bit:
        share = sum(share for (_, bits), share in quantized_share(model).items() if bits == 4)
        print(f"{share:.1%} of the weights are in 4 bits: those of the experts.")
    return model


@command_line
def main(arguments: list[str] | None = None):
    classes = (ModelArguments, DataArguments, FinetuneArguments, LoraArguments, LayoutArguments)
    description = __doc__ + shipped("finetune")
    model_arguments, data, training, lora, layout = parse(*classes, arguments=arguments, description=description)
    keep_output_short()
    if data.split_long_documents:
        raise ValueError("`split_long_documents=true` is for pretraining; set `drop_long_documents=true` here.")
    training = copy(training)
    training.max_length = data.sequence_length
    output = Path(training.output_dir)
    with run_folder(output, model_arguments.model, data.dataset) if training.process_index == 0 else nullcontext():
        finetune(model_arguments, data, training, lora, layout, output)


def finetune(
    model_arguments: ModelArguments,
    data: DataArguments,
    training: FinetuneArguments,
    lora: LoraArguments,
    layout: LayoutArguments,
    output: Path,
):
    """From a checkpoint to the tuned model or adapter and its facts, in a folder that is this run's."""
    set_seed(training.seed)
    base = facts_of(model_arguments.model)
    checkpoint = checkpoint_to_resume(output, training.resume_from_checkpoint)
    distributed = layout.distributed_config()
    model = load_model(model_arguments, lora, data.sequence_length, distributed, checkpoint)
    tokenizer = load_tokenizer(model_arguments.tokenizer or model_arguments.model, None, model.config.vocab_size)
    with training.main_process_first():
        documents = load_documents(data, training.seed, tokenizer)
    for split, rows in documents.items():
        documents[split] = short_enough(rows, split, tokenizer, data.sequence_length, data.drop_long_documents)

    if training.process_index == 0:
        settings = {"lora": vars(lora)}
        record = record_of(model_arguments.model, model.config, tokenizer, training, documents["train"], **settings)
        match_record(output, record)
    # An adapter has no room for the biases: LoRA leaves them as they are.
    biases = [] if lora.lora else balancing(model.config, training.router_bias_rate)
    options = {"experts": lora.lora_experts, "router": lora.lora_router, "r": lora.lora_r}
    trainer = Finetuner(
        model=model,
        args=training,
        train_dataset=documents["train"],
        eval_dataset=documents["validation"],
        processing_class=tokenizer,
        callbacks=[Curve(), *biases],
        peft_config=lora_config(model, lora_alpha=lora.lora_alpha, **options) if lora.lora else None,
    )
    if lora.lora:
        # PEFT's model card is a form that nobody filled in, and it would change one that a user wrote.
        trainer.model.create_or_update_model_card = lambda folder: None
    is_text = "text" in documents["validation"].column_names
    show_progress(trainer, "validation loss" if is_text else "validation loss of the answers")
    trained = count_adapted(trainer.model) if lora.lora else {"all": model.num_parameters()}
    parts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    print(f"Trains {sum(trained.values()):,} of {trainer.model.num_parameters():,} parameters: {parts}")

    sizes = (data.scored_problems, training.per_device_eval_batch_size, data.max_new_tokens)
    scores = partial(score, trainer.model, tokenizer, documents["validation"], *sizes)
    # With a layout, the weights of a run that goes on are the checkpoint's already.
    before = scores()[0] if distributed is None or checkpoint is None else None
    if training.process_index == 0:
        settings = {"scored_problems": data.scored_problems, "max_new_tokens": data.max_new_tokens}
        before = keep_scores(output, documents["validation"], settings, before)
    has_trained = train_from(trainer, checkpoint)
    calibrate(trainer)
    after, answers = scores()
    trainer.model.config.use_cache = True  # Trainer switched it off, and it is saved
    save_model(trainer, has_trained)
    if trainer.is_world_process_zero():
        facts = {
            "model": model_arguments.model,
            "base": base,
            "dataset": data.dataset,
            "lora": vars(lora) if lora.lora else None,
            "trained_parameters": trained,
            "train_documents": len(documents["train"]),
            "validation_documents": len(documents["validation"]),
            "before": before,
            "after": after,
            "validation_loss_before": before and before["validation_loss"],
            "validation_loss": after["validation_loss"],
            "answer_loss_before": before and before.get("answer_loss"),
            "answer_loss": after.get("answer_loss"),
            "share_solved": after.get("share_solved"),
            "scored_problems": len(with_final_answer(answers)),
            **facts_of_run(trainer, checkpoint, has_trained),
        }
        write_results(trainer, facts, answers, Path(data.dataset).name)
        print_result(facts, output)


if __name__ == "__main__":
    main()

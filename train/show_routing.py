# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What do the iterations of a checkpoint do? Which experts fire, who follows whom, how much the state changes:

    coe-show-routing --model runs/smoke --dataset word_problems --output_dir runs/smoke/routing

Reads validation documents and writes routing.json, load.png and, for more than one iteration, transitions.png. Of a
model with null experts also what its tokens cost, in routing.json by kind and by loss of the token, and as cost.png.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import modeling_coe  # noqa: F401, registers CoE with the Auto classes
from modeling_coe.folders import facts_of
from modeling_coe.routing import Routing, plot_cost, plot_routing, plot_transitions, record_routing
from modeling_coe.train.arguments import (
    CheckpointArguments,
    DataArguments,
    command_line,
    parse,
    read_config,
    require_least,
    require_weights,
)
from modeling_coe.train.data import load_documents, load_tokenizer, turn_dial
from modeling_coe.train.report import draw, environment, keep_output_short, save_picture
from modeling_coe.train.runs import result_folder, write_json


KINDS = ("digits", "words", "signs")
# Tokens in the picture of their cost.
SHOWN = 600
TRAINED = ("steps", "tokens", "learning_rate", "seed", "validation_loss", "commit")
PICTURES = ("load.png", "transitions.png", "cost.png")


@dataclass
class RoutingArguments:
    """How much to read, and where to write."""

    output_dir: str = field(default="runs/routing", metadata={"help": "Takes routing.json and the pictures."})
    documents: int = field(default=64, metadata={"help": "Validation documents to read."})
    expert_budget: float | None = field(
        default=None, metadata={"help": "Experts a token and iteration, on average, of a model with null experts."}
    )
    seed: int = field(default=42, metadata={"help": "Of generated or split documents; the training run's is 42."})

    def __post_init__(self):
        require_least(self, {"documents": 1, "seed": 0})


def kind_of(token: str) -> int:
    """The index in `KINDS` of a token's text."""
    text = token.strip()
    return 0 if text.isdigit() else 1 if text.isalpha() else 2


def kinds_of(input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return torch.tensor([kind_of(tokenizer.decode(token)) for token in input_ids])


def summarise(routing: Routing, kinds: torch.Tensor, has_null_experts: bool = False) -> dict:
    """Every number by layer and iteration, `[L][C]`; `revisits` by layer and pair of iterations."""
    values = {
        "entropy_of_load": routing.entropy,
        "busiest_expert_over_mean": routing.load.amax(dim=-1) * routing.num_experts,
        "revisits": routing.revisits,
        "specialisation_by_kind_of_token": routing.specialisation(kinds),
        "change_of_state": routing.change,
    }
    if has_null_experts:
        loss, experts = routing.experts_by_loss()
        values |= {
            "experts_per_token": routing.experts_per_token.mean(dim=-1),
            "experts_by_kind_of_token": routing.experts_by_kind(kinds).mean(dim=(0, 1))[None],
            "loss_of_quarters_of_the_tokens": loss[None],
            "experts_by_quarter": experts.mean(dim=(0, 1))[None],
        }
    rounded = {name: [[round(value, 4) for value in row] for row in rows.tolist()] for name, rows in values.items()}
    shares = kinds.bincount(minlength=len(KINDS)) / len(kinds)
    return {
        "tokens": len(kinds),
        "kinds": {name: round(share, 4) for name, share in zip(KINDS, shares.tolist(), strict=True)},
        "revisits_if_choices_were_independent": round(routing.experts.shape[-1] / routing.num_experts, 4),
        **rounded,
    }


def table(summary: dict) -> str:
    """A row for each layer and iteration: the entropy of the load (1 = even), the busiest expert's load over the mean,
    the change of the state, and the share of visits to an expert that the iteration before has chosen already.
    """
    lines = ["layer  iteration  entropy  busiest  change  chosen again"]
    for layer, entropies in enumerate(summary["entropy_of_load"]):
        for iteration, entropy in enumerate(entropies):
            busiest = summary["busiest_expert_over_mean"][layer][iteration]
            change = summary["change_of_state"][layer][iteration]
            again = f"{summary['revisits'][layer][iteration - 1]:.0%}" if iteration else ""
            line = f"{layer:5}  {iteration + 1:9}  {entropy:7.2f}  {busiest:7.2f}  {change:6.2f}  {again:>12}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def cost_table(summary: dict) -> str:
    """How many experts a token computes in an iteration, of each kind, and from the easiest quarter to the hardest."""
    kinds = zip(KINDS, summary["experts_by_kind_of_token"][0], strict=False)
    quarters = zip(summary["loss_of_quarters_of_the_tokens"][0], summary["experts_by_quarter"][0], strict=True)
    lines = ["experts per token and iteration, by kind of token"]
    lines += [f"  {kind:20} {experts:5.2f}" for kind, experts in kinds]
    lines += ["and by the loss of the next token, quarters from the easiest"]
    lines += [f"  {loss:8.3f} nats        {experts:5.2f}" for loss, experts in quarters]
    return "\n".join(lines)


@command_line
def main(arguments: list[str] | None = None):
    model_arguments, data, options = parse(
        CheckpointArguments, DataArguments, RoutingArguments, arguments=arguments, description=__doc__
    )
    keep_output_short()
    require_weights(model_arguments.model)
    read_config(model_arguments.model)
    output = Path(options.output_dir).expanduser()
    with result_folder(output, ("routing.json", *PICTURES), data.dataset):
        show(model_arguments, data, options, output)


def show(model_arguments: CheckpointArguments, data: DataArguments, options: RoutingArguments, output: Path):
    """Read the documents and write the numbers and the pictures to `output`."""
    model = AutoModelForCausalLM.from_pretrained(model_arguments.model, **model_arguments.load_options()).eval()
    turn_dial(model, options.expert_budget)
    tokenizer = load_tokenizer(model_arguments.tokenizer or model_arguments.model, None, model.config.vocab_size)
    documents = load_documents(data, options.seed, tokenizer)["validation"]
    documents = documents.select(range(min(options.documents, len(documents))))
    texts = ["".join(row.values()) for row in documents]
    length = min(data.sequence_length, model.config.max_position_embeddings)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
    routing = record_routing(model, inputs.input_ids, inputs.attention_mask)
    kinds = kinds_of(inputs.input_ids[inputs.attention_mask.bool()], tokenizer)
    summary = summarise(routing, kinds, model.config.num_null_experts > 0)
    trained = facts_of(model_arguments.model) or {}
    facts = {
        "config": model.config.to_diff_dict(),
        "trained": {name: trained[name] for name in TRAINED if name in trained},
        "documents": len(documents),
    }
    write_json(output / "routing.json", facts | summary | environment(model.device))
    for name in PICTURES:  # of an earlier model, which had other ones
        (output / name).unlink(missing_ok=True)
    print(table(summary))
    print(f"load of each expert in each iteration: {output / 'load.png'}; all numbers: {output / 'routing.json'}")
    draw(save, plot_routing, routing, output / "load.png")
    if model.config.num_iterations > 1:
        draw(save, plot_transitions, routing, output / "transitions.png")
    if "experts_per_token" in summary:
        ids = inputs.input_ids[inputs.attention_mask.bool()][:SHOWN]
        texts = [tokenizer.decode(token) for token in ids]
        draw(save, partial(plot_cost, tokens=texts), routing, output / "cost.png")
        print(cost_table(summary))


def save(plot: Callable, routing: Routing, path: Path):
    save_picture(plot(routing), path)


if __name__ == "__main__":
    main()

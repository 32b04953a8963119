# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Turn an existing MoE or dense checkpoint into a Chain-of-Experts with the same logits.

coe-upcycle --config configuration/upcycle/olmoe.yaml
coe-upcycle --source path/to/mixtral --output runs/upcycled --verify true     # any option, without a file

The output's facts.json says what it was made of; coe-pretrain, coe-finetune and coe-publish pass that on.
"""

import logging
from dataclasses import dataclass, field

from modeling_coe import upcycle
from modeling_coe.train.arguments import command_line, parse, shipped


@dataclass
class UpcycleArguments:
    """What to convert, how, and where to write it."""

    source: str | None = field(default=None, metadata={"help": "Checkpoint folder or Hub id."})
    output: str | None = field(default=None, metadata={"help": "Folder to write; appears whole or not at all."})
    num_iterations: int = field(default=2, metadata={"help": "Iterations of the chain (C)."})
    experts_per_iteration: int | None = field(
        default=None,
        metadata={
            "help": "Experts per token and iteration (K). Unset: the source's; its K / C keeps compute, not function."
        },
    )
    num_experts: int | None = field(
        default=None, metadata={"help": "Experts to make from a dense source (N). Unset: 8."}
    )
    expert_noise: float = field(
        default=0.0, metadata={"help": "Noise on the copies of a dense source, in units of their standard deviation."}
    )
    router_noise: float = field(
        default=0.0, metadata={"help": "Noise on the later routers, in units of the router's standard deviation."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Source layers to keep. Unset: all."})
    layers_per_pool: int = field(
        default=1, metadata={"help": "Layers that share one pool, the mean of their experts; not the same function."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    max_shard_size: str = field(
        default="5GB", metadata={"help": "Largest output file, which bounds the memory needed."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier conversion wrote."})
    verify: bool = field(
        default=False, metadata={"help": "Compare the logits with the source's before the output appears."}
    )
    verify_text: str | None = field(default=None, metadata={"help": "Text file to verify on."})


@command_line
def main(command: list[str] | None = None):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    (arguments,) = parse(UpcycleArguments, arguments=command, description=__doc__ + shipped("upcycle"))
    if arguments.source is None or arguments.output is None:
        raise ValueError("Set `source` and `output`, in the recipe or on the command line.")
    print(f"Chain-of-Experts written to {upcycle(**vars(arguments))}")


if __name__ == "__main__":
    main()

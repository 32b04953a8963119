# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Turn an existing MoE or dense checkpoint into a Chain-of-Experts with the same logits.

python train/upcycle.py --config configuration/upcycle/olmoe.yaml
python train/upcycle.py --source path/to/mixtral --output runs/upcycled --verify true     # any option, without a file

The output's facts.json says what it was made of; train/pretrain.py, finetune.py and publish.py pass that on.
"""

import logging
from dataclasses import dataclass, field

from modeling_coe import upcycle
from modeling_coe.train.arguments import command_line, parse


@dataclass
class UpcycleArguments:
    source: str | None = field(default=None, metadata={"help": "Checkpoint folder or Hub id."})
    output: str | None = field(default=None, metadata={"help": "Folder to write; appears whole or not at all."})
    num_iterations: int = field(default=2, metadata={"help": "C."})
    experts_per_iteration: int | None = field(
        default=None,
        metadata={"help": "K; unset keeps the source's. The source's K / C keeps its compute but not its function."},
    )
    num_experts: int | None = field(default=None, metadata={"help": "N, for dense sources (unset: 8)."})
    expert_noise: float = field(default=0.0, metadata={"help": "Noise on a dense source's copies, in their std."})
    router_noise: float = field(default=0.0, metadata={"help": "Noise on the later routers, in the router's std."})
    layers: list[int] | None = field(default=None, metadata={"help": "Source layers to keep; unset keeps all."})
    seed: int = field(default=0, metadata={"help": "Of all noise."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Size of an output file, and of the peak of RAM."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier conversion wrote."})
    verify: bool = field(default=False, metadata={"help": "Compare the logits with the source's before publishing."})
    verify_text: str | None = field(default=None, metadata={"help": "Text file to verify on."})


@command_line
def main(command: list[str] | None = None):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    (arguments,) = parse(UpcycleArguments, arguments=command)
    if arguments.source is None or arguments.output is None:
        raise ValueError("Set `source` and `output`, in the recipe or on the command line.")
    print(f"Chain-of-Experts written to {upcycle(**vars(arguments))}")


if __name__ == "__main__":
    main()

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Runs a script as `torchrun` would run it on GPUs, with gloo ranks on CPU in their place.

    torchrun --nproc_per_node 2 tests/gloo_ranks.py train/pretrain.py --tp_size 2 ...

Accelerate (1.15) takes ranks on CPU for plain data parallelism: it ignores an FSDP or DeepSpeed file in silence and
refuses tensor parallelism. Told that gloo is the backend of its accelerators, it runs all of them.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    # The store of torch's agent (2.13) still has the addresses of killed ranks, which restarted ones would call.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    port = int(os.environ["MASTER_PORT"]) + 1 + int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    os.environ["MASTER_PORT"] = str(port)
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")

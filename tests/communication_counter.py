# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Counts what collectives move: `with CommunicationCounter(rank, ranks) as counter: step()`, then `counter.bytes`."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CommunicationCounter(TorchDispatchMode):
    """Calls and bytes by kind. A rank's own share of an all-to-all is counted in `own` only."""

    def __init__(self, rank, ranks):
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.calls, self.bytes, self.own = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")):
            self.count(name.partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def count(self, name, args):
        if name == "all_to_all_single":
            tensor, _, sizes = args[:3]
            row = tensor.nbytes // max(1, tensor.shape[0])
            self.add("all_to_all", row * (sum(sizes) - sizes[self.rank]), own=row * sizes[self.rank])
        elif name == "alltoall_base_":
            self.add("expert_counts", args[1].nbytes * (self.ranks - 1) // self.ranks)
        elif name == "_allgather_base_":
            self.add("gather", args[0].nbytes * (self.ranks - 1) // self.ranks)
        elif name == "_reduce_scatter_base_":
            self.add("reduce", args[1].nbytes * (self.ranks - 1) // self.ranks)
        elif name != "wait_tensor":
            tensors = [arg for arg in torch.utils._pytree.tree_leaves(args) if isinstance(arg, torch.Tensor)]
            self.add(name, sum(tensor.nbytes for tensor in tensors))

    def add(self, kind, sent, own=0):
        self.calls[kind] += 1
        self.bytes[kind] += sent
        self.own[kind] += own

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What training a CoE on many GPUs costs: bytes between ranks, memory of a rank and time of a step, in closed form.

The layout is transformers' `DistributedConfig` without tensor parallelism: FSDP2 layer by layer, experts held whole by
the ranks of a group and reached by two all-to-alls per iteration, one there and one back.

CoE-C(K/N) moves as many bytes through its all-to-alls as the MoE(C*K/N) of equal compute, in C times as many calls of
a C-th of the size: the chain pays C times the latency, and nothing else.

Shape letters as in `budget.py`: T tokens of a rank's micro-batch, H hidden, N experts, K experts per iteration,
C iterations, L layers.
"""

from dataclasses import dataclass

from modeling_coe.budget import BYTES, TrainingSetup, count_parameters, training_flops, training_memory
from modeling_coe.configuration_coe import CoEConfig


@dataclass(frozen=True)
class Layout:
    """`fsdp_size` ranks share all weights, groups of `ep_size` the experts, `dp_replicate_size` times over."""

    fsdp_size: int = 1
    ep_size: int = 1
    dp_replicate_size: int = 1

    def __post_init__(self):
        if self.fsdp_size % self.ep_size != 0:
            raise ValueError(f"`ep_size={self.ep_size}` must divide `fsdp_size={self.fsdp_size}`.")

    @property
    def world_size(self) -> int:
        return self.fsdp_size * self.dp_replicate_size


@dataclass(frozen=True)
class Cluster:
    """What the machines do; the defaults are assumptions about nodes of 8 H100s, to be replaced by your measurements.

    Args:
        gpus_per_node: ranks that the fast links join.
        flops: per second and GPU, as achieved, not as advertised: 40 % of 989e12 (bf16).
        node_bandwidth: bytes per second that a rank sends within its node: two thirds of NVLink's 450e9.
        network_bandwidth: bytes per second that a rank sends to other nodes: 80 % of 400 Gbit/s.
        latency: seconds of a collective that moves nothing.
    """

    gpus_per_node: int = 8
    flops: float = 4e14
    node_bandwidth: float = 3e11
    network_bandwidth: float = 4e10
    latency: float = 3e-5

    def seconds(self, sent: float, calls: int, ranks: int) -> float:
        """For `calls` collectives over neighbouring ranks in which each rank sends `sent` bytes altogether."""
        if ranks == 1:
            return 0.0
        bandwidth = self.node_bandwidth if ranks <= self.gpus_per_node else self.network_bandwidth
        return sent / bandwidth + calls * self.latency


def traffic(config: CoEConfig, setup: TrainingSetup, layout: Layout) -> dict[str, tuple[int, float]]:
    """Calls and bytes that a rank sends to others in one micro-batch, forward and backward, by kind.

    `all_to_all` carries tokens to their experts and back, `expert_counts` tells beforehand how many; every rank's
    tokens are assumed to spread evenly over the experts. `gather` collects sharded weights, `reduce` sums and shards
    gradients, `replicas` sums them over copies. Rings: a rank sends (P - 1) / P of what all P ranks end up with.
    """
    L, C, N, H = config.num_hidden_layers, config.num_iterations, config.num_local_experts, config.hidden_size
    F, E, R = layout.fsdp_size, layout.ep_size, layout.dp_replicate_size
    holders = F // E
    width = BYTES[setup.dtype]
    forwards = 2 if setup.gradient_checkpointing else 1
    calls = L * C * (forwards + 1)
    rows = setup.tokens * config.num_experts_per_tok
    counts = count_parameters(config)
    experts = counts["experts"] / E
    dense = sum(counts.values()) - counts["experts"]
    # The last norm and a head of its own stay whole from forward to backward. A tied head's gradient is reduced twice:
    # as the head's and as the embedding's.
    kept, tied = H + counts.get("lm_head", 0), counts["embedding"] * config.tie_word_embeddings
    # With expert parallelism a layer's experts are sharded apart, over the ranks that hold the same ones. So is a pool
    # that layers share. Experts that are sharded apart are gathered at every visit.
    apart = holders > 1 and (E > 1 or config.layers_per_pool > 1)
    visits = C * config.layers_per_pool if apart else 1
    pools = L // config.layers_per_pool * apart
    groups = L + pools
    shards = dense * _others(F) + experts * _others(holders)
    gathers = 2 * (dense * _others(F) + visits * experts * _others(holders)) - kept * _others(F)
    return {
        "all_to_all": (2 * calls * (E > 1), 2 * calls * rows * H * setup.stream_bytes * _others(E)),
        "expert_counts": (L * C * forwards * (E > 1), L * C * forwards * 8 * N * _others(E)),
        "gather": ((2 * (L + visits * pools) + (2 if tied else 3)) * (F > 1), width * gathers),
        "reduce": ((groups + 2) * (F > 1), width * (shards + tied * _others(F))),
        "replicas": ((groups + 2) * (R > 1), 2 * width * _others(R) * (dense + counts["experts"]) / F),
    }


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks


def rank_memory(config: CoEConfig, setup: TrainingSetup, layout: Layout) -> dict[str, float]:
    """Bytes on one rank at the highest point of a step; with evenly spread tokens, as `budget.training_memory`."""
    memory = training_memory(config, setup)
    for name in ("weights", "gradients", "optimizer"):
        memory[name] = memory[name] / layout.fsdp_size
    if layout.fsdp_size > 1:
        counts = count_parameters(config)
        head = counts.get("lm_head", counts["embedding"])
        ends = counts["embedding"] + counts.get("lm_head", 0)
        experts = counts["experts"] / layout.ep_size
        dense = (sum(counts.values()) - ends - counts["experts"]) / config.num_hidden_layers
        pool = experts * config.layers_per_pool / config.num_hidden_layers
        # The head stays whole from the forward pass on, one layer and its successor are whole at a time; so is one
        # pool that layers share, while it is visited.
        pools = 2 if config.layers_per_pool == 1 else 1
        memory["gathered"] = BYTES[setup.dtype] * (head + 2 * dense + pools * pool)
    return memory


def step_seconds(config: CoEConfig, setup: TrainingSetup, layout: Layout, cluster: Cluster) -> dict[str, float]:
    """Seconds of one micro-batch by cause, and their `total`; nothing of it is measured.

    The all-to-alls wait for their tokens and are fully exposed; weights and gradients travel beside the computation,
    and only what exceeds it is paid.
    """
    kinds = traffic(config, setup, layout)
    flops = training_flops(config, setup.sequence_length, setup.gradient_checkpointing)
    compute = setup.tokens * flops / cluster.flops
    tokens = sum(_seconds(kinds[name], layout.ep_size, cluster) for name in ("all_to_all", "expert_counts"))
    shards = sum(_seconds(kinds[name], layout.fsdp_size, cluster) for name in ("gather", "reduce"))
    # The copies of a shard lie on different nodes, unless one node holds them all.
    replicas = _seconds(kinds["replicas"], layout.world_size, cluster) if layout.dp_replicate_size > 1 else 0.0
    exposed = max(0.0, shards + replicas - compute)
    return {"compute": compute, "all_to_all": tokens, "sharding": exposed, "total": compute + tokens + exposed}


def _seconds(kind: tuple[int, float], ranks: int, cluster: Cluster) -> float:
    calls, sent = kind
    return cluster.seconds(sent, calls, ranks)


__all__ = ["Cluster", "Layout", "rank_memory", "step_seconds", "traffic"]

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks through the host's DistributedConfig give one process's loss and gradients."""

import socket

import pytest
import torch
import transformers
from conftest import build, tokens
from packaging import version
from torch import distributed

from modeling_coe import CoEForCausalLM


pytestmark = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.20"),
    reason="the plans are those of transformers >= 5.20: expert parallelism by ep_dispatch_experts",
)

SIZES = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.5}
CHAINS = {
    "mixtral layout": {},
    "shared expert, norms per head": {"num_shared_experts": 2, "qk_norm": "head", "iteration_scale": True},
    "norms over all heads": {"qk_norm": "full", "attention_bias": True},
}
LAYOUTS = {
    "TP": {"tp_size": 2},
    "FSDP2": {"fsdp_size": 2},
    "EP + TP": {"tp_size": 2, "ep_size": 2},
    "FSDP2 + EP": {"fsdp_size": 2, "ep_size": 2},
}


def batch():
    """Two copies of two rows: every rank's half has the statistics of the whole, as the auxiliary loss needs."""
    return tokens(2, 9).repeat(2, 1)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, distributed.tensor.DTensor) else tensor


def loss_and_gradients(model, rows, scale=1):
    model.train()
    loss = model(rows, labels=rows, num_items_in_batch=batch()[:, 1:].numel(), use_cache=False).loss
    (loss * scale).backward()
    return loss.detach(), {name: full(p.grad).clone() for name, p in model.named_parameters()}


def on_rank(rank, port, folder):
    from transformers.distributed import DistributedConfig

    distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for chain in CHAINS:
        for layout, options in LAYOUTS.items():
            try:
                model = CoEForCausalLM.from_pretrained(
                    folder / chain, distributed_config=DistributedConfig(**options), dtype=torch.float32
                )
                # Ranks of a data-parallel layout see half the rows each; their gradients are averaged.
                splits = options.get("fsdp_size", 1)
                loss, gradients = loss_and_gradients(model, batch().chunk(splits)[rank % splits], scale=splits)
                loss = full(loss)
                if splits > 1:
                    distributed.all_reduce(loss)
                results[chain, layout] = (loss, gradients)
            except Exception as error:
                results[chain, layout] = error
    if rank == 0:
        torch.save(results, folder / "results.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    for chain, options in CHAINS.items():
        build(**SIZES, **options).save_pretrained(folder / chain)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (port, folder), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_one_ranks_loss_and_gradients(results, layout, chain):
    outcome = results[chain, layout]
    if isinstance(outcome, Exception):
        raise outcome
    loss, gradients = outcome
    expected_loss, expected = loss_and_gradients(build(**SIZES, **CHAINS[chain]), batch())
    assert (loss - expected_loss).abs() <= 1e-5
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5, name

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks give one process's loss and gradients, move checkpoints and send the bytes that were predicted."""

import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from communication_counter import CommunicationCounter
from conftest import build, tokens
from packaging import version
from torch import distributed
from transformers.distributed import DistributedConfig, load_optimizer_distributed, save_optimizer_distributed

from modeling_coe import CoEForCausalLM
from modeling_coe.balancing import RouterBalance
from modeling_coe.budget import TrainingSetup
from modeling_coe.train import plan
from modeling_coe.train.checkpoints import write_json
from modeling_coe.train.communication import Layout, rank_memory, traffic
from modeling_coe.train.report import environment


pytestmark = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.20"),
    reason="the plans are those of transformers >= 5.20: expert parallelism by ep_dispatch_experts",
)

SIZES = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.5}
CHAINS = {
    "mixtral layout": {},
    "shared expert, norms per head": {"num_shared_experts": 2, "qk_norm": "head", "iteration_scale": True},
    "norms over all heads, biases, tied": {"qk_norm": "full", "attention_bias": True, "tie_word_embeddings": True},
    "a rank without tokens for its experts": {"num_experts_per_tok": 1},
    "null experts": {"router_bias": True, "num_null_experts": 4},
    "layers that share a pool": {"num_hidden_layers": 4, "layers_per_pool": 2, "num_iterations": 2},
}
LAYOUTS = {
    "DDP": {},
    "TP": {"tp_size": 2},
    "FSDP2": {"fsdp_size": 2},
    "EP + TP": {"tp_size": 2, "ep_size": 2},
    "FSDP2 + EP": {"fsdp_size": 2, "ep_size": 2},
}
SHARDED = [layout for layout in LAYOUTS if layout != "DDP"]
MOVED = "shared expert, norms per head"
# No dimension that FSDP2 pads to a multiple of the ranks.
EVEN = {
    "even": {"vocab_size": 96, "num_iterations": 2, "tie_word_embeddings": True},
    "even pools": {"vocab_size": 96, "num_iterations": 2, "num_hidden_layers": 4, "layers_per_pool": 2},
}
SETUP = TrainingSetup(batch_size=2, sequence_length=33)


def batch(chain):
    """Two copies of rows: every rank's half has the statistics of the whole, as the auxiliary loss needs."""
    return tokens(*((1, 2) if "without tokens" in chain else (2, 9))).repeat(2, 1)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, distributed.tensor.DTensor) else tensor


def loss_and_gradients(model, chain, rank=0, ranks=1):
    """Of the rank's rows; the engines average gradients over the ranks, so the loss is scaled up by their number."""
    model.train()
    rows = batch(chain)
    targets = rows[:, 1:].numel()
    rows = rows.chunk(ranks)[rank]
    loss = model(input_ids=rows, labels=rows, num_items_in_batch=targets, use_cache=False).loss
    (loss * ranks).backward()
    loss = full(loss.detach())
    if ranks > 1:
        distributed.all_reduce(loss)
    return loss, {name.removeprefix("module."): full(p.grad).clone() for name, p in model.named_parameters()}


def load(folder, options):
    if not options:
        return torch.nn.parallel.DistributedDataParallel(CoEForCausalLM.from_pretrained(folder, dtype=torch.float32))
    layout = DistributedConfig(**options)
    return CoEForCausalLM.from_pretrained(folder, distributed_config=layout, dtype=torch.float32)


def data_ranks(options):
    return 1 if "tp_size" in options else 2


def adamw(model):
    """A group per parameter: those of different meshes cannot share a kernel. A large epsilon keeps noise small."""
    return torch.optim.AdamW([{"params": [parameter]} for parameter in model.parameters()], lr=1e-2, eps=1e-3)


def step(model, optimizer, rank=0, ranks=1):
    loss_and_gradients(model, MOVED, rank % ranks, ranks)
    optimizer.step()
    optimizer.zero_grad()


def move(rank, folder, layout, options):
    """A step on two ranks, a checkpoint for one process, and the weights after another step."""
    ranks, output = data_ranks(options), folder / "moved" / layout
    model = load(folder / MOVED, options)
    optimizer = adamw(model)
    step(model, optimizer, rank, ranks)
    model.save_pretrained(output)
    save_optimizer_distributed(model, optimizer, str(output / "optimizer"))
    step(model, optimizer, rank, ranks)
    return {name: full(p).detach().clone() for name, p in model.named_parameters()}


def balanced(rank, folder, options, ranks=2):
    """The routers' biases after a step in which every rank had other tokens."""
    folder = folder / "null experts"
    model = load(folder, options) if ranks > 1 else CoEForCausalLM.from_pretrained(folder)
    balance = RouterBalance(model.train(), rate=0.01)
    model(input_ids=tokens(4, 9).chunk(ranks)[rank], use_cache=False)
    balance.step()
    return [router.e_score_correction_bias for router in balance.routers.values()]


def count(rank, folder, model, options):
    """Calls and bytes of one micro-batch and bytes of weights held, summed over the ranks."""
    model = load(folder / model, options).train()
    rows = tokens(SETUP.batch_size, SETUP.sequence_length, seed=rank).clamp(max=model.config.vocab_size - 1)
    # The first backward pass is different: FSDP2 does not know its order yet.
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    with CommunicationCounter(rank, 2) as counter:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    held = Counter(weights=sum(parameter.to_local().nbytes for parameter in model.parameters()))
    counters = [None, None]
    distributed.all_gather_object(counters, (counter.calls, counter.bytes, counter.own, held))
    return [first + second for first, second in zip(*counters, strict=True)]


def on_rank(rank, port, folder):
    distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    tasks = {}
    for layout, options in LAYOUTS.items():
        ranks = data_ranks(options)
        for chain in CHAINS:
            tasks[chain, layout] = lambda options=options, ranks=ranks, chain=chain: loss_and_gradients(
                load(folder / chain, options), chain, rank % ranks, ranks
            )
        if ranks == 2:
            tasks["balanced", layout] = lambda options=options: balanced(rank, folder, options)
        if layout in SHARDED:
            tasks["moved", layout] = lambda layout=layout, options=options: move(rank, folder, layout, options)
        if options.get("fsdp_size"):
            for name in EVEN:
                tasks["counted", name, layout] = lambda name=name, options=options: count(rank, folder, name, options)
    results = {}
    for name, task in tasks.items():
        try:
            results[name] = task()
        except Exception as error:
            results[name] = error
    if rank == 0:
        torch.save(results, folder / "results.pt")
    distributed.destroy_process_group()


def run_on_two_ranks(folder):
    for chain, options in CHAINS.items():
        build(**SIZES | options).save_pretrained(folder / chain)
    for name, options in EVEN.items():
        build(**SIZES | options).save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (port, folder), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return folder, run_on_two_ranks(folder)


def outcome(results, *name):
    outcome = results[1][name]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_one_ranks_loss_and_gradients(results, layout, chain):
    if chain == "null experts" and "EP" in layout:
        with pytest.raises(ValueError, match="no rank holds the `num_null_experts=4`"):
            outcome(results, chain, layout)
        return
    loss, gradients = outcome(results, chain, layout)
    expected_loss, expected = loss_and_gradients(build(**SIZES | CHAINS[chain]), chain)
    assert (loss - expected_loss).abs() <= 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5, name


@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_biases_move_by_what_all_ranks_chose(results, layout):
    biases = outcome(results, "balanced", layout)
    expected = balanced(0, results[0], {}, ranks=1)
    for bias, wanted in zip(biases, expected, strict=True):
        assert wanted.abs().max() > 0
        assert torch.equal(bias, wanted)


def test_the_rank_without_tokens_has_indeed_none():
    chain = "a rank without tokens for its experts"
    logits = build(**SIZES | CHAINS[chain])(batch(chain), output_router_logits=True).router_logits
    starved = [layer.argmax(-1).lt(4).all() or layer.argmax(-1).ge(4).all() for layer in logits]
    assert any(starved) and not all(starved)


@pytest.mark.parametrize("layout", SHARDED)
def test_a_checkpoint_moves_from_one_rank_to_two_and_back(results, layout):
    weights = outcome(results, "moved", layout)
    folder = results[0] / "moved" / layout
    model, expected = CoEForCausalLM.from_pretrained(folder), build(**SIZES | CHAINS[MOVED])
    optimizer, never_moved = adamw(model), adamw(expected)
    step(expected, never_moved)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert (model(ids).logits - expected.eval()(ids).logits).abs().max() <= 1e-5
    # The optimizer's moments came along: the next step is the one of two ranks, and of a run that was never moved.
    load_optimizer_distributed(model, optimizer, str(folder / "optimizer"))
    step(model, optimizer)
    step(expected, never_moved)
    for name, parameter in model.named_parameters():
        assert (parameter - weights[name]).abs().max() <= 1e-5, name
        assert (parameter - expected.get_parameter(name)).abs().max() <= 1e-5, name


@pytest.mark.parametrize("model", EVEN)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "FSDP2" in layout])
def test_ranks_send_the_predicted_bytes(results, layout, model):
    calls, sent, own, held = outcome(results, "counted", model, layout)
    config = build(**SIZES | EVEN[model]).config
    predicted = traffic(config, SETUP, Layout(**LAYOUTS[layout]))
    assert held["weights"] / 2 == rank_memory(config, SETUP, Layout(**LAYOUTS[layout]))["weights"]
    for kind in ("expert_counts", "gather", "reduce"):
        assert (calls[kind] / 2, sent[kind] / 2) == predicted[kind], kind
    number, leaving = predicted["all_to_all"]
    assert calls["all_to_all"] / 2 == number
    # Half of the rows leave if tokens spread evenly over the experts, which they do only about.
    assert sent["all_to_all"] + own["all_to_all"] == 4 * leaving
    assert sent["all_to_all"] == pytest.approx(2 * leaving, rel=0.15)


def test_a_chain_sends_the_bytes_of_its_equal_compute_moe_in_more_calls():
    chain = traffic(build(**SIZES).config, SETUP, Layout(2, 2))["all_to_all"]
    moe = traffic(build(**SIZES, num_iterations=1, num_experts_per_tok=6).config, SETUP, Layout(2, 2))["all_to_all"]
    assert chain == (3 * moe[0], moe[1])


def test_the_plan_of_a_world_shows_calls_and_sizes(capsys):
    arguments = ["--model", "configuration/models/coe_c2_k4_n64.json", "--recipe", "configuration/pretrain/paper.yaml"]
    plan.main([*arguments, "--world", "8x80GB"])
    lines = capsys.readouterr().out.splitlines()
    # 4 layers x 2 iterations x (there, back) x (forward, backward) calls; 64 x 512 tokens x 4 experts x 1024 fp32
    # numbers, of which 7 in 8 leave the GPU.
    sent = 64 * 512 * 4 * 1024 * 4 * 7 / 8 / 2**20
    assert any(line.startswith("  all_to_all: calls") and line.endswith(f"32 x {sent:,.3f}") for line in lines)
    assert any(
        line.startswith("  all_to_all of the equal") and line.endswith(f"16 x {2 * sent:,.3f}") for line in lines
    )
    assert [line.split()[0] for line in lines[-6:]] == ["8", "16", "32", "64", "128", "256"]
    plan.main([*arguments, "--world", "12x80GB"])
    assert "FSDP2 + EP 4" in capsys.readouterr().out  # what 12 GPUs and 64 experts can be divided by


def write_counts(path):
    """What two ranks sent beside what was predicted, `PYTHONPATH=train python tests/test_distributed.py path.json`."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_on_two_ranks(Path(folder))
    config, facts = build(**SIZES | EVEN["even"]).config, {}
    for layout in (layout for layout in LAYOUTS if "FSDP2" in layout):
        calls, sent, own, held = results["counted", "even", layout]
        predicted = traffic(config, SETUP, Layout(**LAYOUTS[layout]))
        facts[layout] = {
            kind: {
                "calls": calls[kind] / 2,
                "bytes_sent": sent[kind] / 2,
                "bytes_kept": own[kind] / 2,
                "predicted_calls": number,
                "predicted_bytes_sent": size,
            }
            for kind, (number, size) in predicted.items()
        }
        weights = rank_memory(config, SETUP, Layout(**LAYOUTS[layout]))["weights"]
        facts[layout]["weights_bytes"] = {"held": held["weights"] / 2, "predicted": weights}
    facts = {"per": "rank and micro-batch, mean of two gloo ranks", "config": SIZES | EVEN["even"], "layouts": facts}
    write_json(Path(path), facts | {"micro_batch": [2, 33], **environment(torch.device("cpu"))})


if __name__ == "__main__":
    write_counts(sys.argv[1])

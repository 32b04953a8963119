# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Will it fit? What a preset costs under a recipe, before anything is allocated or downloaded:

    coe-plan --model configuration/models/coe_c2_k4_n64.json \\
        --recipe configuration/pretrain/paper_8gb.yaml --gpu 8GB

Prints parameters, FLOPs, memory by component and the equal-compute MoE; where the recipe does not fit the GPU, what
to change, the cheapest change first. Without `--gpu` that of this machine is meant. With `--world 8x80GB` it also
prints how the model lies on several GPUs, and what travels between them. To serve a model, without a recipe:

    coe-plan --model configuration/models/coe_c2_k4_n64.json --serve 1x4096 --ram 8GB

for one sequence of 4,096 tokens on a computer without a GPU, and `--gpu 8GB` for a GPU; in bf16 and in few bits. And

    coe-plan --recipe configuration/pretrain/paper_8gb.yaml --like moe_k8_n64 --save 42%

proposes models that compute as much as a preset and train in so much less memory.
"""

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from modeling_coe import CoEConfig
from modeling_coe.budget import (
    ServingSetup,
    TrainingSetup,
    count_active_parameters,
    count_expert_combinations,
    count_parameters,
    decoded_token_bytes,
    equal_compute_moe,
    forward_flops,
    kv_cache_bytes,
    largest_micro_batch,
    require_fixed_compute,
    serving_memory,
    training_flops,
    training_memory,
)
from modeling_coe.folders import require_model
from modeling_coe.train.arguments import (
    DataArguments,
    ModelArguments,
    PretrainArguments,
    command_line,
    find_configuration,
    parse,
    read_config,
    refuse_unknown,
    require_context,
    shipped,
    training_setup,
)
from modeling_coe.train.communication import Cluster, Layout, rank_memory, step_seconds, traffic


GIB = 2**30
# In this order: what costs nothing, what costs time, what changes the numbers.
REMEDIES = {
    "skip_logits: true": {"skip_logits": True},
    "experts_implementation: coe": {"experts_implementation": "coe"},
    "a smaller micro-batch, more accumulation": {"batch_size": 1},
    "gradient_checkpointing: true": {"gradient_checkpointing": True},
    "optim: adamw_torch_8bit": {"optimizer": "adamw_8bit"},
    "dtype: bfloat16, optim_args: bf16_stochastic_round=True": {"dtype": "bfloat16", "autocast": False},
    "optim: paged_adamw_8bit (states in main memory)": {"optimizer": "adamw_8bit", "offload_optimizer": True},
}


SERVED = {
    "bf16": {},
    "experts int8": {"expert_bits": 8},
    "experts int4": {"expert_bits": 4},
    "int4, rest int8": {"expert_bits": 4, "rest_bits": 8},
}


def memory_size(text: str) -> int:
    """`8GB` and `8GiB`, as GPUs are sold, are 8 * 2**30 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*Gi?B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory size; write for instance 8GB")
    return int(float(match[1]) * GIB)


def world_size(text: str) -> tuple[int, int]:
    """`8x80GB`: 8 GPUs of 80 * 2**30 bytes."""
    count, _, memory = text.partition("x")
    if not count.isdigit() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs with their memory; write for instance 8x80GB")
    return int(count), memory_size(memory)


def batch_and_length(text: str) -> tuple[int, int]:
    """`8x4096`: 8 sequences of 4,096 tokens."""
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit()) or min(int(batch), int(length)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of sequences and tokens; write for instance 1x4096")
    return int(batch), int(length)


def row(name: str, *values: str):
    print(f"  {name:<34}" + "".join(f"{value:>22}" for value in values))


def has_equal_compute_moe(config: CoEConfig) -> bool:
    visits = config.num_iterations * config.num_experts_per_tok
    return config.num_null_experts == 0 and visits <= config.num_local_experts


def print_comparison(config: CoEConfig, setup: TrainingSetup):
    """The preset beside the MoE that computes as much per token."""
    configs = [config]
    if config.num_iterations > 1 and has_equal_compute_moe(config):
        configs.append(equal_compute_moe(config))
    names = [f"CoE-{c.num_iterations}({c.num_experts_per_tok}/{c.num_local_experts})" for c in configs]
    length = setup.sequence_length
    print("Model")
    row("", *(name if number == 0 else f"{name} = MoE" for number, name in enumerate(names)))
    for component in count_parameters(config):
        row(f"{component} parameters", *(f"{count_parameters(c)[component]:,}" for c in configs))
    row("parameters", *(f"{sum(count_parameters(c).values()):,}" for c in configs))
    row("active parameters", *(f"{count_active_parameters(c):,}" for c in configs))
    row("forward MFLOPs a token", *(f"{sum(forward_flops(c, length).values()) / 1e6:,.1f}" for c in configs))
    if config.num_null_experts > 0:
        row("experts a token and iteration", f"{config.expert_budget:g} on average")
    training = (training_flops(c, length, setup.gradient_checkpointing) / 1e6 for c in configs)
    row("training MFLOPs a token", *(f"{value:,.1f}" for value in training))
    row("expert combinations of a layer", *(f"{count_expert_combinations(c):,}" for c in configs))
    row("training memory, GiB", *(f"{sum(training_memory(c, setup).values()) / GIB:.2f}" for c in configs))
    row("KV cache of 1,000 tokens, MiB", *(f"{kv_cache_bytes(c, 1, 1000) / 2**20:.1f}" for c in configs))


def print_memory(config: CoEConfig, setup: TrainingSetup, budget: int):
    memory = training_memory(config, setup)
    total = sum(memory.values())
    shape = f"{setup.batch_size} x {setup.sequence_length} tokens"
    print(f"\nMemory, micro-batch {shape}, experts `{setup.experts_implementation}`")
    for component, size in memory.items():
        row(component, f"{size / GIB:.3f} GiB")
    row("predicted peak", f"{total / GIB:.3f} GiB")
    largest = largest_micro_batch(config, setup, budget)
    if total <= budget:
        print(f"\nFits {budget / GIB:.2f} GiB, {(budget - total) / GIB:.2f} GiB to spare.")
        print(f"Micro-batches up to {largest} fit.")
        return
    print(f"\nDoes not fit {budget / GIB:.2f} GiB: {(total - budget) / GIB:.2f} GiB too much. Change, in this order:")
    for name, change in REMEDIES.items():
        changed = replace(setup, **change)
        after = sum(training_memory(config, changed).values())
        if after < total:
            setup, total = changed, after
            print(f"  {name:<58} -> {after / GIB:7.3f} GiB")
            if after <= budget:
                print(f"Then it fits; micro-batches up to {largest_micro_batch(config, setup, budget)} do.")
                return
    print("Still too much: take a smaller preset, or shard it over several GPUs (--world).")


def print_serving(config: CoEConfig, batch_size: int, length: int, budget: int, on_cpu: bool):
    """Memory while a prompt of the whole length is read, and what decoding reads, in every number of bits."""
    setups = [ServingSetup(batch_size, length, on_cpu=on_cpu, **options) for options in SERVED.values()]
    memory = [serving_memory(config, setup) for setup in setups]
    print(f"\nServing {batch_size} x {length} tokens within {budget / GIB:.2f} GiB")
    row("", *SERVED)
    for component in memory[0]:
        row(component, *(f"{sizes[component] / GIB:.3f} GiB" for sizes in memory))
    totals = [sum(sizes.values()) for sizes in memory]
    row("predicted peak", *(f"{total / GIB:.3f} GiB" for total in totals))
    row("", *("fits" if total <= budget else "does not fit" for total in totals))
    row("read for a decoded token, MiB", *(f"{decoded_token_bytes(config, setup) / 2**20:.1f}" for setup in setups))


def calls_and_size(calls: int, sent: float) -> str:
    return f"{calls} x {sent / max(calls, 1) / 2**20:,.3f}"


def print_world(config: CoEConfig, setup: TrainingSetup, gpus: int, memory: int):
    """Memory, traffic and time of a rank: data parallel, sharded (FSDP2), and sharded with expert parallelism."""
    cluster = Cluster(gpus_per_node=min(gpus, 8))
    experts = math.gcd(config.num_local_experts, cluster.gpus_per_node, gpus)
    layouts = {
        "DDP": Layout(dp_replicate_size=gpus),
        "FSDP2": Layout(fsdp_size=gpus),
        f"FSDP2 + EP {experts}": Layout(fsdp_size=gpus, ep_size=experts),
    }
    print(f"\n{gpus} GPUs, {setup.batch_size} x {setup.sequence_length} tokens each; assumed: {cluster}")
    row("", *layouts)
    peaks = [sum(rank_memory(config, setup, layout).values()) for layout in layouts.values()]
    row("memory of a GPU", *(f"{peak / GIB:.2f} GiB{'' if peak <= memory else ' (too much)'}" for peak in peaks))
    kinds = [traffic(config, setup, layout) for layout in layouts.values()]
    for kind in ("all_to_all", "gather", "reduce", "replicas"):
        row(f"{kind}: calls, MiB sent", *(calls_and_size(*sent[kind]) for sent in kinds))
    if has_equal_compute_moe(config):
        calls, sent = traffic(equal_compute_moe(config), setup, [*layouts.values()][-1])["all_to_all"]
        row("all_to_all of the equal-compute MoE", "", "", calls_and_size(calls, sent))
    times = [step_seconds(config, setup, layout, cluster) for layout in layouts.values()]
    for cause in times[0]:
        row(f"{cause}, ms", *(f"{1000 * time[cause]:,.2f}" for time in times))


def print_scaling(config: CoEConfig, setup: TrainingSetup):
    """Expected tokens per second up to 256 GPUs: nodes of 8, each a sharded copy, experts within the node."""
    cluster = Cluster()
    experts = math.gcd(config.num_local_experts, cluster.gpus_per_node)
    ideal = setup.tokens / step_seconds(config, setup, Layout(), cluster)["compute"]
    print("\nExpected scaling, one copy per node of 8 (dp_replicate_size = nodes)")
    row("GPUs", "FSDP2, tokens/s", "share of compute", f"+ EP {experts}, tokens/s", "share of compute")
    for nodes in (1, 2, 4, 8, 16, 32):
        values = []
        for layout in (Layout(8, 1, nodes), Layout(8, experts, nodes)):
            speed = setup.tokens / step_seconds(config, setup, layout, cluster)["total"]
            values += [f"{8 * nodes * speed:,.0f}", f"{speed / ideal:.1%}"]
        row(str(8 * nodes), *values)


def share(text: str) -> float:
    """`42%` is 0.42."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if match is None or not 0 < float(match[1]) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0% and 100%; write for instance 42%")
    return float(match[1]) / 100


def preset(name: str) -> str:
    """A path as it is, `moe_k8_n64` as that preset's."""
    if Path(name).exists():
        return name
    path = Path(find_configuration(f"configuration/models/{name}.json"))
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (Path(__file__).parents[1] / "configuration/models").iterdir()))
        raise argparse.ArgumentTypeError(f"{name!r} is no preset; choose one of {known}")
    return str(path)


def propose(config: CoEConfig, setup: TrainingSetup, saving: float) -> list[CoEConfig]:
    """For each number of iterations and of layers a pool, the most experts whose training saves so much memory.

    All compute as much as `config`, within 5 %: the same visits of an expert in each layer, by routers whose size
    depends on the experts to choose from. A pool of several layers may have the experts of them all.

    Raises:
        ValueError: `config` has null experts.
    """
    require_fixed_compute(config)
    layers, visits = config.num_hidden_layers, config.num_iterations * config.num_experts_per_tok
    whole, flops = sum(training_memory(config, setup).values()), training_flops(config, setup.sequence_length)
    proposals = []
    # A single expert's renormalised weight is 1, whatever its router says.
    least = 2 if config.norm_topk_prob else 1
    for iterations in (count for count in (1, 2, 4) if visits % count == 0 and visits // count >= least):
        for together in (count for count in range(1, layers + 1) if layers % count == 0):
            step = max(1, config.num_local_experts // 8)
            for experts in range(together * config.num_local_experts, visits // iterations - 1, -step):
                candidate = CoEConfig(
                    **config.to_dict()
                    | {"num_iterations": iterations, "num_experts_per_tok": visits // iterations}
                    | {"num_local_experts": experts, "layers_per_pool": together}
                )
                saved = 1 - sum(training_memory(candidate, setup).values()) / whole
                if saved >= saving and abs(training_flops(candidate, setup.sequence_length) / flops - 1) <= 0.05:
                    proposals.append(candidate)
                    break
    return proposals


def print_proposals(name: str, config: CoEConfig, setup: TrainingSetup, saving: float):
    whole = sum(training_memory(config, setup).values())
    proposals = propose(config, setup, saving)
    print(f"To train like {name} in {saving:.0%} less memory than its {whole / GIB:.2f} GiB, at its compute:\n")
    if not proposals:
        print("Nothing does: what is not in the experts takes too much. Lower the recipe's micro-batch, or recompute.")
        return
    row("C, K, N, layers_per_pool", "parameters", "memory, GiB", "saved", "compute")
    for proposal in sorted(proposals, key=lambda proposal: -proposal.num_local_experts / proposal.layers_per_pool):
        memory = sum(training_memory(proposal, setup).values())
        flops = training_flops(proposal, setup.sequence_length) / training_flops(config, setup.sequence_length)
        sizes = (proposal.num_iterations, proposal.num_experts_per_tok, proposal.num_local_experts)
        parameters = f"{sum(count_parameters(proposal).values()):,}"
        values = (parameters, f"{memory / GIB:.2f}", f"{1 - memory / whole:.0%}", f"{flops:.2f}x")
        row(", ".join(map(str, (*sizes, proposal.layers_per_pool))), *values)
    print("\nOnly memory is predicted here, not the loss.")


def read_options(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    description = __doc__ + shipped("pretrain", "models")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="preset or checkpoint; default: the recipe's")
    parser.add_argument("--recipe", "--config", help="recipe (YAML) to train with")
    parser.add_argument("--gpu", type=memory_size, help="memory of the GPU, for instance 8GB")
    parser.add_argument("--reserve", type=memory_size, default="0.5GB", help="for CUDA or Python itself; 0.5GB")
    parser.add_argument("--world", type=world_size, help="number of GPUs and their memory, for instance 8x80GB")
    parser.add_argument("--serve", type=batch_and_length, help="sequences x tokens to serve, for instance 1x4096")
    parser.add_argument("--ram", type=memory_size, help="with --serve: memory of a computer without a GPU")
    parser.add_argument("--like", type=preset, help="preset to save memory on, for instance moe_k8_n64; with --save")
    parser.add_argument("--save", type=share, help="share of its training memory to save, for instance 42%%")
    options, unknown = parser.parse_known_args(arguments)
    refuse_unknown(unknown, parser, "The command line")
    for name in ("gpu", "ram"):
        if getattr(options, name) == 0:
            parser.error(f"--{name} is 0; write for instance 8GB")
    if options.ram is not None and options.serve is None:
        parser.error("--ram is the memory to --serve from; a recipe is planned for a --gpu")
    if (options.like is None) != (options.save is None):
        parser.error("--like and --save go together: which model, and how much less memory")
    if options.serve is None and options.recipe is None:
        parser.error("name a --recipe to train with, or what to --serve")
    return parser, options


@command_line
def main(arguments: list[str] | None = None):
    parser, options = read_options(arguments)
    if options.serve is not None:
        memory = options.ram or options.gpu
        if options.model is None or memory is None:
            parser.error("--serve needs a --model, and --gpu 8GB or --ram 8GB")
        require_model("model", find_configuration(options.model))
        config = read_config(options.model)
        require_context(options.serve[1], options.model, config)
        print_serving(config, *options.serve, memory - options.reserve, on_cpu=options.ram is not None)
        return
    if options.like is not None:
        options.model = options.like
    overrides = [] if options.model is None else ["--model", options.model]
    # Recipes for a GPU are planned anywhere.
    overrides += ["--config", options.recipe, "--use_cpu", "true"]
    model, data, training = parse(ModelArguments, DataArguments, PretrainArguments, arguments=overrides)
    if options.like is not None:
        setup = training_setup(model, training, data.sequence_length)
        print_proposals(Path(options.like).stem, read_config(model.model), setup, options.save)
        return
    if options.gpu is None and options.world is not None:
        options.gpu = options.world[1]
    if options.gpu is None:
        if not torch.cuda.is_available():
            parser.error("this machine has no CUDA GPU; name one's memory with --gpu 8GB")
        options.gpu = torch.cuda.get_device_properties(0).total_memory
    config = read_config(model.model)
    setup = training_setup(model, training, data.sequence_length)
    print(f"{model.model} under {options.recipe}\n")
    print_comparison(config, setup)
    print_memory(config, setup, options.gpu - options.reserve)
    if options.world is not None:
        gpus, memory = options.world
        print_world(config, setup, gpus, memory - options.reserve)
        print_scaling(config, setup)


if __name__ == "__main__":
    main()

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Renders the README's tables from the committed results, so that no number in them is typed by hand.

python train/studies/readme.py     # rewrites what stands between `<!-- table: name -->` and `<!-- end -->`
"""

import json
import re
from pathlib import Path

from modeling_coe import CoEConfig
from modeling_coe.budget import ServingSetup, TrainingSetup, training_memory, weight_bytes
from modeling_coe.train.studies.pool_memory import MODELS, PLAIN
from modeling_coe.train.studies.verdicts import difference_across, difference_of


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "studies"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main():
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


def render(readme: str) -> str:
    """The README with every marked table rendered anew.

    Raises:
        KeyError: a marker names no table of this file.
    """
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", readme)


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(*rows: tuple[str, ...]) -> str:
    """Rows of cells as markdown; the first row is the head."""
    head, *body = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def speed() -> str:
    """Speed and bytes of chains beside transformers' Mixtral at equal compute."""
    suites = {name: suite["results"] for name, suite in result("benchmark_cpu").items()}
    labels = {
        "training step, speed": ("train_step", "train step"),
        "block, forward and backward, speed": ("block", "block, hidden 256"),
        "decoding one sequence, speed": ("decode", "decode, batch 1,"),
        "decoding 16 sequences, speed": ("decode", "decode, batch 16,"),
        "bytes a block keeps for backward": ("memory", "bytes a block keeps for backward, hidden 256"),
        "peak of a step beyond weights and optimizer": ("memory", "peak of a train step"),
    }
    chains = ("CoE-1(8/64)", "CoE-2(4/64)", "CoE-4(2/64)")
    rows = [("relative to Mixtral", *chains)]
    for label, (suite, prefix) in labels.items():
        (measured,) = (value for key, value in suites[suite].items() if key.startswith(prefix))
        rows.append((label, *(f"{measured[chain]['ratio']:.2f}x" for chain in chains)))
    return table(*rows)


def use() -> str:
    """When to take a chain and when Mixtral, what either costs, and where that was measured."""
    suites = {name: suite["results"] for name, suite in result("benchmark_cpu").items()}
    (kept,) = (value for key, value in suites["memory"].items() if key.startswith("peak of a train step"))
    (batch,) = (value for key, value in suites["decode"].items() if key.startswith("decode, batch 16,"))
    chain, nested, mixtral = "CoE-2(4/64)", "nested CoE-2(4/64)", "Mixtral MoE(8/64)"
    at_7m = [claim(name, nested, mixtral)["difference"] for name in ("equal_compute_cpu", "equal_compute_small")]
    at_7m += [judged["difference"] for judged in result("initialisation_small")["claims"]]
    paper = result("pool_memory_paper")["rows"]
    pools = [f"CoE-2(4/64), {layers} layers a pool" for layers in ("two", "four")]
    two, four = (paper[pool]["plain"]["of_mixtrals_peak"] for pool in pools)
    of_16 = [peak(MODELS[pool], 16) / peak(MODELS[mixtral], 16) for pool in pools]
    half, quarter = (
        peak(MODELS[mixtral] | {"num_local_experts": experts}, 1) / peak(MODELS[mixtral], 1) for experts in (32, 16)
    )
    speeds = [result(f"pool_memory_{shape}")["rows"] for shape in ("paper", "small", "gsm8k")]
    speeds = [rows["CoE-2(4/32)" if chain not in rows else chain]["speed"] for rows in speeds]
    file = result("low_bits")["files"][chain]["experts int4"]["of bf16"]
    return table(
        ("", ""),
        (
            "Take it",
            "to train a mixture of experts, Mixtral too, in less memory "
            '(`experts_implementation="coe"`), to store experts in 4 bits (the file is '
            f"{file:.2f}x that of bf16 at the paper's shape), to turn down how many experts a token computes after "
            "training, or to study chains and shared pools under Mixtral's names.",
        ),
        (
            "Take Mixtral",
            "as a rule, for the lowest loss from a given compute or in a given memory, and for serving batches: a "
            f"chain decodes 16 sequences at once at {batch[chain]['ratio']:.2f}x its speed, because two choices of "
            "four touch more experts than one choice of eight. It is here too, as `num_iterations=1`.",
        ),
        (
            "Does a chain learn better?",
            "At equal compute in one case, as far as we saw: where one visit would have to use every expert. With 7 M "
            "parameters on maths problems it ends between "
            f"{-min(at_7m):.2f} nats a token below Mixtral and {max(at_7m):.2f} above, depending on the "
            "initialisation; where it ends below, so does Mixtral with doubled router weights. A tenth of a nat "
            "changes the perplexity by 10 %.",
        ),
        (
            "What does training a chain cost?",
            f"{min(speeds):.2f}x to {max(speeds):.2f}x Mixtral's speed where both run our code of the experts, the "
            'faster the larger the model, and the same peak. That code is `experts_implementation="coe"`, for Mixtral '
            "too: against Mixtral with transformers' own, `grouped_mm`, the memory of a step beyond weights and "
            f"optimizer is {kept['CoE-1(8/64)']['ratio']:.2f}x with one iteration, {kept[chain]['ratio']:.2f}x with "
            "two.",
        ),
        (
            "Does a shared pool save memory?",
            "Yes: with one sequence of 512 tokens a step, the peak of a chain whose layers share pools of 64 experts "
            f"in twos (half the experts) is {two:.2f}x Mixtral's, in fours (a quarter) {four:.2f}x; with 16 sequences "
            f"{of_16[0]:.2f}x and {of_16[1]:.2f}x, predicted. Without sharing, as few experts in all save slightly "
            f"more: {half:.2f}x and {quarter:.2f}x (predicted, one sequence). On text we saw no gain of sharing over "
            "that. A pool with as many experts in all saves nothing; it stores more made-up facts.",
        ),
    )


def evidence() -> str:
    """What was compared, at which cost, how it ended, and where."""
    maths, small, sources, facts = "maths, 2.9 M", "maths, 7 M", "Python", "made-up facts"
    higher, rates, scaled = "Python, higher rate", "higher_rate_narrow", ", learned scale"
    nested, mixtral, twice, plain = "nested CoE-2(4/64)", "Mixtral MoE(8/64)", "CoE-2(8/16)", "MoE(8/16)"
    whole, cut, quarter, pool = "MoE(4/16)", "MoE(4/9), 56 %", "MoE(4/4), 25 %", "One pool for four layers"
    chains, shared, storage, twos = "chain_narrow", "promise_narrow", "storage_capo", "arrangements_narrow"
    compared = (
        (maths, "a chain of two, one visit", "seeds_tiny", nested, mixtral),
        (small, "a chain of two, one visit", "equal_compute_small", nested, mixtral),
        (sources, "a chain of two, one visit", chains, "CoE-2(4/16)", plain),
        (sources, "two visits to 8 experts, one to 8", chains, twice, plain),
        (sources, "two visits to 8 experts, one to all 16", chains, twice, "MoE(16/16)"),
        (higher, "a chain of two, one visit", rates, f"CoE-2(4/16){scaled}", f"{plain}{scaled}"),
        (higher, "two visits to 8 experts, one to all 16", rates, f"{twice}{scaled}", f"MoE(16/16){scaled}"),
        (sources, "two visits, twice the layers on the same experts", chains, twice, "MoE(8/16), 8 layers on 4 pools"),
        (sources, "two visits, twice the layers and experts", chains, twice, "MoE(8/16), 8 layers"),
        (sources, "56 % of the experts, all", shared, cut, whole),
        (sources, "56 % of them: one pool, a pool a layer", shared, f"{pool} (4/36), 56 %", cut),
        (sources, "25 % of them: one pool, a pool a layer", shared, f"{pool} (4/16), 25 %", quarter),
        (sources, "all in pools for two layers, a pool a layer", twos, "Pools for two layers (4/32)", whole),
        (sources, "all in one pool, a pool a layer", shared, f"{pool} (4/64)", whole),
        (higher, "all in one pool, a pool a layer", rates, f"{pool} (4/64)", whole),
        (facts, "all in one pool, a pool a layer", storage, f"{pool} (4/64)", whole),
        (facts, "two visits to 4 experts, one to 4", storage, "CoE-2(4/16)", whole),
    )  # fmt: skip
    rows = [("trained on", "the first against the second", "compute", "weights", "difference", "seeds")]
    for data, what, name, row, than in compared:
        judged, (first, second) = result(name), (result(name)["rows"][one] for one in (row, than))
        rows.append(
            (
                data,
                what.replace(", ", " against "),
                f"{first['flops_ratio'] / second['flops_ratio']:.2f}x",
                f"{first['parameters'] / second['parameters']:.2f}x",
                difference_of(judged, row, than),
                str(len(first["runs"])),
            )
        )
    scale, as_it_is = (
        difference_across(result(chains), name, result("instrument_narrow"), plain) for name in (plain, "CoE-2(4/16)")
    )
    where = f"""
* Maths problems: GSM8K, at sizes that cannot tell numbers of experts apart. At 7 M, doubled router weights lower the
  loss of Mixtral's block as much as the chain does.
* Python sources: 0.2 M to 1 M parameters, where four times the experts lower the loss by 0.1. In the comparisons of
  chains every model learns a scale of its output. That alone raised the loss of Mixtral's block by
  {scale}; against Mixtral's block as it is, a chain of two ends
  {as_it_is}.
* Made-up facts: 0.1 M to 0.3 M parameters. Whether numbers of experts can be told apart at this size was not tested as
  it was for Python sources.
* Each model trained at the better of two learning rates, on Python sources almost always the higher one. "Higher rate"
  is the better of that and one above both ([higher_rate_narrow.json](model_cards/studies/higher_rate_narrow.json)). At
  a rate above both the gain in made-up facts stays.
* Whether any of it says something about larger models is open. Peaks and files: the paper's shape, 636 M parameters
  with a vocabulary of 32,000. Decoding, and what is kept for the backward pass: 2 layers of width 256."""
    return table(*rows) + "\n" + where


def peak(model: dict, batch_size: int) -> int:
    """Bytes at the peak of a step of sequences of 512 tokens in bf16, as budget.py predicts them, of a model in the
    shape of pool_memory_paper.json."""
    config = CoEConfig(**result("pool_memory_paper")["shape"], **model)
    return sum(training_memory(config, TrainingSetup(**PLAIN | {"batch_size": batch_size})).values())


def pools() -> str:
    """Loss and bytes of the weights with a part of the experts, with and without shared pools."""
    losses = result("promise_narrow")
    rows = [
        ("trained on Python sources", "parameters", "weights in bf16", "experts in 4 bits", "validation loss in fp32")
    ]
    for name, row in losses["rows"].items():
        config = CoEConfig(**losses["config"] | row["config"])
        sizes = (sum(weight_bytes(config, ServingSetup(expert_bits=bits)).values()) for bits in (None, 4))
        rows.append(
            (
                name,
                f"{row['parameters'] / 1e6:.2f} M",
                *(f"{size / 2**20:.2f} MiB" for size in sizes),
                f"{row['mean_validation_loss']:.3f} ± {row['standard_deviation']:.3f}",
            )
        )
    return table(*rows)


def low_bits() -> str:
    """What few bits save and how fast they decode, of a chain of the paper's shape and of Mixtral."""
    measured, chain, mixtral = result("low_bits"), "CoE-2(4/64)", "Mixtral MoE(8/64)"
    rows = [("paper's shape, 636 M parameters", "file", "memory in use", "decoding one sequence", "eight sequences")]
    names = ("experts int8", "all int8", "experts int4", "experts int4, groups of 64, rest int8")
    for model, name in (*((chain, name) for name in names), (mixtral, "experts int4")):
        sizes = [f"{measured[section][model][name]['of bf16']:.2f}x" for section in ("files", "resident memory")]
        if "note" in measured["resident memory"][model]:  # what it is relative to has its experts twice
            sizes[-1] = "not comparable"
        speeds = (measured["decoding"][f"batch {n}"][model][name]["ratio to bf16"][0] for n in (1, 8))
        rows.append((f"{model}, {name}", *sizes, *(f"{value:.2f}x" for value in speeds)))
    return table(*rows)


def claim(name: str, row: str, than: str) -> dict:
    """The claim of a result that `row` ends lower than `than`, or no higher."""
    return next(one for one in result(name)["claims"] if (one["row"], one["than"]) == (row, than))


def compatibility() -> str:
    """Which programs run a chain, in which version, and the test that shows it."""
    rows = [("program", "version", "what runs", "limit", "shown by")]
    for row in result("compatibility"):
        version = row["version"] if "version" in row else pinned(row["package"])
        version = f"{row['oldest']} and {version}" if "oldest" in row else version
        rows.append((row["program"], version, row["runs"], row["limit"], shown_by(row["shown_by"])))
    return table(*rows)


def pinned(package: str) -> str:
    """The version that the tests install, or the oldest that an extra of the package asks for."""
    for name in ("constraints.txt", "tests/vllm_requirements.txt"):
        if found := re.search(rf"^{package}==(.+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE):
            return found[1]
    bound = re.search(rf'"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return f"{bound[1]} or newer"


def shown_by(name: str | None) -> str:
    if name is None:
        return "no test"
    path = name.partition("::")[0]
    return f"[{path.removeprefix('tests/')}]({path})" if path.startswith("tests/") else f"`{name}`"


TABLES = {
    "compatibility": compatibility,
    "evidence": evidence,
    "low_bits": low_bits,
    "pools": pools,
    "speed": speed,
    "use": use,
}


if __name__ == "__main__":
    main()

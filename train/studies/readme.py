# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Renders the README's tables from the committed results, so that no number in them is typed by hand.

python train/studies/readme.py     # rewrites what stands between `<!-- table: name -->` and `<!-- end -->`
"""

import json
import re
from pathlib import Path


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
    (peak,) = (value for key, value in suites["memory"].items() if key.startswith("peak of a train step"))
    (step,) = (value for key, value in suites["train_step"].items() if key.startswith("train step"))
    (batch,) = (value for key, value in suites["decode"].items() if key.startswith("decode, batch 16,"))
    chain, nested, mixtral = "CoE-2(4/64)", "nested CoE-2(4/64)", "Mixtral MoE(8/64)"
    at_3m = difference("seeds_tiny", nested, mixtral)
    at_7m = [difference(name, nested, mixtral) for name in ("equal_compute_cpu", "equal_compute_small")]
    at_7m += [claim["difference"] for claim in result("initialisation_small")["claims"]]
    paper = result("pool_memory_paper")["rows"]
    two, four = (
        paper[f"CoE-2(4/64), {layers} layers a pool"]["plain"]["of_mixtrals_peak"] for layers in ("two", "four")
    )
    file = result("low_bits")["files"][chain]["experts int4"]["of bf16"]
    shared = difference("pools_tiny", "CoE-2(4/32), one pool of a quarter", "Mixtral MoE(8/32)")
    return table(
        ("", ""),
        (
            "Take it",
            "to train a mixture of experts in less memory (layers that share a pool: the peak of a step is "
            f"{two:.2f}x Mixtral's where two share one, {four:.2f}x where four do), to store experts in 4 bits (the "
            f"file is {file:.2f}x), to let easy tokens compute fewer experts, or to study chains under Mixtral's "
            "names.",
        ),
        (
            "Take Mixtral",
            "for the lowest loss from a given compute, and for serving batches: 16 sequences at once decode at "
            f"{batch[chain]['ratio']:.2f}x its speed, because two choices of four touch more experts than one choice "
            "of eight. It is here too, as `num_iterations=1`.",
        ),
        (
            "What does training a chain cost?",
            f"As much time as Mixtral ({step[chain]['ratio']:.2f}x its speed), and {peak[chain]['ratio']:.2f}x its "
            "memory on top of weights and optimizer states.",
        ),
        (
            "Does a chain learn better?",
            f"We could not show it. At equal compute and memory, its validation loss ends {at_3m:+.2f} nats (natural "
            f"units, per token) from Mixtral's at 2.9 M parameters, and {min(at_7m):+.2f} to {max(at_7m):+.2f} at "
            "7 M, depending on the initialisation; where it gains, Mixtral with doubled router weights gains as much.",
        ),
        (
            "What does a shared pool cost?",
            f"Four layers on one pool of a quarter of the experts ended {shared:+.2f} nats from Mixtral, which three "
            "seeds do not decide.",
        ),
        (
            "Where was that measured?",
            "Loss: models of 2.9 M and 7 M parameters trained on GSM8K, three to ten seeds, at sizes that cannot tell "
            "numbers of experts apart. Memory: the paper's shape, 636 M. Whether the losses say anything about larger "
            "models is open.",
        ),
    )


def pools() -> str:
    """Loss, memory and speed of one training run on GSM8K with and without shared pools."""
    losses, costs = result("pools_tiny")["rows"], result("pool_memory_gsm8k")["rows"]
    rows = [("trained on GSM8K", "parameters", "validation loss", "peak of a step", "speed of a step")]
    for name, cost in costs.items():
        loss = losses[name]
        rows.append(
            (
                name,
                f"{cost['parameters'] / 1e6:.1f} M",
                f"{loss['mean_validation_loss']:.3f} ± {loss['standard_deviation']:.3f}",
                f"{cost['plain']['of_mixtrals_peak']:.2f}x",
                f"{cost['speed']:.2f}x",
            )
        )
    return table(*rows)


def low_bits() -> str:
    """What few bits save and how fast they decode, of a chain of the paper's shape."""
    measured, chain = result("low_bits"), "CoE-2(4/64)"
    rows = [("paper's shape, 636 M parameters", "file", "resident", "decoding one sequence", "eight sequences")]
    names = ("experts int8", "all int8", "experts int4", "experts int4, groups of 64, rest int8")
    for name in names:
        sizes = (measured[section][chain][name]["of bf16"] for section in ("files", "resident memory"))
        speeds = (measured["decoding"][f"batch {n}"][chain][name]["ratio to bf16"][0] for n in (1, 8))
        rows.append((name, *(f"{value:.2f}x" for value in (*sizes, *speeds))))
    return table(*rows)


def difference(name: str, row: str, than: str) -> float:
    """How far `row` ends above `than`, in nats."""
    return next(one["difference"] for one in result(name)["claims"] if (one["row"], one["than"]) == (row, than))


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


TABLES = {"compatibility": compatibility, "low_bits": low_bits, "pools": pools, "speed": speed, "use": use}


if __name__ == "__main__":
    main()

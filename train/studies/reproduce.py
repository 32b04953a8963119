# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Run a table of variants, each at its own best learning rate and with several seeds, and judge its claims.

    python train/studies/reproduce.py --table configuration/studies/equal_compute.yaml \\
        --scale cpu --dataset path/to/gsm8k

A row of the table overrides fields of the scale's preset; `depth: 2` doubles its layers, `length: 3` trains for three
times the steps, `recipe:` overrides its recipe, `form:` is one of forms.py, `budget: 2` scores its run at two experts
a token and iteration and `bits: 4` with its experts in four bits. Each learning rate is tried with the first seed; the
one with the lowest validation loss, or with `measure: unsolved` the smallest share of unsolved problems, runs with the
others. A table's `scale:` gives it seeds or rates of its own.
Every run is a run of train/pretrain.py in a folder of its own, shared by all tables that need it: what is finished
is not run again, nor what `<results_dir>/runs/<scale>.json` records of runs on another machine. Writes
`<results_dir>/<table>_<scale>.json`, and a picture if the table asks for one.

    python train/studies/reproduce.py --table configuration/studies/memory.yaml --scale cpu --only_memory true

trains nothing and measures the peak memory of a training step of every row: `<table>_<scale>_memory.json`.
"""

import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import yaml
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_coe import CoEConfig, CoEForCausalLM, QuantizedExpertsConfig
from modeling_coe.budget import (
    ServingSetup,
    TrainingSetup,
    count_parameters,
    training_flops,
    training_memory,
    weight_bytes,
)
from modeling_coe.routing import watched_choices
from modeling_coe.train.arguments import DataArguments, command_line, parse
from modeling_coe.train.checkpoints import write_json
from modeling_coe.train.data import collate, load_documents, pack
from modeling_coe.train.report import environment, peak_bytes, save_picture


# Student's t, two-sided 95 %, by the number of seeds.
T_95 = {
    2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
    10: 2.262, 11: 2.228, 12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145, 16: 2.131,
}  # fmt: skip
EQUAL_COMPUTE = 0.05
# What can be claimed of runs, the lower the better: nats per token of the validation documents, and the share of
# the scored validation problems whose answer is wrong.
MEASURES = {
    "validation_loss": lambda run: run["validation_loss"],
    "unsolved": lambda run: 1 - run["share_solved"],
}
# One lock for each run's folder.
TRAINING = defaultdict(Lock)


@dataclass
class ReproduceArguments:
    """Which table to run, at which scale, and where its runs and its result go."""

    table: str = field(metadata={"help": "A table of configuration/studies."})
    scale: str = field(default="cpu", metadata={"help": "One of configuration/studies/scales."})
    dataset: str | None = field(default=None, metadata={"help": "In place of the scale's: a Hub id, file or folder."})
    runs_dir: str = field(default="runs/reproduce", metadata={"help": "One folder for every run."})
    results_dir: str = field(default="model_cards/studies", metadata={"help": "Where the result goes."})
    jobs: int = field(default=1, metadata={"help": "Runs at the same time."})
    only_memory: bool = field(default=False, metadata={"help": "Measure the memory of every row, train nothing."})

    def __post_init__(self):
        if self.jobs < 1:
            raise ValueError(f"`jobs={self.jobs}` must be at least 1.")


@dataclass(frozen=True)
class Scale:
    """At which size a table runs: a recipe of train/pretrain.py, the learning rates to try, the seeds; `fields` are
    those in which its models differ from the recipe's preset."""

    recipe: dict
    learning_rates: list[float]
    seeds: list[int]
    fields: dict = field(default_factory=dict)

    def __post_init__(self):
        if not self.learning_rates or len(self.seeds) not in T_95:
            raise ValueError(
                f"`learning_rates={self.learning_rates}`, `seeds={self.seeds}`: give one rate and {min(T_95)} to "
                f"{max(T_95)} seeds at least."
            )


@dataclass(frozen=True)
class Claim:
    """`row` ends at a lower value of the table's measure than `than`; with `as_good`, at one that is no higher.

    Lists of rows are compared pair by pair, and a seed counts once, with its mean over the pairs: it has the same
    documents and initialisation in all of them. Differences below `margin` do not count: nats of validation loss, or a
    share of the problems. `published` holds the paper's losses of both.
    """

    claim: str
    row: str | list[str]
    than: str | list[str]
    published: list[float] | None = None
    equal_compute: bool = False
    as_good: bool = False
    margin: float = 0.02

    @property
    def pairs(self) -> list[tuple[str, str]]:
        rows, thans = ([names] if isinstance(names, str) else names for names in (self.row, self.than))
        return list(zip(rows, thans, strict=True))


@dataclass(frozen=True)
class MemoryClaim:
    """`row` has the share `published` less than `than`, of memory at the `peak` of training or of `parameters`."""

    claim: str
    row: str
    than: str
    published: float
    of: str = "peak"
    tolerance: float = 0.02

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(self.row, self.than)]


@dataclass(frozen=True)
class Table:
    """Variants and what is claimed of them; `scale` has the fields in which the table differs from its scale.

    With `balance` the result says how the routers of every run spread their tokens; `frontier` and `memory` ask for a
    picture. The `measure` that claims are about is one of MEASURES.
    """

    question: str
    rows: dict[str, dict]
    claims: list[Claim]
    memory_claims: list[MemoryClaim]
    frontier: bool = False
    memory: bool = False
    balance: bool = False
    measure: str = "validation_loss"
    scale: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.measure not in MEASURES:
            raise ValueError(f"`measure={self.measure}` is unknown; choose one of {list(MEASURES)}.")
        for claim in (*self.claims, *self.memory_claims):
            for name in chain.from_iterable(claim.pairs):
                if name not in self.rows:
                    raise ValueError(f"A claim names the row {name!r}; the table has {list(self.rows)}.")


@dataclass(frozen=True)
class Variant:
    """A row at a scale: the preset that it trains, and the recipe."""

    preset: dict
    recipe: dict
    budget: float | None = None
    bits: int | None = None
    form: str | None = None

    @property
    def is_scored(self) -> bool:
        """In a way in which it was not trained."""
        return self.budget is not None or self.bits is not None

    @property
    def config(self) -> CoEConfig:
        return CoEConfig(**self.preset)

    @property
    def flops(self) -> float:
        """FLOPs of the whole run, for every token of a batch; however it is scored."""
        return training_flops(self.config, self.recipe["sequence_length"]) * self.recipe["max_steps"]


@command_line
def main(arguments: list[str] | None = None):
    (options,) = parse(ReproduceArguments, arguments=arguments, description=__doc__)
    table = load_table(Path(options.table))
    scale = replace(load_scale(options), **table.scale)
    variants = {name: build_variant(row, scale) for name, row in table.rows.items()}
    check_compute(table, variants)
    is_scored = any(variant.is_scored for variant in variants.values())
    if table.measure == "unsolved" and (is_scored or not scale.recipe.get("scored_problems")):
        raise ValueError(
            "`measure: unsolved` needs rows without `budget` and `bits`, and `scored_problems` in the recipe of the "
            f"scale {options.scale!r}."
        )
    output = Path(options.results_dir)
    output.mkdir(parents=True, exist_ok=True)
    name = f"{Path(options.table).stem}_{options.scale}"
    if options.only_memory:
        rows = {row: measure_memory(variant) for row, variant in variants.items()}
        claims = [judge_memory(claim, rows) for claim in table.memory_claims]
        name += "_memory"
    else:
        # The record has neither the models, to score them in other ways, nor how every router spread its tokens.
        record = None if table.balance or is_scored else output / "runs" / f"{options.scale}.json"
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = compete(variants, scale, Path(options.runs_dir) / options.scale, record, pool, table.measure)
        claims = [judge(claim, rows, table.measure) for claim in table.claims]
        if table.memory:
            plot_memory(rows, scale.recipe, output / f"{name}.png")
        elif table.frontier:
            plot_frontier(rows, output / f"{name}.png")
        elif any(variant.budget is not None for variant in variants.values()):
            plot_dial(rows, output / f"{name}.png")
    common, written = split_common(rows)
    facts = describe(options, table, scale) | {"claims": claims, "config": common, "rows": written}
    write_json(output / f"{name}.json", facts)
    print_results(rows, claims)


def describe(options: ReproduceArguments, table: Table, scale: Scale) -> dict:
    """How the result came about; of a local data set the folder's name alone."""
    dataset = scale.recipe["dataset"] if options.dataset is None else Path(options.dataset).name
    command = f"python train/studies/reproduce.py --table configuration/studies/{Path(options.table).name} "
    command += f"--scale {options.scale}"
    if options.only_memory:
        command += " --only_memory true"
    elif options.dataset is not None:
        command += f" --dataset path/to/{dataset}"
    return {
        "question": table.question,
        "command": command,
        "corpus": hash_of_corpus(scale.recipe["dataset"]),
        "measure": table.measure,
        "scale": asdict(replace(scale, recipe=scale.recipe | {"dataset": dataset})),
        **environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def split_common(rows: dict[str, dict]) -> tuple[dict, dict[str, dict]]:
    """What all rows have in their configurations, and the rows with what they do not have in common."""
    first, *others = [row["config"].items() for row in rows.values()]
    common = dict(item for item in first if all(item in other for other in others))
    return common, {
        name: row | {"config": {key: value for key, value in row["config"].items() if key not in common}}
        for name, row in rows.items()
    }


def hash_of_corpus(dataset: str) -> str | None:
    """The hash that train/studies/corpus.py wrote beside its documents; None of other data sets."""
    path = Path(dataset) / "corpus.json"
    return json.loads(path.read_text(encoding="utf-8"))["hash"] if path.is_file() else None


def load_table(path: Path) -> Table:
    """
    Raises:
        TypeError: an unknown or missing key.
        ValueError: a claim about a row that is not there.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    claims = [Claim(**claim) for claim in content.pop("claims", [])]
    memory_claims = [MemoryClaim(**claim) for claim in content.pop("memory_claims", [])]
    return Table(claims=claims, memory_claims=memory_claims, **content)


def load_scale(options: ReproduceArguments) -> Scale:
    """The scale's file, with the command line's data set; its recipe must be one of train/pretrain.py."""
    path = Path(__file__).parents[2] / "configuration" / "studies" / "scales" / f"{options.scale}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ValueError(f"`scale={options.scale}` is unknown; choose one of {known}.")
    scale = Scale(**yaml.safe_load(path.read_text(encoding="utf-8")))
    if options.dataset is not None:
        scale.recipe.pop("dataset_config", None)
        scale.recipe["dataset"] = options.dataset
    return scale


def build_variant(row: dict, scale: Scale) -> Variant:
    """The scale's preset and recipe with the row's changes.

    Raises:
        ValueError: a field that is none of the configuration, or a combination that no model can have.
    """
    fields = dict(row)
    depth, length = fields.pop("depth", 1), fields.pop("length", 1)
    others = {name: fields.pop(name) for name in ("budget", "bits", "form") if name in fields}
    recipe = lengthen(scale.recipe, length) | fields.pop("recipe", {})
    preset = json.loads(Path(recipe["model"]).read_text(encoding="utf-8")) | scale.fields
    if unknown := (fields | scale.fields).keys() - CoEConfig.__dataclass_fields__.keys():
        raise ValueError(
            f"{sorted(unknown)} are no fields of CoEConfig, nor one of `depth`, `length`, `recipe`, `form`, `budget`, "
            "`bits`."
        )
    return Variant(preset | {"num_hidden_layers": depth * preset["num_hidden_layers"]} | fields, recipe, **others)


def lengthen(recipe: dict, factor: int) -> dict:
    """The recipe with so many times the steps, and the decay at their end if it has one; the warm-up stays."""
    longer = recipe | {name: factor * recipe[name] for name in ("max_steps", "eval_steps")}
    if decay := recipe.get("lr_scheduler_kwargs"):
        longer["lr_scheduler_kwargs"] = decay | {"num_decay_steps": factor * decay["num_decay_steps"]}
    return longer


def check_compute(table: Table, variants: dict[str, Variant]):
    """
    Raises:
        ValueError: a claim of equal compute about two rows whose FLOPs differ.
    """
    for claim in table.claims:
        for row, than in claim.pairs:
            ratio = variants[row].flops / variants[than].flops
            if claim.equal_compute and abs(ratio - 1) > EQUAL_COMPUTE:
                raise ValueError(
                    f"{row!r} costs {ratio:.2f} times the FLOPs of {than!r}, which is no equal compute; "
                    "change the experts per token of one of them."
                )


def compete(
    variants: dict[str, Variant],
    scale: Scale,
    output: Path,
    record: Path | None,
    pool: ThreadPoolExecutor,
    measure: str = "validation_loss",
) -> dict:
    """Every variant's result: its learning rates with the first seed, then the best of them with the others."""
    first, *others = scale.seeds
    tries = {
        name: [pool.submit(run_once, variant, rate, first, output, record) for rate in scale.learning_rates]
        for name, variant in variants.items()
    }
    best, grids = {}, {}
    for name, futures in tries.items():
        results = [future.result() for future in futures]
        grids[name] = {f"{run['learning_rate']:g}": run["validation_loss"] for run in results}
        best[name] = min(results, key=partial(rank, measure=measure))
    rates = {name: run["learning_rate"] for name, run in best.items()}
    repeats = {
        name: [pool.submit(run_once, variant, rates[name], seed, output, record) for seed in others]
        for name, variant in variants.items()
    }
    baseline = next(iter(variants.values())).flops
    rows = {}
    for name, variant in variants.items():
        runs = [best[name], *(future.result() for future in repeats[name])]
        if any(run["diverged"] for run in runs):
            raise ValueError(f"{name!r} diverged at `learning_rate={rates[name]:g}`; give the scale lower ones too.")
        losses = [run["validation_loss"] for run in runs]
        facts = ("seed", "validation_loss", "share_solved", "tokens", "train_seconds", "peak_memory_gib", "commit")
        more = ("routing_health", "experts_per_token", "experts_by_loss")
        rows[name] = {
            "config": variant.preset,
            "parameters": sum(count_parameters(variant.config).values()),
            "flops_ratio": round(variant.flops / baseline, 3),
            "learning_rate": rates[name],
            "loss_by_learning_rate": grids[name],
            "mean_validation_loss": round(statistics.mean(losses), 4),
            "standard_deviation": round(statistics.stdev(losses), 4),
            "runs": [
                {fact: run[fact] for fact in facts if fact in run}
                | {fact: run[fact] for fact in more if run.get(fact)}
                for run in runs
            ],
        }
    return rows


def rank(run: dict, measure: str) -> tuple[float, float]:
    """By the measure, among equals by the loss; what diverged comes last."""
    return (math.inf, math.inf) if run["diverged"] else (MEASURES[measure](run), run["validation_loss"])


def run_once(variant: Variant, rate: float, seed: int, output: Path, record: Path | None) -> dict:
    """One run of train/pretrain.py, unless its folder or `record` has the finished run; what became of it."""
    identity = [variant.preset, variant.recipe, rate, seed]
    identity += [what for what in (hash_of_corpus(variant.recipe["dataset"]), variant.form) if what]
    folder = output / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    recorded = read_record(record) if record else {}
    if folder.name in recorded:
        return recorded[folder.name]
    with TRAINING[folder]:  # rows that differ in how they are scored share a run
        train(variant, rate, seed, folder)
    run = read_run(folder, rate, seed)
    if record:
        run.pop("routing_health", None)
        with FileLock(output / "record.lock"):
            record.parent.mkdir(exist_ok=True)
            write_json(record, read_record(record) | {folder.name: run})
    if not variant.is_scored or run["diverged"]:
        return run
    kept = ("seed", "learning_rate", "diverged", "commit")
    return {fact: run[fact] for fact in kept} | score(variant, seed, folder)


def read_record(path: Path) -> dict[str, dict]:
    """What became of the runs of a scale, by the name of their folder."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def train(variant: Variant, rate: float, seed: int, folder: Path):
    diverged = folder / "diverged.json"
    if not (folder / "facts.json").is_file() and not diverged.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        preset = folder.with_suffix(".json")
        preset.write_text(json.dumps(variant.preset, indent=2))
        options = variant.recipe | {
            "model": preset, "output_dir": folder, "learning_rate": rate, "seed": seed, "disable_tqdm": True,
            "report_to": "none",
        }  # fmt: skip
        studies = Path(__file__).parent
        script = [studies.parent / "pretrain.py"] if variant.form is None else [studies / "forms.py", variant.form]
        command = [sys.executable, *map(str, script)]
        for key, value in options.items():
            command += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
        with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if status:
            lines = folder.with_suffix(".log").read_text(encoding="utf-8").strip().splitlines()
            message = next((line for line in lines if line.startswith("error: ")), lines[-1])
            if "training stops" not in message:
                raise RuntimeError(
                    f"A run failed: {message} See {folder.with_suffix('.log')}; then repeat the command."
                )
            write_json(diverged, {"message": message})


def score(variant: Variant, seed: int, folder: Path) -> dict:
    """The validation loss of a finished run at the variant's budget and bits, the mean number of experts that its
    tokens really computed an iteration, and that number by the loss of the token they predict: quarters, from the
    easiest."""
    way = f"budget_{variant.budget:g}" if variant.bits is None else f"bits_{variant.bits}"
    path = folder / f"{way}.json"
    if not path.is_file():
        names = DataArguments.__dataclass_fields__.keys() & variant.recipe.keys()
        data = DataArguments(**{name: variant.recipe[name] for name in names})
        quantized = variant.bits and {"quantization_config": QuantizedExpertsConfig(bits=variant.bits)}
        model = AutoModelForCausalLM.from_pretrained(folder, **quantized or {}).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        documents = load_documents(data, seed)["validation"]
        blocks = list(pack(documents, tokenizer, data.sequence_length, data.split_long_documents))
        losses, experts = [], []
        for start in range(0, len(blocks), 8):
            batch = collate(blocks[start : start + 8], tokenizer.pad_token_id)
            loss, count = loss_and_experts(model, batch, variant.budget)
            losses.append(loss)
            experts.append(count)
        losses, experts = torch.cat(losses), torch.cat(experts)
        quarters = experts[losses.argsort()].tensor_split(4)
        scores = {
            "validation_loss": round(losses.mean().item(), 4),
            "experts_per_token": round(experts.mean().item(), 3),
            "experts_by_loss": [round(quarter.mean().item(), 3) for quarter in quarters],
        }
        if variant.budget is None:
            scores = {"validation_loss": scores["validation_loss"]}
        write_json(path, scores)
    return json.loads(path.read_text(encoding="utf-8"))


@torch.no_grad()
def loss_and_experts(model: CoEForCausalLM, batch: dict, budget: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every target of a batch, its loss, and the mean number of experts an iteration of the token before it."""
    labels = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with watched_choices(model) as choices:
        logits = model(**inputs, expert_budget=budget, use_cache=False).logits
    is_expert = torch.stack(choices) < model.config.num_local_experts
    experts = is_expert.sum(-1).float().mean(0).view(labels.shape)
    is_target = labels[:, 1:] != -100
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
    return losses[is_target], experts[:, :-1][is_target]


def read_run(folder: Path, rate: float, seed: int) -> dict:
    """What a finished run left: its loss on the validation documents, what it cost, and its commit."""
    run = {"seed": seed, "learning_rate": rate, "diverged": (folder / "diverged.json").is_file()}
    if run["diverged"]:
        return run | {"validation_loss": None}
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return run | {
        "validation_loss": round(facts["validation_loss"], 4),
        "share_solved": facts["share_solved"],
        "tokens": facts["tokens"],
        "train_seconds": facts["train_seconds"],
        "peak_memory_gib": facts["peak_memory_gib"],
        "commit": facts["commit"],
        "routing_health": {
            name.removeprefix("eval_"): value for name, value in facts.get("routing_health", {}).items()
        },
    }


def judge(claim: Claim, rows: dict, measure: str = "validation_loss") -> dict:
    """The claim with the mean difference of its rows, paired by seed, its 95 % interval, and a verdict.

    Supported: the interval lies on the claim's side, and the mean beyond the margin. Contradicted: the interval
    excludes what the claim says. Undecided: neither, or no run solves a single problem.
    """
    by_pair = [
        [
            MEASURES[measure](run) - MEASURES[measure](other)
            for run, other in zip(rows[row]["runs"], rows[than]["runs"], strict=True)
        ]
        for row, than in claim.pairs
    ]
    differences = [statistics.mean(pairs) for pairs in zip(*by_pair, strict=True)]
    mean = statistics.mean(differences)
    half = T_95[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    if claim.as_good:
        supported, contradicted = mean + half < claim.margin, mean - half > claim.margin
    else:
        supported, contradicted = mean + half < 0 and mean <= -claim.margin, mean - half > -claim.margin
    if measure == "unsolved" and not any(
        run["share_solved"] for pair in claim.pairs for name in pair for run in rows[name]["runs"]
    ):
        supported = contradicted = False
    return asdict(claim) | {
        "difference": round(mean, 4),
        "interval": [round(mean - half, 4), round(mean + half, 4)],
        "verdict": "supported" if supported else "contradicted" if contradicted else "undecided",
    }


def measure_memory(variant: Variant) -> dict:
    """Peak of the allocator while a model is built and trained for two steps, beside what `budget.py` predicts.

    bf16 weights, gradients and AdamW states, one sequence a micro-batch as in the paper, two micro-batches a step.
    What is too large for bf16 on a CPU is predicted only.
    """
    config, length = variant.config, variant.recipe["sequence_length"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(count_parameters(config).values())

    def train_two_steps():
        model = CoEForCausalLM._from_config(config, dtype=torch.bfloat16).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.randint(config.vocab_size, (1, length), device=device)
        for _ in range(2):
            for _ in range(2):
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    setup = TrainingSetup(batch_size=1, sequence_length=length, dtype="bfloat16", experts_implementation="coe")
    is_small = parameters < 1e8
    return {
        "config": variant.preset,
        "parameters": parameters,
        "peak_bytes": peak_bytes(train_two_steps, device) if is_small or device.type == "cuda" else None,
        "predicted_bytes": sum(training_memory(config, setup).values()),
    }


def judge_memory(claim: MemoryClaim, rows: dict) -> dict:
    """The claim with the saving at the peak, measured if both rows were, that by parameters alone, and a verdict."""
    row, than = rows[claim.row], rows[claim.than]
    basis = "predicted" if None in (row["peak_bytes"], than["peak_bytes"]) else "measured"
    key = {"predicted": "predicted_bytes", "measured": "peak_bytes"}[basis]
    savings = {"peak": 1 - row[key] / than[key], "parameters": 1 - row["parameters"] / than["parameters"]}
    return asdict(claim) | {
        "saving": {name: round(saving, 4) for name, saving in savings.items()},
        "basis_of_peak": basis,
        "verdict": "supported" if savings[claim.of] >= claim.published - claim.tolerance else "contradicted",
    }


def plot_frontier(rows: dict, path: Path):
    """The validation loss that memory buys at the first row's compute, and that compute buys in its memory: a line for
    each number of iterations and layers; bars from the lowest to the highest seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    first, colors = next(iter(rows.values())), {}
    panels = (("parameters", "flops_ratio", 1e6), ("flops_ratio", "parameters", 1))
    for axis, (key, same, unit) in zip(axes, panels, strict=True):
        lines = {}
        for name, row in rows.items():
            if abs(row[same] / first[same] - 1) <= EQUAL_COMPUTE:
                config = CoEConfig(**row["config"])
                lines.setdefault((config.num_iterations, config.num_hidden_layers), []).append(name)
        for kind, names in lines.items():
            color = colors.setdefault(kind, f"C{len(colors)}")
            names.sort(key=lambda name: rows[name][key])
            amounts = [rows[name][key] / unit for name in names]
            losses = [[run["validation_loss"] for run in rows[name]["runs"]] for name in names]
            means = [statistics.mean(seeds) for seeds in losses]
            spread = [[abs(f(seeds) - mean) for seeds, mean in zip(losses, means, strict=True)] for f in (min, max)]
            axis.errorbar(amounts, means, spread, fmt="o-", color=color, capsize=3, linewidth=1.2)
            for name, *point in zip(names, amounts, means, strict=True):
                axis.annotate(name, point, xytext=(6, 5), textcoords="offset points", fontsize=8)
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(xlabel="parameters (millions)", ylabel="validation loss (nats per token)", title="at equal compute")
    axes[1].set(xlabel="training FLOPs, relative", title="in equal memory")
    save_picture(figure, path)


def plot_memory(rows: dict, recipe: dict, path: Path):
    """The validation loss against bytes at the peak of a training step in fp32, and against bytes of the weights at
    inference, both as budget.py counts them; squares share pools. Bars from the lowest to the highest seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    batch = {"batch_size": recipe["per_device_train_batch_size"], "sequence_length": recipe["sequence_length"]}
    training = TrainingSetup(**batch, dtype="float32", experts_implementation="coe")
    stored = {
        "bf16": ServingSetup(),
        "8 bits": ServingSetup(expert_bits=8),
        "4 bits": ServingSetup(expert_bits=4),
    }
    for number, (name, row) in enumerate(rows.items()):
        config, losses = CoEConfig(**row["config"]), [run["validation_loss"] for run in row["runs"]]
        mean = statistics.mean(losses)
        spread = [[mean - min(losses)], [max(losses) - mean]]
        style = {"color": f"C{number % 10}", "marker": "o" if config.layers_per_pool == 1 else "s"}
        peak = sum(training_memory(config, training).values()) / 2**20
        axes[0].errorbar(peak, mean, spread, capsize=3, linewidth=1.2, linestyle="none", label=name, **style)
        sizes = [sum(weight_bytes(config, setup).values()) / 2**20 for setup in stored.values()]
        axes[1].plot(sizes, [mean] * len(sizes), linewidth=0.8, **style)
    first = next(iter(rows.values()))
    for label, setup in stored.items():
        point = sum(weight_bytes(CoEConfig(**first["config"]), setup).values()) / 2**20, first["mean_validation_loss"]
        axes[1].annotate(label, point, xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
    axes[0].set(xlabel="peak of a training step (MiB)", ylabel="validation loss (nats per token)")
    axes[1].set(xlabel="weights at inference (MiB)")
    for axis in axes:
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_picture(figure, path)


def plot_dial(rows: dict, path: Path):
    """The validation loss against the experts that a token computes: of one checkpoint at its budgets, and of models
    trained with so many for every token; bars from the lowest to the highest seed."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lines = {"trained with K for every token": [], "one checkpoint, its budget turned": []}
    for row in rows.values():
        config = CoEConfig(**row["config"])
        losses = [run["validation_loss"] for run in row["runs"]]
        if "experts_per_token" in row["runs"][0]:
            experts = statistics.mean(run["experts_per_token"] for run in row["runs"])
            lines["one checkpoint, its budget turned"].append((experts, losses))
        elif config.num_null_experts == 0:
            lines["trained with K for every token"].append((config.num_experts_per_tok, losses))
    for label, points in lines.items():
        experts, losses = zip(*sorted(points), strict=True)
        means = [statistics.mean(seeds) for seeds in losses]
        spread = [[abs(f(seeds) - mean) for seeds, mean in zip(losses, means, strict=True)] for f in (min, max)]
        axis.errorbar(experts, means, spread, fmt="o-", capsize=3, linewidth=1.2, label=label)
    axis.set(xlabel="experts a token computes an iteration, on average", ylabel="validation loss (nats per token)")
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_picture(figure, path)


def print_results(rows: dict, claims: list[dict]):
    width = max(map(len, rows))
    for name, row in rows.items():
        print(f"{name:{width}}{row['parameters'] / 1e6:10.2f} M parameters", end="")
        if "peak_bytes" in row:
            measured = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
            print(f"   peak {measured}, predicted {row['predicted_bytes'] / 2**20:.0f} MiB")
        else:
            loss = f"{row['mean_validation_loss']:8.4f} +- {row['standard_deviation']:.4f}"
            print(f"{loss}   rate {row['learning_rate']:g}   FLOPs {row['flops_ratio']:.2f}x")
    for claim in claims:
        measured = claim["saving"] if "saving" in claim else f"{claim['difference']:+.4f} {claim['interval']}"
        print(f"{claim['verdict']:12} {claim['claim']}: {measured}")


if __name__ == "__main__":
    main()

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Turn a run into a repository that a stranger can load, judge and cite; with --push, on the Hub, in one commit.

    coe-publish runs/smoke --repo user/name                 # writes runs/smoke/hub and stops
    coe-publish runs/smoke --repo user/name --push --private

Look the prepared folder over and edit the card where you like: the same command with --push uploads it as it then is.

The folder holds sharded safetensors, the config with its auto_map, the Python files, tokenizer, generation config,
facts.json, the plots and README.md, which is the model card. A LoRA adapter is published merged into its base
model; neither file is touched. The token comes from `hf auth login` or HF_TOKEN, never from the command line, and is
written nowhere.
"""

import argparse
import json
import math
import shutil
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath

import torch
import yaml
from huggingface_hub import eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_coe import QuantizedExpertsConfig
from modeling_coe.folders import (
    changes_since_written,
    refuse_adapter,
    require_model,
    whole_or_nothing,
    written_about,
    written_files,
)
from modeling_coe.routing import Routing, plot_routing, record_routing
from modeling_coe.train.arguments import command_line, is_preset
from modeling_coe.train.cards import benchmark_results, energy_facts, model_facts, render_card
from modeling_coe.train.hub import check_login, push, refuse_secrets
from modeling_coe.train.report import save_picture
from modeling_coe.train.runs import read_json, weights_of


TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"  # beside train/, in a wheel as well
CURVE_FILES = ("loss_curve.png", "loss_curve.jsonl")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder of a finished run: model, tokenizer, facts.json, samples.json.")
    parser.add_argument("--repo", required=True, help="Hub id, user/name.")
    parser.add_argument("--push", action="store_true", help="Upload it, in one commit.")
    parser.add_argument("--private", action="store_true", help="Create the repository as a private one.")
    parser.add_argument("--license", default="apache-2.0", help="Of the weights; an identifier of the Hub.")
    parser.add_argument("--language", default="en", help="ISO 639 code.")
    parser.add_argument("--base-model", help="Hub id that the run started from, if it is on the Hub.")
    parser.add_argument("--control", type=Path, help="Run of the source, for the same steps, to compare a chain with.")
    parser.add_argument("--dataset-id", help="Hub id of the training data, where the run knows only a folder.")
    parser.add_argument("--evaluated-split", default="validation", help="Name of the split that was evaluated.")
    parser.add_argument("--dataset-license", help="License of the training data; needed unless it was generated here.")
    parser.add_argument("--watts", type=float, help="Mean draw of the machine. Default: 15 a CPU thread, 700 a GPU.")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="Of the sample in the card.")
    parser.add_argument("--max-shard-size", default="5GB", help="Largest safetensors file.")
    return parser.parse_args(arguments)


class Record(dict):
    """A JSON file of the run, or an object within it."""

    def __init__(self, path: Path, content: dict | None = None, within: str = ""):
        content = read_json(path) if content is None else content
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it must hold names and values.")
        super().__init__(content)
        self.path, self.within = path, within
        for name, value in content.items():
            if isinstance(value, dict):
                self[name] = Record(path, value, f"{within}{name}.")

    def __missing__(self, name: str):
        raise ValueError(f"{self.path} lacks `{self.within}{name}`; name the folder of a finished run, or finish it.")


def check_options(options: argparse.Namespace):
    """Raises ValueError, naming an option that has no use or would be refused by the Hub."""
    for name in ("repo", "base_model", "dataset_id"):
        if (value := getattr(options, name)) is not None:
            validate_repo_id(value)  # a HFValidationError is a ValueError
    if "/" not in options.repo:
        raise ValueError(f"`--repo {options.repo}` has no owner; name it as user/{options.repo}.")
    if options.watts is not None and not 0 < options.watts < math.inf:
        raise ValueError(f"`--watts {options.watts}` must be above 0; leave it out for an estimate.")
    if options.max_new_tokens < 1:
        raise ValueError(f"`--max-new-tokens {options.max_new_tokens}` must be at least 1.")
    if not options.evaluated_split.strip():
        raise ValueError("`--evaluated-split` is empty; name the split, or leave the option out.")


def check_run(folder: Path):
    """Raises ValueError unless `folder` is there, holds a model or an adapter, and has files in it, no links."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name the folder of a finished run.")
    if (folder / "config.json").is_file():
        refuse_adapter("run", folder)
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a link or no file; only files are published. Put a copy in its place.")
    for name in ("facts.json", "run.json", "samples.json", *CURVE_FILES):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: no such file; name the folder of a finished run. An adapter's, too: it is merged "
                "for the Hub."
            )
    require_model("run", folder)


def is_place(name: str) -> bool:
    """A path that means something on one machine alone, and tells of it."""
    return name.startswith(("/", "~", "..")) or PureWindowsPath(name).is_absolute()


def without_places(facts):
    """The same facts, with the last name alone of every place on this machine."""
    if isinstance(facts, dict):
        return {name: without_places(value) for name, value in facts.items()}
    if isinstance(facts, list):
        return [without_places(value) for value in facts]
    return PureWindowsPath(facts).name if isinstance(facts, str) and is_place(facts) else facts


def check_known(options: argparse.Namespace, run: dict, samples: list[dict]):
    """Raises ValueError, naming the fact that neither the run nor the command line states, and the option for it."""
    if options.dataset_license is None and run["dataset"] != "word_problems":
        raise ValueError(f"The license of `{run['dataset']}` is unknown; state it with --dataset-license.")
    if options.dataset_id is None and is_place(run["dataset"]):
        raise ValueError(f"`{run['dataset']}` is a folder of this machine; name the data with --dataset-id.")
    if not is_from_scratch(run) and options.base_model is None and run["base"] is None:
        raise ValueError(f"`{run['model']}` does not say what it is made of; state its Hub id with --base-model.")
    if not samples:
        raise ValueError("samples.json is empty: the run answered no problems. Run it with `scored_problems` above 0.")


def is_from_scratch(run: dict) -> bool:
    return is_preset(run["model"])


def gather_facts(options: argparse.Namespace, run: dict, record: dict, model, tokenizer, samples: list[dict]) -> dict:
    """Everything that the card says, as JSON, with Hub ids in place of the folders of this machine."""
    check_known(options, run, samples)
    data = options.dataset_id or run["dataset"]
    # Fine-tuning on questions and answers scores the answers alone, and its record says so.
    is_pair = "lora" in record and "prompt" in record["data"]["columns"]
    loss = "answer_loss" if is_pair else "validation_loss"
    label = "loss of the answers, nats per token" if is_pair else "loss, nats per token"
    evaluation = [("loss", label, run[loss], None)]
    if run["share_solved"] is not None:
        evaluation.append(("exact_match", "share solved", run["share_solved"], run["scored_problems"]))
    names = ("metric", "name", "value", "count")
    known = {name: value for name, value in run.items() if name != "base"}
    known |= {"validation_loss": run[loss], "validation_loss_before": run[f"{loss}_before"]}
    facts = {
        "repo": options.repo,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "license": options.license,
        "language": options.language,
        "task": "text-generation",
        "base": None if is_from_scratch(run) else base_facts(options, run, model),
        "data": {"name": data, "hub_id": options.dataset_id, "license": options.dataset_license or "apache-2.0"},
        "model": model_facts(model.config),
        "recipe": record["training"],
        "run": known | {"model": run["model"] if is_from_scratch(run) else options.base_model, "dataset": data},
        "energy": energy_facts(run["train_seconds"], options.watts or assumed_watts(run, record["training"])),
        "evaluation": [
            {"split": options.evaluated_split, **dict(zip(names, values, strict=True))} for values in evaluation
        ],
        "control": None if options.control is None else control_facts(run, options.control, loss),
        "sample": speak(model, tokenizer, samples[0], options.max_new_tokens),
        "routing": routing_facts(route(model, tokenizer, samples)),
    }
    return without_places(facts) | {"sample": facts["sample"]}


def assumed_watts(run: dict, training: dict) -> int:
    """Of the machines that trained: 700 a GPU, 15 a CPU thread, in each process of the run."""
    return training["world_size"] * (15 * run["threads"] if "CPU" in run["device"] else 700)


def base_facts(options: argparse.Namespace, run: dict, model) -> dict:
    """What the run started from: its Hub id, or else its own training; how it was upcycled, and what that became.

    Raises:
        ValueError: the base was trained on a folder of this machine that has no name.
    """
    base = run["base"] or {}
    upcycling = base.get("upcycling")
    trained = None if options.base_model else base["base"] if upcycling else base
    if trained is not None:
        data = {run["dataset"]: options.dataset_id or run["dataset"]}.get(trained["dataset"], trained["dataset"])
        if is_place(data):
            raise ValueError(f"The base model was trained on `{data}`, a folder of this machine; state --base-model.")
        trained = {name: trained[name] for name in ("steps", "tokens", "validation_loss")} | {"data": data}
    if upcycling:
        later = torch.cat([layer.mlp.iteration_scale[1:] for layer in model.model.layers])
        upcycling = upcycling | {"later_scales": [round(later.min().item(), 4), round(later.max().item(), 4)]}
    return {"hub_id": options.base_model, "training": trained, "upcycling": upcycling}


def base_of(run: Path) -> str:
    """The model whose adapter a run's folder holds, or the folder itself."""
    has_adapter = (run / "adapter_config.json").is_file()
    return PeftConfig.from_pretrained(run).base_model_name_or_path if has_adapter else str(run)


def load_run(run: Path, record: dict):
    """The model of a run; an adapter is merged into the base that it was trained on, rounded to few bits as there.

    Raises:
        ValueError: the base model has other weights now.
    """
    if (base := base_of(run)) == str(run):
        return AutoModelForCausalLM.from_pretrained(run).eval()
    if weights_of(base) != record["weights"]:
        raise ValueError(f"`{base}` is no longer what the adapter in {run} was trained on; put its weights back.")
    options = {"quantization_config": QuantizedExpertsConfig(bits=4)} if record["lora"]["load_in_4bit"] else {}
    model = AutoPeftModelForCausalLM.from_pretrained(run, **options)
    if getattr(model.config, "quantization_config", None):
        model.dequantize()  # the sum would be rounded
    return model.merge_and_unload().eval()


def control_facts(run: dict, folder: Path, loss: str) -> dict:
    """The source of a chain, trained on with the run's steps and data, and the same `loss` of it as of the run.

    Raises:
        ValueError: the control had other steps, other data or another seed.
    """
    control = Record(folder / "facts.json")
    for name in ("dataset", "steps", "seed"):
        if control[name] != run[name]:
            raise ValueError(f"The control has `{name}={control[name]}`, the run `{run[name]}`; they must be equal.")
    active = model_facts(AutoConfig.from_pretrained(base_of(folder)))["active_parameters"]
    return {"validation_loss": control[loss], "active_parameters": active}


def speak(model, tokenizer, sample: dict, max_new_tokens: int) -> dict:
    """The first validation prompt, and what the card's snippet prints behind it."""
    inputs = tokenizer(sample["prompt"], return_tensors="pt")
    room = model.config.max_position_embeddings - inputs.input_ids.shape[1]
    if room < 1:
        raise ValueError("The prompt of the first sample fills the context; shorten it in samples.json.")
    if max_new_tokens > room:
        raise ValueError(
            f"`--max-new-tokens {max_new_tokens}` exceeds the context, which has room for {room} after the sample's "
            "prompt; lower it."
        )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return {
        "prompt": sample["prompt"],
        "expected": sample["expected"].strip(),
        "generated": text.strip(),
        "max_new_tokens": max_new_tokens,
    }


def route(model, tokenizer, samples: list[dict]) -> Routing:
    inputs = tokenizer([sample["prompt"] for sample in samples[:64]])
    return record_routing(model, **tokenizer.pad(inputs, return_tensors="pt"))


def routing_facts(routing: Routing) -> dict:
    return {
        "tokens": routing.experts.shape[2],
        "entropy": [round(value, 4) for value in routing.entropy.mean(dim=0).tolist()],
        "revisits": [round(value, 4) for value in routing.revisits.mean(dim=0).tolist()],
    }


def write_repository(options: argparse.Namespace, folder: Path):
    """Everything but the upload: load the run, gather the facts, save and render into `folder`."""
    run, record = Record(options.run / "facts.json"), Record(options.run / "run.json")
    samples = read_json(options.run / "samples.json")
    if not isinstance(samples, list):
        raise ValueError(f"{options.run / 'samples.json'} is damaged: it must hold a list.")
    model = load_run(options.run, record)
    tokenizer = AutoTokenizer.from_pretrained(options.run)
    facts = gather_facts(options, run, record, model, tokenizer, samples)
    card = render_card(facts, TEMPLATE)

    model.save_pretrained(folder, max_shard_size=options.max_shard_size)
    tokenizer.save_pretrained(folder)
    for name in CURVE_FILES:
        shutil.copy(options.run / name, folder)
    save_picture(plot_routing(route(model, tokenizer, samples)), folder / "routing.png")
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    card.save(folder / "README.md")
    if entries := benchmark_results(facts):
        (folder / ".eval_results").mkdir()
        path = folder / ".eval_results" / f"{entries[0].task_id}.yaml"
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
    refuse_secrets(folder)


def prepared_for(options: argparse.Namespace) -> dict:
    """What a prepared folder depends on: the options, and the files of the run with their sizes and times."""
    chosen = {name: str(value) for name, value in vars(options).items() if name not in ("run", "push", "private")}
    files = {path.name: path.stat() for path in sorted(options.run.iterdir()) if path.is_file()}
    return {"options": chosen, "run": {name: [found.st_size, found.st_mtime_ns] for name, found in files.items()}}


def prepare(options: argparse.Namespace, folder: Path):
    """Write the folder, unless it is there for the same run and options and is now to be uploaded.

    Raises:
        ValueError: it would replace what was edited by hand.
    """
    made_from = prepared_for(options)
    is_current = written_about(folder).get("made_from") == made_from
    changes = changes_since_written(folder) if folder.exists() else []
    if options.push and is_current:
        needed = [name for name in written_files(folder) if name.endswith((".safetensors", ".json", "README.md"))]
        if gone := [name for name in needed if not (folder / name).is_file()]:
            raise ValueError(f"{folder / gone[0]} is gone, so nothing is uploaded. Restore it, or remove {folder}.")
        print(f"{folder} is uploaded as it was prepared{''.join(f'; {change}' for change in changes)}.")
        return
    if changes:
        reason = "--push uploads it as it is" if is_current else "the run or the options are no longer those it is of"
        raise ValueError(f"{folder} is not prepared again: {changes[0]}; {reason}. Move it away to prepare it anew.")
    with whole_or_nothing(folder, overwrite=True, made_from=made_from) as partial:
        write_repository(options, partial)
    print(f"Repository written to {folder}")


@command_line
def main(arguments: list[str] | None = None):
    options = parse_arguments(arguments)
    check_options(options)
    if options.push:
        check_login()
    check_run(options.run)
    folder = options.run / "hub"
    prepare(options, folder)
    if options.push:
        print(f"Published: {push(folder, options.repo, options.private)}")


if __name__ == "__main__":
    main()

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What is installed: the package, its scripts with their recipes, no tests and no studies; one version everywhere."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import modeling_coe
from modeling_coe.train.arguments import ModelArguments, find_configuration, parse


pytest.importorskip("build")

ROOT = Path(__file__).parents[1]
ROOMS = ("modeling_coe", "train", "configuration", "model_cards", "tests")


def files(*patterns: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}


# What a user runs, where it lies in the checkout and in the sdist.
PACKAGE = files("modeling_coe/*.py", "train/*.py") | {"modeling_coe/py.typed", "model_cards/template.md"}
PACKAGE |= files("configuration/*/*") - files("configuration/studies/*")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, out of a copy of what git would check out for a build."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", *ROOMS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """A folder with the wheel in it, and nothing that the wheel depends on."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder]
    subprocess.run([*command, distributions[1]], check=True)
    return folder


def run_outside(installed: Path, folder: Path, *command) -> str:
    """The output of an entry point of the installed wheel, run in `folder`, far from any checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [installed / "bin" / command[0], *command[1:]]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_wheel_holds_the_package_its_scripts_and_their_recipes_only(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = message_from_string(wheel.read(metadata).decode())
    expected = {name if name.startswith("modeling_coe/") else f"modeling_coe/{name}" for name in PACKAGE}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert fields["Version"] == modeling_coe.__version__ and fields["License-Expression"] == "Apache-2.0"
    always = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line).group() for line in always} == {"safetensors", "torch", "transformers"}


def test_vllm_finds_its_plugin_in_the_installed_package(installed, tmp_path):
    """As vLLM 0.33 does: load every `vllm.general_plugins` and call it. vLLM is a stand-in; it was not run."""
    code = """
        import sys, types
        from importlib.metadata import entry_points
        registry = types.SimpleNamespace(register_model=lambda *names: print(*names))
        sys.modules["vllm"] = types.SimpleNamespace(ModelRegistry=registry)
        (plugin,) = {point for point in entry_points(group="vllm.general_plugins") if point.name == "coe"}
        plugin.load()()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(installed)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.split() == [
        "CoEForCausalLM",
        "vllm.model_executor.models.transformers:TransformersMoEForCausalLM",
    ], result.stderr[-3000:]


def test_sdist_holds_no_tests_and_no_studies(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    assert names >= PACKAGE
    rest = {name for name in names - PACKAGE if ".egg-info/" not in name}
    assert rest == {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}


def test_a_recipe_of_the_working_directory_comes_before_the_package_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = "configuration/pretrain/smoke.yaml"
    assert Path(find_configuration(recipe)).samefile(ROOT / recipe)
    (tmp_path / recipe).parent.mkdir(parents=True)
    (tmp_path / recipe).write_text("dtype: bfloat16\n")
    assert parse(ModelArguments, arguments=["--config", recipe])[0].dtype == "bfloat16"
    assert find_configuration("configuration/pretrain/none.yaml") == "configuration/pretrain/none.yaml"


def test_every_script_has_an_entry_point():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    scripts = {path.stem for path in (ROOT / "train").glob("*.py") if "    main()\n" in path.read_text()}
    assert {point.removeprefix("modeling_coe.train.") for point in points.values()} == {f"{s}:main" for s in scripts}


@pytest.mark.slow
def test_installed_wheel_trains_the_demo_s_model_without_a_checkout(installed, tmp_path):
    shorter = "--max_steps 2 --warmup_steps 1 --train_problems 200 --validation_problems 8 --scored_problems 2"
    recipe = ["--config", "configuration/pretrain/smoke.yaml", *shorter.split(), "--disable_tqdm", "true"]
    run_outside(installed, tmp_path, "coe-pretrain", *recipe, "--max_new_tokens", "4", "--use_cpu", "true")
    facts = json.loads((tmp_path / "runs/smoke/facts.json").read_text())
    assert facts["model"] == "configuration/models/coe_demo.json" and facts["steps"] == 2
    question = ["--model", "runs/smoke", "--question", "Mia has 4 apples.", "--max_new_tokens", "2"]
    assert "Question: Mia has 4 apples." in run_outside(installed, tmp_path, "coe-generate", *question)


def test_scripts_without_their_extra_say_how_to_install_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in {"datasets", "trl"} else find_spec(name)
    )
    with pytest.raises(ImportError, match=r"need datasets, trl: pip install 'modeling-coe\[train\]'$"):
        runpy.run_path(ROOT / "train/__init__.py")


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == modeling_coe.__version__
    releases = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert releases[0] == modeling_coe.__version__


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2506.18945"
    assert len(citation["preferred-citation"]["authors"]) == 10

# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What is installed: the package, its license and nothing else; one version everywhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import modeling_coe


pytest.importorskip("build")

ROOT = Path(__file__).parents[1]
MODULES = {f"modeling_coe/{path.name}" for path in (ROOT / "modeling_coe").glob("*.py")}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, out of a copy of what git would check out for a build."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "modeling_coe", "train", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_the_package_and_its_metadata_only(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = message_from_string(wheel.read(metadata).decode())
    assert {name for name in names if ".dist-info/" not in name} == MODULES
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert fields["Version"] == modeling_coe.__version__ and fields["License-Expression"] == "Apache-2.0"
    always = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line).group() for line in always} == {"safetensors", "torch", "transformers"}


def test_vllm_finds_its_plugin_in_the_installed_package(distributions, tmp_path):
    """As vLLM 0.33 does: load every `vllm.general_plugins` and call it. vLLM is a stand-in; it was not run."""
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(tmp_path)
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
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.split() == [
        "CoEForCausalLM",
        "vllm.model_executor.models.transformers:TransformersMoEForCausalLM",
    ], result.stderr[-3000:]


def test_sdist_holds_no_tests_scripts_or_data(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    assert MODULES <= names
    rest = {name for name in names - MODULES if ".egg-info/" not in name}
    assert rest == {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == modeling_coe.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest.group(1) == modeling_coe.__version__


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2506.18945"
    assert len(citation["preferred-citation"]["authors"]) == 10

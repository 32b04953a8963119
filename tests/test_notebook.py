# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from the first cell to the last, and is committed with its outputs."""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml
from conftest import build, whitespace_tokenizer


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "train" / "generate.ipynb"


def printed(cell) -> str:
    return "".join(
        output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
    )


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_notebook_runs_on_another_checkpoint(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    whitespace_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("COE_MODEL", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "CoE-3(2/7), 2 layers" in printed(cells[0])
    changes = next(printed(cell) for cell in cells if "routing.change" in cell.source)
    assert len(re.findall(r"layer \d \d+\.\d\d", changes)) == 6  # three iterations of two layers
    losses = re.findall(r"\d of 3 iterations: loss (\d+\.\d\d)", "".join(map(printed, cells)))
    assert len(losses) == 3 and len(set(losses)) > 1
    assert [pictures(cell) for cell in cells if "display(" in cell.source] == [1, 1, 2]


@pytest.fixture
def bare_environment(tmp_path, monkeypatch) -> Path:
    """The wheel, and a kernel called `bare` whose Python has all that is installed here but the package."""
    python = tmp_path / "environment" / "bin" / "python"
    venv.create(tmp_path / "environment", symlinks=True)
    (packages,) = (tmp_path / "environment").glob("lib/*/site-packages")
    for folder in [Path(path) for path in reversed(sys.path) if path.endswith("-packages")]:
        for entry in folder.iterdir():
            link = packages / entry.name
            if "modeling_coe" not in entry.name and entry.suffix != ".pth":
                link.unlink(missing_ok=True)
                link.symlink_to(entry)
    spec = {"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "bare"}
    kernel = tmp_path / "jupyter" / "kernels" / "bare"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    build_wheel = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build_wheel, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_notebook_starts_from_nothing(bare_environment, tmp_path, monkeypatch):
    """No package, no checkout, no checkpoint: the first cell installs and trains, here with a shorter recipe."""
    monkeypatch.setenv("COE_PACKAGE", str(bare_environment))
    monkeypatch.delenv("COE_MODEL", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    recipe = yaml.safe_load((ROOT / "configuration" / "pretrain" / "smoke.yaml").read_text())
    recipe |= {"max_steps": 4, "train_problems": 200, "validation_problems": 10, "scored_problems": 2}
    recipe |= {
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 2,
        "warmup_steps": 1,
        "lr_scheduler_type": "constant",
    }
    recipe.pop("lr_scheduler_kwargs", None)
    (tmp_path / "start" / "configuration" / "pretrain").mkdir(parents=True)
    (tmp_path / "start" / "configuration" / "pretrain" / "smoke.yaml").write_text(yaml.safe_dump(recipe))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    options = {"kernel_name": "bare", "resources": {"metadata": {"path": str(tmp_path / "start")}}}
    nbclient.NotebookClient(notebook, timeout=600, **options).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert (tmp_path / "start" / "runs" / "smoke" / "model.safetensors").exists()
    assert re.search(r"CoE-\d\(\d/\d+\), \d layers", printed(cells[0]))
    assert sum(pictures(cell) for cell in cells) == 4


def test_committed_outputs_are_whole_and_name_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", NOTEBOOK.read_text())

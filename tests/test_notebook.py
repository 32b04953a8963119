# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from the first cell to the last, and is committed with its outputs."""

import re
from pathlib import Path

import pytest
from conftest import build, whitespace_tokenizer


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[1] / "train" / "generate.ipynb"


def printed(cell) -> str:
    return "".join(
        output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
    )


def test_notebook_runs_on_another_checkpoint(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    whitespace_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("COE_MODEL", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "CoE-3(2/7), 2 layers" in printed(cells[0])
    changes = next(printed(cell) for cell in cells if "routing.change" in cell.source)
    assert len(re.findall(r"iteration \d: \d+\.\d\d", changes)) == 6  # two layers of three iterations
    losses = re.findall(r"\d of 3 iterations: loss (\d+\.\d\d)", "".join(map(printed, cells)))
    assert len(losses) == 3 and len(set(losses)) > 1
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)


def test_committed_outputs_are_whole_and_name_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", NOTEBOOK.read_text())

"""The tutorial runs from top to bottom, and is kept without outputs."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.runs import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def read_tutorial() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_tutorial_has_no_outputs_and_links_that_lead_somewhere() -> None:
    cells = read_tutorial().cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(code) > 10
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:  # it compiles without IPython's commands
        compile(cell.source.replace("%matplotlib", "# "), "tutorial", "exec")
        imports = [line for line in cell.source.splitlines() if line.startswith("from kafjax")]
        exec("\n".join(imports), {})


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = read_tutorial()
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    (dice,) = [
        float(output.data["text/plain"])
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if cell.source.endswith('results["pooled_dice"]["mean"]')
        and output.output_type == "execute_result"
    ]
    assert dice > 0.2  # chance: less than 0.01
    assert (tmp_path / "tutorial" / "report.html").exists()

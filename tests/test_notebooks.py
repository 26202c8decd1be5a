from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic_run import Net, with_controls, write_run

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_read_a_run_runs_on_the_folder_that_the_demo_makes(tmp_path):
    nets = (Net("2x16", 2, 16), Net("3x32", 3, 32))
    write_run(tmp_path / "probekit-demo" / "run", with_controls(nets, n_init=2), n_test=120, n_validation=60)
    notebook = nbformat.read(Path(__file__).parents[1] / "notebooks" / "read_a_run.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    drawn = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in drawn) == 3

"""tinystories.ipynb is committed without outputs and runs from top to bottom."""

import shutil
from pathlib import Path

import pytest

from conftest import ROOT, TINY
from storygpt.settings import read_command_line

nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "tinystories.ipynb", as_version=4)


@pytest.fixture
def project(tmp_path):
    """A copy of the files that the notebook uses, without any dataset or run."""
    for pattern in ("*.py", "requirements.txt", "config/*.py", "storygpt/*.py", "storygpt/*/*.py", "tools/*.py"):
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path


def test_it_has_no_outputs(notebook):
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


@pytest.mark.parametrize("size", ["toy", pytest.param("as it is", marks=pytest.mark.slow)])
def test_it_runs_from_top_to_bottom(notebook, project, monkeypatch, size):
    if size == "toy":
        flags = "--architecture=modern --block_size=64 --max_iters=12 --eval_interval=4"
        settings = read_command_line([*TINY, *flags.split()], {})[1]
        Path(project, "config/quickstart.py").write_text("".join(f"{k} = {v!r}\n" for k, v in settings.items()))
        for old, new in {"prepare_command(cfg.dataset)": "prepare_command(cfg.dataset) + ' --max_stories=60'",
                         "%pip install": "#", "time.sleep(4)": "time.sleep(0.3)"}.items():
            cell, = [cell for cell in notebook.cells if old in cell.source]
            cell.source = cell.source.replace(old, new)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS")  # one thread would take twice as long
    nbclient.NotebookClient(notebook, timeout=3000, resources={"metadata": {"path": str(project)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    assert not any(output.output_type == "error" for output in outputs)
    assert [kind for kind in map(sorted, data) if "image/png" in kind] == [["image/png", "text/plain"]] * 4
    html, = (each["text/html"] for each in data if "text/html" in each)
    assert html.count("<span title=") == 100 and "background:#cfe8ff" in html
    samples, story = (each["text/markdown"] for each in data if "text/markdown" in each)
    assert 3 <= samples.count("### iteration") <= 4 and story.startswith("Once upon a time")

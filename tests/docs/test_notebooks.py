"""Examples: each notebook is that of its script, and runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from notebooks import EXAMPLES, NOTEBOOKS, as_text, notebook

SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SMALL = {  # options for a run of seconds
    "train_on_folder": ["--epochs=1", "--limit=40"],
    "ensemble_from_backbone": ["--epochs=1", "--train=40"],
    "deadline_server": ["--epochs=1", "--rates", "20", "--seconds=0.5", "--deadline-ms=500"],
    "out_of_distribution": ["--epochs=1", "--train=64", "--ood=noise"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebooks_are_those_of_the_scripts(script: Path) -> None:
    committed = (NOTEBOOKS / f"{script.stem}.ipynb").read_text()
    assert committed == as_text(notebook(script.read_text())), "run `make notebooks`"


def test_every_notebook_has_a_script() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == [script.stem for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebooks_run(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    for folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):  # else in the home directory
        monkeypatch.setenv(folder, str(tmp_path / folder))
    options = [*SMALL[script.stem], f"--out={tmp_path / 'out'}"]
    cells = nbformat.reads(as_text(notebook(script.read_text(), options)), as_version=4)
    nbformat.validate(cells)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(cells, timeout=600, startup_timeout=600, resources=where).execute()
    plot = tmp_path / "out" / f"{script.stem}.png"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_script_becomes_cells() -> None:
    script = (
        '"""A title.\n\nA text.\n"""\n\n# %%\noptions = parser.parse_args()\n\n# %% [markdown]\n# ## Next\n#\n# text\n'
    )
    first, code, text = notebook(script, ["--small"])["cells"]
    assert "".join(first["source"]) == "# A title\n\nA text."
    assert "".join(code["source"]) == "options = parser.parse_args(['--small'])"
    assert (text["cell_type"], "".join(text["source"])) == ("markdown", "## Next\n\ntext")


@pytest.mark.parametrize("script", ["x = 1\n", '"""Title."""\n# %%\nx = 1\n'])
def test_other_scripts_are_errors(script: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        notebook(script)

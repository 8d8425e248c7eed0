"""Documents: the Python blocks run, and links to files lead to files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from registries import restored_registries

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def python_blocks(document: Path) -> list[Any]:
    """The compiled Python blocks of a document; an error names the line of the document."""
    text = document.read_text()
    blocks = []
    for match in _BLOCK.finditer(text):
        before = text.count("\n", 0, match.start(1))
        blocks.append(compile("\n" * before + match[1], str(document), "exec"))
    return blocks


def _name(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if python_blocks(d)], ids=_name)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_blocks(document)
    if document.name == "gpu.md" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    with restored_registries():
        for block in blocks:  # a later block may use the names of an earlier one
            exec(block, namespace)


def test_the_readme_has_examples_that_train_and_infer() -> None:
    assert len(python_blocks(ROOT / "README.md")) >= 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_lead_to_files(document: Path) -> None:
    links = [link for link in _LINK.findall(document.read_text()) if not link.startswith(("http:", "https:"))]
    assert [link for link in links if not (document.parent / link).exists()] == []

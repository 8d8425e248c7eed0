"""``make notebooks`` writes a Jupyter notebook for each script in examples/, which is its only source.

The scripts are in the percent format that Jupytext and editors read: ``# %%`` begins a cell of code, and the same with
``[markdown]`` one of text. The docstring of the script becomes the first cell. A notebook has no command line, so its
options are a list.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = EXAMPLES / "notebooks"
_OPTIONS = "parser.parse_args()"


def notebook(script: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """The notebook of a script, without outputs.

    Args:
        script: The text of the script.
        options: Those of its command line.

    Raises:
        ValueError: The script has no docstring, or does not read its options by ``parser.parse_args()``.
    """
    if script.count(_OPTIONS) != 1:
        raise ValueError(f"script: expected one {_OPTIONS}")
    script = script.replace(_OPTIONS, f"parser.parse_args({list(options)})")
    return {
        "cells": [_cell(number, kind, source) for number, (kind, source) in enumerate(cells(script))],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def cells(script: str) -> Iterator[tuple[str, str]]:
    """Kind (``markdown`` or ``code``) and source of each cell.

    Raises:
        ValueError: The script has no docstring.
    """
    title, _, text = (ast.get_docstring(ast.parse(script)) or "").partition("\n")
    if not title:
        raise ValueError("script: expected a docstring")
    yield "markdown", f"# {title.removesuffix('.')}\n{text}"
    for part in script.split("\n# %%")[1:]:
        head, _, source = part.partition("\n")
        if head.strip() == "[markdown]":
            yield "markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.strip().split("\n"))
        else:
            yield "code", source.strip()


def _cell(number: int, kind: str, source: str) -> dict[str, Any]:
    cell = {"cell_type": kind, "id": str(number), "metadata": {}, "source": source.splitlines(keepends=True)}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}


def as_text(content: dict[str, Any]) -> str:
    """The text of a notebook's file."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    NOTEBOOKS.mkdir(exist_ok=True)
    for path in sorted(EXAMPLES.glob("*.py")):
        (NOTEBOOKS / f"{path.stem}.ipynb").write_text(as_text(notebook(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())

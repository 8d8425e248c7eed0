"""All files give the same version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hne

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("build_backend/native.py", r'^VERSION = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
        ("CHANGELOG.md", r"^## \[(\d.+?)\]"),  # the newest comes first
    ],
)
def test_versions_agree(file: str, pattern: str) -> None:
    match = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert match is not None
    assert match[1] == hne.__version__

"""Imports from the folder of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def _import_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test import the modules of benchmarks/."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")

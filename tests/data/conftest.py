"""Tests find data only in the folders that they name."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_data_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HNE_DATA", raising=False)

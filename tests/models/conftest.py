"""Fixtures of the model tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[True, False], ids=["grad", "no-grad"])
def grad(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The test runs with and without gradients."""
    with torch.set_grad_enabled(request.param):
        yield request.param

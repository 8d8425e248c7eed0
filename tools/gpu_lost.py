"""A pytest plugin: ends a test process whose GPU context is lost, as after an illegal memory access.

All later calls on the GPU would fail in this process. pytest-xdist starts a new one, which runs the other tests; the
test that was to run next is reported as crashed.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

_failed = False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    _failed = _failed or report.failed


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if _failed and "PYTEST_XDIST_WORKER" in os.environ and is_lost():
        os._exit(70)
    return result


def is_lost() -> bool:
    """Whether the GPU that this process has used serves it no more."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

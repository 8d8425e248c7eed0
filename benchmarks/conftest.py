"""What the benchmarks share: the comparison as a fixture, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import Row, Side, compare
from machine import describe, machine
from pytest_benchmark.fixture import BenchmarkFixture
from table import machine_line, save, summary, text

_ROWS = pytest.StashKey[list[Row]]()
_QUICK = "Too few rounds to be figures: --benchmark-quick."

Versus = Callable[..., None]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture
def versus(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Versus:
    """``versus(fused, naive, name=, shape=, images=)``: see :func:`comparison.compare`."""
    quick = request.config.getoption("--benchmark-quick")

    def run(fused: Side, naive: Side, **options: Any) -> None:
        row = compare(benchmark, fused, naive, seconds=None if quick else 1.5, **options)
        if row is not None:
            request.config.stash[_ROWS].append(row)

    return run


@pytest.fixture(scope="session")
def rng() -> torch.Generator:
    """The same seed in every run: figures of different runs are to be compared."""
    return torch.Generator().manual_seed(0)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["hne"] = machine()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    quick = config.getoption("--benchmark-quick")
    facts = describe()
    terminalreporter.section("fused against naive")
    terminalreporter.write_line(machine_line(facts))
    for line, row in zip(text(rows), [None, *rows], strict=True):
        terminalreporter.write_line(line, bold=row is None, red=row is not None and row.ratio < 1)
    terminalreporter.write_line(summary(rows), bold=True)
    if quick:
        terminalreporter.write_line(_QUICK, yellow=True)
    path = config.getoption("--benchmark-save-table")
    if path is not None:
        for written in save(path, rows, facts, _QUICK if quick else ""):
            terminalreporter.write_line(f"written: {written}")

"""``pytest`` runs tests/; ``pytest --benchmark`` runs benchmarks/ instead."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hne", "HNE kernels")
    group.addoption("--benchmark", action="store_true", help="run the throughput comparisons instead of the tests")
    group.addoption(
        "--benchmark-quick",
        action="store_true",
        help="run every comparison for one round only: shows that it works, not how fast it is",
    )
    group.addoption(
        "--benchmark-workload",
        choices=("cpu", "gpu", "rehearsal"),
        help="comparisons to run (default: those for this machine); rehearsal: those for a GPU, tiny, on a CPU",
    )
    group.addoption(
        "--benchmark-budget",
        metavar="SECONDS",
        type=float,
        help="skip all comparisons that have not begun after this time",
    )
    group.addoption(
        "--benchmark-without",
        metavar="SIDE",
        action="append",
        default=[],
        help="leave out a side, for example compiled (repeatable)",
    )
    group.addoption(
        "--benchmark-save-table",
        metavar="PATH",
        type=Path,
        help="write the table of the comparisons, with machine and commit, to PATH.md and PATH.json; "
        "earlier rows of the same machine and commit stay",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs the plugin: pip install pytest-benchmark")
    if not config.getoption("--benchmark-compare"):
        config.option.benchmark_quiet = True  # its table lacks the naive side; ours has both


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect from only one of the folders beside this file."""
    wanted = "benchmarks" if config.getoption("--benchmark") else "tests"
    beside = collection_path.parent == config.rootpath and collection_path.is_dir()
    return True if beside and collection_path.name != wanted else None

"""What the benchmarks share: the comparison as a fixture, and the table at the end."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import Row, Watch, compare
from machine import describe, machine
from meters import Meter, Side
from roofline import Rates, Work, measure
from table import machine_line, save, summary, text
from workload import WORKLOADS, Workload, default

import hne_kernels as K

_ROWS = pytest.StashKey[list[Row]]()
_START = pytest.StashKey[float]()
_QUICK = "Too few rounds to be figures: --benchmark-quick."

Versus = Callable[..., None]
# What a compiled side compiles, and another leaves as it is.
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.stash[_START] = time.monotonic()
    workload = _workload(config)
    if not workload.backends:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in K.unavailable_backends().items())
        raise pytest.UsageError(f"no backend can serve a GPU here ({reasons})")
    if workload.device == "cuda":
        # As fast as PyTorch can: the naive sides profit, and the fused ones follow the choice of TF32.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def _workload(config: pytest.Config) -> Workload:
    return WORKLOADS[config.getoption("--benchmark-workload") or default()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    workload = _workload(metafunc.config)
    for argument, cases in (("inference", workload.inference), ("training", workload.training)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases, ids=["-".join(map(_plain, case)) for case in cases])


def _plain(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture(scope="session")
def workload(pytestconfig: pytest.Config) -> Workload:
    return _workload(pytestconfig)


@pytest.fixture(scope="session")
def meter(workload: Workload) -> Meter:
    return workload.meter


@pytest.fixture(scope="session")
def rates(workload: Workload, meter: Meter) -> Callable[[torch.dtype], Rates | None]:
    """What this machine was seen to do in a dtype, measured once; None where it is not asked for."""

    @functools.cache
    def of(dtype: torch.dtype) -> Rates | None:
        if workload.rates is None:
            return None
        megabytes, size = workload.rates
        return measure(meter, torch.device(workload.device), dtype, megabytes=megabytes, size=size)

    return of


@pytest.fixture
def _within_budget(pytestconfig: pytest.Config) -> None:
    budget = pytestconfig.getoption("--benchmark-budget")
    if budget is not None and time.monotonic() - pytestconfig.stash[_START] > budget:
        pytest.skip(f"the budget of {budget:g} s is used up")


@pytest.fixture
def versus(
    _within_budget: None,
    request: pytest.FixtureRequest,
    workload: Workload,
    meter: Meter,
    rates: Callable[[torch.dtype], Rates | None],
) -> Iterator[Versus]:
    """``versus(fused, naive, channels_last=None, name=, shape=, images=, dtype=, work=None)``: see
    :func:`comparison.compare`.

    A side is given by a function of what compiles (or leaves alone) what it calls; it is made and called with the
    backend that it stands for. ``work()`` tells the least that a call must do. With ``launched``, naive is timed as it
    is launched from Python as well, where it is a graph otherwise.
    """
    quick = request.config.getoption("--benchmark-quick")
    watch = Watch()
    request.node.add_marker(pytest.mark.benchmark(timer=watch))
    benchmark = request.getfixturevalue("benchmark")

    def side(backend: str, make: Callable[[Wrap], Side], wrap: Wrap) -> Side:
        served = (lambda call: call()) if backend == "" else functools.partial(_served, backend)
        call = served(lambda: make(wrap))
        return lambda: served(call)

    def run(
        fused: Callable[[Wrap], Side],
        naive: Callable[[Wrap], Side],
        channels_last: Callable[[Wrap], Side] | None = None,
        *,
        dtype: torch.dtype,
        work: Callable[[], Work],
        launched: bool = False,
        training: bool = False,
        **options: Any,
    ) -> None:
        reached = rates(dtype)
        floor_ms = None if reached is None else work().floor_seconds(reached) * 1e3
        compiled = functools.partial(torch.compile, dynamic=False, **workload.compiler)
        makers = {
            "naive": (naive, _as_it_is),
            "eager": (naive if launched else None, _as_it_is),
            "channels_last": (channels_last, _as_it_is),
            "compiled": (naive, compiled),
            "channels_last_compiled": (channels_last, compiled),
        }
        with meter.running():
            rows = compare(
                benchmark,
                {backend: side(backend, fused, _as_it_is) for backend in workload.backends},
                {
                    name: side("reference", make, wrap)
                    for name, (make, wrap) in makers.items()
                    if make is not None and name in ("naive", *workload.naive)
                },
                meter=meter,
                watch=watch,
                precision=workload.precision(dtype, training=training),
                floor_ms=floor_ms,
                seconds=None if quick else workload.seconds,
                **options,
            )
        request.config.stash[_ROWS] += rows
        _save(request.config)

    yield run
    torch._dynamo.reset()


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _served(backend: str, call: Side) -> Any:
    with K.use_backend(backend):
        return call()


@pytest.fixture(scope="session")
def rng() -> torch.Generator:
    """The same seed in every run: figures of different runs are to be compared."""
    return torch.Generator().manual_seed(0)


@functools.cache
def _facts() -> dict[str, str]:
    return describe()


def _save(config: pytest.Config) -> list[Any]:
    """Write the table as it stands; after each comparison, since a run may be cut off."""
    path = config.getoption("--benchmark-save-table")
    if path is None:
        return []
    note = _QUICK if config.getoption("--benchmark-quick") else ""
    return save(path, config.stash[_ROWS], _facts(), note)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["hne"] = machine()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    terminalreporter.section("fused against naive")
    terminalreporter.write_line(machine_line(_facts()))
    for line, row in zip(text(rows), [None, *rows], strict=True):
        terminalreporter.write_line(line, bold=row is None, red=row is not None and row.ratio < 1)
    terminalreporter.write_line(summary(rows), bold=True)
    if config.getoption("--benchmark-quick"):
        terminalreporter.write_line(_QUICK, yellow=True)
    for written in _save(config):
        terminalreporter.write_line(f"written: {written}")

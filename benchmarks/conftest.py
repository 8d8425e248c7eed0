"""Shared by all benchmarks: the fixture that compares sides, and the table at the end of a run."""

from __future__ import annotations

import functools
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from comparison import LostDevice, Row, Watch, compare
from derived import is_in_large_table, small_tables
from machine import describe, machine
from memory import give_back
from meters import Meter, Side
from processes import ProcessCase, compare_processes
from roofline import Rates, Work, measure
from table import aligned, failures, machine_line, save, summary, text
from worker import Files, write_files
from workload import WORKLOADS, Network, Workload, default

import hne_kernels as K
from hne import FusedHNE
from hne.inference import freezing, missing

_ROWS = pytest.StashKey[list[Row]]()
_REMARKS = pytest.StashKey[list[str]]()
_START = pytest.StashKey[float]()
_QUICK = "Too few rounds for a measurement: --benchmark-quick."

Versus = Callable[..., None]
# Either torch.compile or the identity: a compiled side and an eager side are made by the same function.
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS], config.stash[_REMARKS] = [], []
    config.stash[_START] = time.monotonic()
    workload = _workload(config)
    if not workload.backends:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in K.unavailable_backends().items())
        raise pytest.UsageError(f"no backend can serve a GPU here ({reasons})")
    if workload.device == "cuda":
        # PyTorch's fastest settings, for the peers; the fused sides follow the choice of TF32.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def _workload(config: pytest.Config) -> Workload:
    return WORKLOADS[config.getoption("--benchmark-workload") or default()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    workload = _workload(metafunc.config)
    for argument, cases in {
        "training": workload.training,
        "inference": workload.inference,
        "anytime": workload.anytime,
        "head": workload.heads,
        "processes": workload.processes,
        "contention": workload.contention,
    }.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases, ids=["-".join(map(_plain, case)) for case in cases])


def _plain(value: object) -> str:
    return value.name if isinstance(value, Network) else str(value).removeprefix("torch.")


@pytest.fixture(scope="session")
def workload(pytestconfig: pytest.Config) -> Workload:
    return _workload(pytestconfig)


@pytest.fixture(scope="session")
def meter(workload: Workload) -> Meter:
    return workload.meter


@pytest.fixture(scope="session")
def rates(pytestconfig: pytest.Config, workload: Workload, meter: Meter) -> Callable[[torch.dtype], Rates]:
    """Rates of this machine in a dtype, measured beside each comparison: other guests of a machine change them."""
    found: dict[torch.dtype, list[Rates]] = defaultdict(list)

    def of(dtype: torch.dtype) -> Rates:
        megabytes, sizes = workload.rates
        found[dtype].append(measure(meter, torch.device(workload.device), dtype, megabytes=megabytes, sizes=sizes))
        least, most = (choose(found[dtype], key=lambda rates: rates.flops_per_s) for choose in (min, max))
        span = str(most) if len(found[dtype]) == 1 else f"{least} to {most}"
        _remark(pytestconfig, f"peak in {_plain(dtype)}, measured beside each row: ", span)
        return found[dtype][-1]

    return of


def _remark(config: pytest.Config, subject: str, value: str = "") -> None:
    """Add a line to the remarks of the table, in the place of an earlier one with the same subject."""
    lines = config.stash[_REMARKS]
    lines[:] = [line for line in lines if not line.startswith(subject)] + [subject + value]


@pytest.fixture
def _within_budget(pytestconfig: pytest.Config) -> None:
    budget = pytestconfig.getoption("--benchmark-budget")
    if budget is not None and time.monotonic() - pytestconfig.stash[_START] > budget:
        pytest.skip(f"the budget of {budget:g} s is used up")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Network, int], Files]:
    """The weights and graphs of a network and an ensemble size, which engines and processes load; written when first
    asked for."""
    by_name: dict[str, tuple[Path, FusedHNE]] = {}

    def of(network: Network, num_models: int) -> Files:
        if network.name not in by_name:
            by_name[network.name] = tmp_path_factory.mktemp("files"), network.build()
        return write_files(*by_name[network.name], num_models, network.size)

    return of


@pytest.fixture
def watch(request: pytest.FixtureRequest, _within_budget: None) -> Watch:
    """The clock of pytest-benchmark in a test; to be asked for before its fixture."""
    watch = Watch()
    request.node.add_marker(pytest.mark.benchmark(timer=watch))
    return watch


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Callable[[list[Row]], None]:
    """Return ``record(rows)``: it puts the rows of this comparison, so far, into the table, and saves it."""
    all_rows = pytestconfig.stash[_ROWS]
    first = len(all_rows)

    def record(rows: list[Row]) -> None:
        all_rows[first:] = rows
        _save(pytestconfig)

    return record


@pytest.fixture
def in_processes(
    watch: Watch,
    record: Callable[[list[Row]], None],
    files: Callable[[Network, int], Files],
    workload: Workload,
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """Return ``in_processes(name, case, neighbour=None)``; see :func:`processes.compare_processes`."""
    benchmark = request.getfixturevalue("benchmark")

    def in_processes(name: str, case: ProcessCase, neighbour: str | None = None) -> None:
        record(compare_processes(name, case, files, workload, watch, benchmark, request.config, neighbour))

    return in_processes


@pytest.fixture
def versus(
    watch: Watch,
    record: Callable[[list[Row]], None],
    request: pytest.FixtureRequest,
    workload: Workload,
    meter: Meter,
    rates: Callable[[torch.dtype], Rates],
) -> Iterator[Versus]:
    """Return ``versus(fused, naive, channels_last, folded, peers, name=, shape=, images=, dtype=, work=)``.

    See :func:`comparison.compare`. The arguments ``fused``, ``naive``, ``channels_last`` and ``folded`` (the last two
    may be absent) are functions that make a side. They take ``wrap``, which is ``torch.compile`` or the identity, and
    apply it to the function that is timed. A side is made and called under its own backend. ``peers`` and ``beside``
    map names to functions without arguments that make a side; a side in ``beside`` gets a row of its own. ``kind``
    selects the peers, see :mod:`workload`. ``work()`` returns the least work of a call.
    """
    quick = request.config.getoption("--benchmark-quick")
    benchmark = request.getfixturevalue("benchmark")

    def side(backend: str, make: Callable[[Wrap], Side], wrap: Wrap) -> Side:
        """A side that is made in its first call, so that a failure there is its own."""
        run = (lambda call: call()) if backend == "" else functools.partial(_run_on, backend)
        made = functools.cache(lambda: run(lambda: make(wrap)))
        return lambda: run(made())

    def versus(
        fused: Callable[[Wrap], Side],
        naive: Callable[[Wrap], Side],
        channels_last: Callable[[Wrap], Side] | None = None,
        folded: Callable[[Wrap], Side] | None = None,
        peers: Mapping[str, Callable[[], Side]] = MappingProxyType({}),
        *,
        dtype: torch.dtype,
        work: Callable[[], Work],
        kind: str = "op",
        beside: Mapping[str, Callable[[], Side]] = MappingProxyType({}),
        training: bool = False,
        **options: Any,
    ) -> None:
        floor_ms = work().floor_seconds(rates(dtype)) * 1e3
        others = workload.others.get(kind, ())
        compiled = functools.partial(torch.compile, dynamic=False, **workload.compiler)
        makers = {
            "naive": (naive, _identity),
            "eager": (naive, _identity),
            "channels_last": (channels_last, _identity),
            "compiled": (naive, compiled),
            "channels_last_compiled": (channels_last, compiled),
            "frozen": (folded, compiled),
        }
        absent = {name: why for name in peers if name in others and (why := missing(name))}
        for why in absent.values():
            _remark(request.config, why)
        give_back()  # free the memory of earlier comparisons: all start alike
        without = request.config.getoption("--benchmark-without")
        ours = {backend: side(backend, fused, _identity) for backend in workload.backends}
        ours |= {name: side("", lambda wrap, make=make: make(), _identity) for name, make in beside.items()}
        theirs = {
            name: side("reference", make, wrap)
            for name, (make, wrap) in makers.items()
            if make is not None and name in ("naive", *others)
        }
        theirs |= {
            name: side("", lambda wrap, make=make: make(), _identity)
            for name, make in peers.items()
            if name in others and name not in absent
        }
        ours, theirs = ({n: made for n, made in sides.items() if n not in without} for sides in (ours, theirs))
        try:
            with meter.running(), freezing("frozen" in others):
                rows = compare(
                    benchmark,
                    ours,
                    theirs,
                    meter=meter,
                    watch=watch,
                    precision=workload.precision(dtype, training=training),
                    floor_ms=floor_ms or None,
                    seconds=None if quick else workload.seconds,
                    groups=workload.groups(list(theirs), list(ours)),
                    report=record,
                    **options,
                )
        except LostDevice as lost:
            pytest.exit(f"the GPU is lost after the side {lost}", returncode=1)
        if failed := failures(rows):
            pytest.fail("; ".join(failed), pytrace=False)

    yield versus
    torch._dynamo.reset()
    gc.collect()


def _identity(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _run_on(backend: str, call: Side) -> Any:
    with K.use_backend(backend):
        return call()


@pytest.fixture(scope="session")
def rng() -> torch.Generator:
    """Same seed in every run, so that runs can be compared."""
    return torch.Generator().manual_seed(0)


@functools.cache
def _facts() -> dict[str, str]:
    return describe()


def _save(config: pytest.Config) -> list[Any]:
    """Write the table so far. Called after each comparison, because a run may be interrupted."""
    path = config.getoption("--benchmark-save-table")
    if path is None:
        return []
    note = _QUICK if config.getoption("--benchmark-quick") else ""
    return save(path, config.stash[_ROWS], _facts(), note, config.stash[_REMARKS])


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["hne"] = machine()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    terminalreporter.section("fused against naive")
    terminalreporter.write_line(machine_line(_facts()))
    large = [row for row in rows if is_in_large_table(row)]
    if large:
        for line, row in zip(text(large), [None, *large], strict=True):
            terminalreporter.write_line(line, bold=row is None, red=row is not None and row.ratio < 1)
        terminalreporter.write_line(summary(large), bold=True)
    for table in small_tables(rows):
        terminalreporter.section(table.title, sep="-")
        for line in aligned(table.header, table.lines):
            terminalreporter.write_line(line)
    if failed := failures(rows):
        terminalreporter.section("sides that failed", sep="-")
        for line in failed:
            terminalreporter.write_line(line)
    terminalreporter.section("remarks", sep="-")
    for remark in config.stash[_REMARKS]:
        terminalreporter.write_line(remark)
    if config.getoption("--benchmark-quick"):
        terminalreporter.write_line(_QUICK, yellow=True)
    for written in _save(config):
        terminalreporter.write_line(f"written: {written}")

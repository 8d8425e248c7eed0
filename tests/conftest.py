"""Fixtures for all tests: reproducible random inputs, new memory filled with NaN, and the backends."""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from placements import PLACEMENTS, SEED, Placement
from threads import on_threads

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU, Triton's kernels run in its interpreter

# Inductor caches generated graphs by a key without ATEN_CPU_CAPABILITY: after a change of the variable, a graph of the
# earlier instruction set would be taken and not compile. Compiled code has its text and flags as key, and stays cached.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")

import hne_kernels as K
from hne_kernels import extension

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    # Checks of sums for 32-bit overflow take a third of the interpreter's time; the tests are too small to overflow.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    # Each call of a device function would search triton.language again for what the interpreter replaces. The launch of
    # the kernel has done so; only the modules of Triton's own functions name other parts, and are searched once.
    _searched: set[int] = set()

    def _call(function: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        names = function.fn.__globals__
        if id(names) not in _searched:
            interpreter._patch_lang(function.fn)
            _searched.add(id(names))
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call
    _numpy_dtypes: dict[str, object] = {}
    _numpy_dtype = interpreter._get_np_dtype

    def _known_numpy_dtype(dtype: tl.dtype) -> object:
        """The same without a new table of all dtypes in each call."""
        if dtype.name not in _numpy_dtypes:
            _numpy_dtypes[dtype.name] = _numpy_dtype(dtype)
        return _numpy_dtypes[dtype.name]

    interpreter._get_np_dtype = _known_numpy_dtype

# pytest loads this file in a run of the benchmarks, too, and then calls the functions below.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first: one that began last would run alone while the other processes have nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_report_header(config: pytest.Config) -> list[str]:
    if config.getoption("--benchmark"):
        return []
    return [
        f"inputs: HNE_TEST_SEED={SEED}",
        f"backends: {', '.join(K.available_backends())}; "
        + "; ".join(f"not {name}: {reason}" for name, reason in K.unavailable_backends().items()),
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed") and not terminalreporter.config.getoption("--benchmark"):
        terminalreporter.write_line(f"To repeat with the same inputs: HNE_TEST_SEED={SEED}", yellow=True)


def _params(dtype: torch.dtype | None = None) -> list[object]:
    """The placements on the available backends, of one dtype or of all (test_backends.py tests missing backends)."""
    return [
        pytest.param(placement, id=str(placement))
        for placement in PLACEMENTS
        if placement.backend in K.available_backends() and dtype in (None, placement.dtype)
    ]


@pytest.fixture(params=_params())
def placement(request: pytest.FixtureRequest) -> Iterator[Placement]:
    """Every available backend in every dtype that it supports. The ops that the test calls run on that backend."""
    with K.use_backend(request.param.backend):
        yield request.param


@pytest.fixture(params=_params(torch.float32))
def backend(request: pytest.FixtureRequest) -> Iterator[Placement]:
    """Every available backend, in float32."""
    with K.use_backend(request.param.backend):
        yield request.param


@pytest.fixture(params=_params(torch.float64))
def double(request: pytest.FixtureRequest) -> Iterator[Placement]:
    """Every available backend that supports float64, which numerical differentiation needs."""
    with K.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded by the run and the test, so that the selection of tests does not change the inputs."""
    return torch.Generator().manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=[True, False], ids=["grad", "no-grad"])
def grad(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The test runs with and without gradients."""
    with torch.set_grad_enabled(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill all new memory with NaN, also in the compiled ops, so that a value that a kernel omits is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    extension.cpu_library().poison_memory(True)
    yield
    extension.cpu_library().poison_memory(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, for numerical differentiation: its many small calls would mostly wait for threads."""
    with on_threads(1):
        yield

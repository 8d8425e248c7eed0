"""What every test gets: fresh inputs that can be drawn again, poisoned memory, each backend in turn."""

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

import hne_kernels as K
from hne_kernels import extension

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    # Sizes of tests are small, and a third of the interpreter's time is looking whether each sum still has 32 bits.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

# Both are called in a run of the benchmarks, too: pytest looks into tests/ at its start.


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
        terminalreporter.write_line(f"The same inputs again: HNE_TEST_SEED={SEED}", yellow=True)


def _params(dtype: torch.dtype | None = None) -> list[object]:
    """Places to compute in, of one dtype or of all, on the backends that are here (test_backends.py names the rest)."""
    return [
        pytest.param(place, id=str(place))
        for place in PLACEMENTS
        if place.backend in K.available_backends() and dtype in (None, place.dtype)
    ]


@pytest.fixture(params=_params())
def placement(request: pytest.FixtureRequest) -> Iterator[Placement]:
    """Every backend in every dtype it serves; calls inside the test go to that backend."""
    with K.use_backend(request.param.backend):
        yield request.param


@pytest.fixture(params=_params(torch.float32))
def backend(request: pytest.FixtureRequest) -> Iterator[Placement]:
    """Every backend, in float32."""
    with K.use_backend(request.param.backend):
        yield request.param


@pytest.fixture(params=_params(torch.float64))
def double(request: pytest.FixtureRequest) -> Iterator[Placement]:
    """Every backend that computes in float64, as numerical differentiation needs."""
    with K.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Inputs that differ from run to run and from test to test, whichever tests run beside it."""
    return torch.Generator().manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN (the compiled ops' outputs too): what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    extension.cpu_library().poison_memory(True)
    yield
    extension.cpu_library().poison_memory(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For the many tiny calls of numerical differentiation, where waking threads is most of the time."""
    with on_threads(1):
        yield

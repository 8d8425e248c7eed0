"""The counter of processor cycles."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.usefixtures("_import_benchmarks")


def test_more_work_takes_more_cycles() -> None:
    from cycles import CounterError, open_counter

    try:
        cycles = open_counter()
    except CounterError as error:
        pytest.skip(str(error))
    x = torch.randn(96, 96)
    torch.mm(x, x)  # the first call prepares more
    counts = []
    for repeats in (1, 400):
        start = cycles()
        for _ in range(repeats):
            torch.mm(x, x)
        counts.append(cycles() - start)
    assert 0 < 10 * counts[0] < counts[1]


def test_products_have_their_multiply_adds() -> None:
    from cycles import products

    for case in products():
        out = case.call()
        assert isinstance(out, torch.Tensor)
        kernel, inputs = int(case.name[0]), int(case.name.split()[1])
        assert case.macs == out.numel() * kernel**2 * inputs

"""The allocator of the CPU ops reuses freed buffers and holds little more memory than the peak in use."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hne_kernels as K
from hne_kernels import extension

pytestmark = pytest.mark.skipif(
    bool(K.build_info()["sanitizers"]) or extension.CUDA_EMULATED,
    reason="a build with sanitizers holds no idle memory, and the CUDA kernels use PyTorch's allocator",
)

SPARE = 64 * 1024  # KiB of idle memory beyond the peak in use


@pytest.fixture(autouse=True)
def _released() -> None:
    K.release_memory()


def _output(kib: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output of an op, with a size in KiB."""
    rows = kib * 1024 // dtype.itemsize // 32
    return K.prefix_mean(torch.zeros(1, rows, 32, dtype=dtype))


def test_memory_is_used_again() -> None:
    first = _output(1000)
    address = first.data_ptr()
    assert address % 64 == 0
    view = first[:, 3:]
    del first
    assert _output(1000).data_ptr() != address, "a view still uses it"
    del view
    assert address in {_output(1000).data_ptr(), _output(990).data_ptr()}


def test_a_larger_tensor_takes_the_place_of_a_smaller_one() -> None:
    small = _output(SPARE + 8000)
    del small
    large = _output(2 * SPARE)  # idle memory is returned to the system for it
    assert K.release_memory() == 0
    del large
    assert 2 * SPARE * 1024 <= K.release_memory() <= 2 * SPARE * 1024 * 9 // 8 + 4096


def test_hardly_more_than_was_in_use() -> None:
    both = [_output(10_000), _output(20_000)]
    both.clear()
    most = K.release_memory()
    for mib in (10, 20, 7, 15, 1, 25, 3, 12, 14, 17, 19, 22, 5, 9):
        _output(mib * 1000)
    assert 0 < K.release_memory() <= most * 5 // 4 + SPARE * 1024


def test_a_call_finds_what_the_last_one_left() -> None:
    """With any sequence of sizes, no call maps and unmaps memory."""

    def call() -> set[int]:
        return {_output(kib).data_ptr() for kib in (1000, 4000, 2000, 500, 300, 3000, 100)}

    first = call()
    assert all(call() == first for _ in range(5))


def test_what_is_released_goes_back_to_the_system(rng: torch.Generator) -> None:
    """After blocks of all sizes were used and freed between other allocations."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def large(kib: int) -> Tensor:  # with a small input
        return K.branch_conv2d(torch.zeros(1, 1, kib, 4, 1), torch.zeros(1, 64, 1, 1, 1))

    before, outputs, between = resident(), [], []
    for kib in torch.randint(100, 8000, (300,), generator=rng).tolist():
        outputs.append(large(kib))
        between.append(torch.zeros(1000))
        if len(outputs) > 6:
            del outputs[kib % 6]
    outputs.clear()
    K.release_memory()
    assert resident() - before < 16 * 2**20


def test_small_tensors_are_left_to_the_system() -> None:
    del_me = _output(32)
    del del_me
    assert K.release_memory() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_are_ordinary_tensors(dtype: torch.dtype) -> None:
    y = _output(200, dtype)
    assert y.is_contiguous()
    assert y.dtype == dtype
    y.add_(1).resize_(3)
    assert torch.equal(y, torch.ones(3, dtype=dtype))
    other = _output(200, dtype)
    other.share_memory_()
    assert torch.equal(other, torch.zeros_like(other))


def test_threads_have_memory_of_their_own() -> None:
    """Tensors of several threads never share memory."""
    wrong = []

    def work(number: int) -> None:
        tensors: list[Tensor] = []
        for turn in range(200):
            tensors.append(_output(64 + 16 * (turn % 3)).fill_(number))
            if len(tensors) > 3:
                y = tensors.pop(turn % 3)
                if not torch.all(y == number):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

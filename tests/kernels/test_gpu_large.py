"""Tensors with more elements than 32 bits can index, on a GPU."""

from __future__ import annotations

import contextlib
import fcntl
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_memory
import pytest
import torch
from gpu_memory import GIB, vast_tensors
from torch import Tensor

import hne_kernels as K

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both GPU backends. On a machine with a GPU, both must be usable."""
    with K.use_backend(request.param):
        yield request.param


_ONE = torch.bfloat16
_IMAGES = 2**15 + 2**11  # of 32 x 32 x 64 values: 2.28e9 values, more than 32 bits can index


def _vast(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=_ONE, device="cuda").normal_()


def _weights(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(_ONE) / 8


def _bottleneck(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    channels, middle = x.shape[-1], 16
    return K.fused_bottleneck(
        x,
        *(K.pack_weight(_weights(1, middle, channels, 1, 1)), _weights(1, middle)),
        *(_weights(1, 3, 3, middle), _weights(1, middle)),
        *(K.pack_weight(_weights(1, channels, middle, 1, 1)), _weights(1, channels)),
        identity=True,
    )


def _convolution(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return K.branch_conv2d(x, _weights(1, 16, x.shape[-1], 3, 3), padding=1)


def _wide_convolution(x: Tensor) -> Tensor:
    """A convolution with a large result, not input."""
    torch.manual_seed(0)
    return K.branch_conv2d(x[..., :8], _weights(1, 64, 8, 1, 1))


def _depthwise(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return K.branch_depthwise_conv2d(x, _weights(1, x.shape[-1], 3, 3), padding=1)


def _fused(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return K.fused_conv2d(x, K.pack_weight(_weights(1, 32, x.shape[-1], 1, 1)), _weights(1, 32))


VAST = [_convolution, _wide_convolution, _depthwise, _fused, _bottleneck]


@contextlib.contextmanager
def _right_or_clear() -> Iterator[None]:
    """Allow a clear error for more elements than an op can index."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not any(text in str(error) for text in ("2^31", "too many elements")):
            raise
        torch.cuda.synchronize()


@needs_gpu
@vast_tensors(40)
@pytest.mark.parametrize("op", VAST, ids=lambda op: op.__name__.strip("_"))
def test_more_elements_than_32_bits_can_number(op: Callable[[Tensor], Tensor], backend: str) -> None:
    """The first and the last images have the same results as alone."""
    x = _vast(1, _IMAGES, 32, 32, 64)
    assert x.numel() > 2**31
    with _right_or_clear():
        y = op(x)
        for part in (slice(0, 2), slice(-2, None)):
            torch.testing.assert_close(y[:, part], op(x[:, part].contiguous()), rtol=2e-2, atol=2e-2)


@needs_gpu
@vast_tensors(50)
def test_statistics_of_vast_tensors(backend: str) -> None:
    x = _vast(1, _IMAGES, 32, 32, 64)
    x[:, _IMAGES // 2 :] += 2  # so that a missed second half shows
    with _right_or_clear():
        y, mean, var = K.branch_norm_conv2d(x, torch.ones(1, 64, 1, 1, dtype=_ONE, device="cuda"))
        torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-2)
        torch.testing.assert_close(var, torch.full_like(var, 2.0), rtol=1e-2, atol=0)
        z = K.branch_normalize(y, torch.stack([mean, var.rsqrt(), -mean]))
        for part in (slice(0, 1), slice(-1, None)):
            assert torch.equal(y[:, part], x[:, part])
            want = (x[:, part].float() - mean) * var.rsqrt() - mean
            torch.testing.assert_close(z[:, part].float(), want, rtol=2e-2, atol=2e-2)


@needs_gpu
@vast_tensors(40)
def test_vast_ensembles(backend: str) -> None:
    logits = _vast(2, 2**21, 513)
    assert logits.numel() > 2**31
    with _right_or_clear():
        prefix = K.prefix_mean(logits)
        want = torch.stack([logits[0, -2:], logits[:, -2:].float().mean(0).to(_ONE)])
        torch.testing.assert_close(prefix[:, -2:], want)
    del prefix
    target = torch.zeros(logits.shape[1], dtype=torch.int64, device="cuda")
    with _right_or_clear(), torch.no_grad():
        assert K.hierarchical_distillation_loss(logits, target).isfinite()


@pytest.mark.parametrize("op", [*VAST, K.prefix_mean], ids=lambda op: op.__name__.strip("_"))
def test_shapes_of_vast_tensors(op: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes do not overflow; tensors without memory show that."""
    monkeypatch.setattr(f"{__name__}._weights", lambda *shape: torch.empty(shape, dtype=_ONE, device="meta"))
    shape = (2, 2**22, 513) if op is K.prefix_mean else (1, 2**23, 32, 32, 64)
    y = op(torch.empty(shape, dtype=_ONE, device="meta"))
    assert y.shape[:2] == shape[:2]
    assert y.numel() == y.shape.numel() > 2**31


# --- turns of parallel processes -----------------------------------------------------------------------------


@pytest.fixture
def lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_memory, "lock_file", lambda: tmp_path / "lock")
    return tmp_path / "lock"


def _memory(monkeypatch: pytest.MonkeyPatch, *free: int, reserved: int = 0) -> None:
    """A GPU of 80 GiB with these numbers of free GiB, one for each look."""
    looks = iter(free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(looks) * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved * GIB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def _locked(path: Path) -> bool:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_vast_tensors_take_turns(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _memory(monkeypatch, 40)
    with vast_tensors(40):
        assert _locked(lock_file)
    assert not _locked(lock_file)


def test_without_memory_the_reason_is_said(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _memory(monkeypatch, 39)
    with pytest.raises(pytest.skip.Exception, match="needs 40 GiB of free GPU memory, there are 39"):
        vast_tensors(40)(pytest.fail)("ran without memory")
    assert not _locked(lock_file)


@pytest.mark.usefixtures("lock_file")
def test_memory_that_others_take_meanwhile_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    _memory(monkeypatch, 60, 3, reserved=20)
    with pytest.raises(pytest.skip.Exception, match="other programs left 23 of 80 meanwhile"), vast_tensors(40):
        raise torch.OutOfMemoryError


def test_a_failed_test_keeps_no_memory(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _memory(monkeypatch, 60)
    alive = []

    @vast_tensors(40)
    def failing() -> None:
        x = torch.ones(3)
        alive.append(weakref.ref(x))
        raise AssertionError("wrong result")

    with pytest.raises(AssertionError, match="wrong result") as kept:
        failing()
    assert alive[0]() is None, f"held by {kept.traceback}"
    assert not _locked(lock_file)


@pytest.mark.usefixtures("lock_file")
def test_memory_that_the_op_wastes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _memory(monkeypatch, 60, 3, reserved=57)
    with pytest.raises(torch.OutOfMemoryError), vast_tensors(40):
        raise torch.OutOfMemoryError

"""Features that are normalised where they are read: the same values and gradients as one op after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from placements import Placement
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hne_kernels as K

Weights = dict[str, Tensor]


def _weights(rng: torch.Generator, place: Placement) -> Weights:
    shapes = {
        "x": (2, 3, 6, 5, 8),
        "expand": (2, 4, 8, 1, 1),
        "depthwise": (2, 4, 3, 3),
        "project": (2, 16, 4, 1, 1),
        "shortcut": (2, 16, 8, 1, 1),
        "norm": (3, 2, 16),
        "next": (2, 3, 16, 1, 1),
        "branching": (4, 5, 16, 1, 1),
    }
    return {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).to(place.device).requires_grad_()
        for name, shape in shapes.items()
    }


def _norm(statistics: K.ConvStats) -> Tensor:
    """Batch norm without parameters."""
    return torch.stack([statistics.mean, (statistics.var + 1e-5).rsqrt(), torch.zeros_like(statistics.var)])


def _bottleneck(w: Weights, store: Callable[[K.Features], K.Features] = lambda x: x) -> K.Features:
    """A bottleneck with a projecting shortcut; ``store`` may materialise the features between the ops."""

    def conv_norm(x: K.Features, weight: str, activation: str, residual: K.Features | None = None) -> K.Features:
        statistics = K.conv_stats(x, w[weight], padding=w[weight].shape[-1] // 2)
        return store(statistics.normalize(_norm(statistics), activation, residual))

    y = conv_norm(w["x"], "expand", "relu")
    y = conv_norm(y, "depthwise", "relu6")
    return conv_norm(y, "project", "relu", conv_norm(w["x"], "shortcut", "none"))


def _entry(z: K.Features, weight: Tensor, **options: int) -> list[Tensor]:
    x, statistics = K.entry_conv_stats(z, weight, **options)
    return [x, *statistics[2:], K.materialize(statistics.normalize(_norm(statistics)))]


# The ways to read the features at the end of a bottleneck.
READERS: dict[str, Callable[[K.Features, Weights], list[Tensor]]] = {
    "materialize": lambda z, w: [K.materialize(z)],
    "conv": lambda z, w: list(K.conv_stats(z, w["branching"], stride=2, replicate=2)[2:]),
    "entry": lambda z, w: _entry(z, w["next"]),
    "branching entry": lambda z, w: _entry(z, w["branching"], replicate=2),
    "residual": lambda z, w: [
        K.materialize(K.conv_stats(w["x"], w["shortcut"]).normalize(w["norm"], "relu6", residual=z))
    ],
}


@pytest.mark.parametrize("reader", READERS)
def test_values_and_gradients(reader: str, double: Placement, rng: torch.Generator) -> None:
    w = _weights(rng, double)
    got = READERS[reader](_bottleneck(w), w)
    with K.use_backend("reference"):
        want = READERS[reader](_bottleneck(w, K.materialize), w)
    torch.testing.assert_close(got, want)
    grads = [torch.randn(r.shape, generator=rng, dtype=torch.float64).to(r) for r in want]
    gradients = [torch.autograd.grad(results, list(w.values()), grads, allow_unused=True) for results in (got, want)]
    torch.testing.assert_close(*([g for g in gs if g is not None] for gs in gradients))


def test_a_wide_1x1_convolution_is_deferred_where_it_has_kernels(double: Placement, rng: torch.Generator) -> None:
    w = _weights(rng, double)
    end = _bottleneck(w)
    assert isinstance(end, K.LazyPointwise if double.backend == "cpp" else K.LazyNorm)
    statistics = K.conv_stats(K.LazyNorm(w["x"], torch.ones(3, 2, 8).to(w["x"])), w["expand"])
    assert isinstance(statistics.x, Tensor)  # not wide
    assert (
        statistics.count == K.conv_stats(K.LazyNorm(statistics.x, _norm(statistics)), w["project"]).count == 3 * 6 * 5
    )


def test_a_normalised_shortcut_is_added_where_it_is_normalised(double: Placement, rng: torch.Generator) -> None:
    w = _weights(rng, double)
    shortcut = K.conv_stats(w["x"], w["shortcut"]).normalize(w["norm"])
    end = K.conv_stats(w["x"], w["shortcut"]).normalize(w["norm"], "relu", shortcut)
    assert isinstance(end, K.LazyNorm)
    assert isinstance(shortcut, K.LazyNorm)
    assert (end.residual, end.residual_norm) == (shortcut.x, w["norm"])
    activated = K.conv_stats(w["x"], w["shortcut"]).normalize(w["norm"], "relu", shortcut._replace(activation="relu"))
    assert isinstance(activated, K.LazyNorm)
    assert activated.residual_norm is None  # the op that adds a residual has no activation for it


class _Additions(TorchDispatchMode):
    """Counts the additions of feature maps by PyTorch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.count += args[0].dim() == 5
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("replicate", [1, 2])
def test_gradients_of_two_readers_are_added_by_the_op(replicate: int, backend: Placement, rng: torch.Generator) -> None:
    """The features at the end of a block are read by the next block's first convolution and by its shortcut."""
    if backend.backend == "reference":
        pytest.skip("plain PyTorch adds them")
    w = {name: t.detach().to(backend.dtype) for name, t in _weights(rng, backend).items()}
    first, second, entry = (w[name].clone().requires_grad_() for name in ("shortcut", "shortcut", "branching"))
    ends = [K.conv_stats(w["x"], weight) for weight in (first, second)]
    end = ends[0].normalize(_norm(ends[0]), "relu", ends[1].normalize(_norm(ends[1])))
    z, conv = K.entry_conv_stats(end, entry[: 2 * replicate], replicate=replicate)
    with _Additions() as additions:
        torch.autograd.grad([z.square().sum(), conv.mean.sum(), conv.var.sum()], [first, second, entry])
    assert additions.count == 0


def test_a_tensor_is_its_own_materialisation(double: Placement, rng: torch.Generator) -> None:
    x = _weights(rng, double)["x"]
    assert K.materialize(x) is x


class _Frames(TorchDispatchMode):
    """Counts the Python frames of hne_kernels around the calls of its ops."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "hne":
            frame, files = sys._getframe(1), []
            while frame is not None:
                files.append(frame.f_code.co_filename)
                if files[-1].endswith("_ops.py"):
                    files.clear()  # frames within PyTorch's dispatcher, as of the op's autograd kernel
                frame = frame.f_back  # type: ignore[assignment]
            self.counts[func.name()] = sum(Path(K.__file__).parent in Path(file).parents for file in files)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reader", READERS)
def test_a_call_has_two_frames(reader: str, rng: torch.Generator) -> None:
    w = _weights(rng, Placement("cpp", "cpu", torch.float64))
    with _Frames() as frames:
        READERS[reader](_bottleneck(w), w)
    assert len(frames.counts) >= 3
    assert max(frames.counts.values()) == 2, frames.counts

"""Overhead of an op call: the public function against the registered op that it calls.

The public function checks its arguments and chooses a backend. The inputs are tiny, so the time of the registered op is
mostly that of PyTorch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import roofline
import torch
from derived import CALL, DISPATCHER
from meters import Side
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workload import Workload

import hne_kernels as K


class _OpRecorder(TorchDispatchMode):
    """Records the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hne":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered_op(call: Side) -> Side:
    """Return a call of the one op that ``call`` calls, with the same arguments and results."""
    with _OpRecorder() as recorder:
        public = call()
    ((op, args, kwargs),) = recorder.calls
    if type(op(*args, **kwargs)) is type(public):
        return lambda: op(*args, **kwargs)
    return lambda: op(*args, **kwargs)[0]  # the public function returns the first result only


def _ones(*shape: int) -> Tensor:
    return torch.full(shape, 0.5)


def _branch_conv2d() -> Callable[[], Tensor]:
    x, weight = _ones(2, 1, 1, 1, 4), _ones(2, 4, 4, 1, 1)
    return lambda: K.branch_conv2d(x, weight)


def _fused_bottleneck() -> Callable[[], Tensor]:
    x, bias, depthwise = _ones(2, 1, 1, 1, 4), _ones(2, 4), _ones(2, 3, 3, 4)
    weight = K.pack_weight(_ones(2, 4, 4, 1, 1))
    return lambda: K.fused_bottleneck(x, weight, bias, depthwise, bias, weight, bias, identity=True)


def _hierarchical_distillation_loss() -> Callable[[], Tensor]:
    logits, target = _ones(2, 1, 4), torch.zeros(1, dtype=torch.long)
    return lambda: K.hierarchical_distillation_loss(logits, target)


def _prefix_logits() -> Callable[[], tuple[Tensor, Tensor]]:
    features, weight = _ones(2, 1, 4), _ones(2, 4, 4)
    return lambda: K.prefix_logits(features, weight)


def _prefix_mean() -> Callable[[], Tensor]:
    logits = _ones(2, 1, 4)
    return lambda: K.prefix_mean(logits)


CALLS = {
    "branch_conv2d": _branch_conv2d,
    "fused_bottleneck": _fused_bottleneck,
    "hierarchical_distillation_loss": _hierarchical_distillation_loss,
    "prefix_logits": _prefix_logits,
    "prefix_mean": _prefix_mean,
}


@pytest.mark.parametrize("op", CALLS)
def bench_call(op: str, versus: Any, workload: Workload) -> None:
    if workload.device != "cpu":
        pytest.skip("a call returns before the GPU has finished")
    call = CALLS[op]()
    with torch.no_grad():
        versus(
            lambda wrap: call,
            lambda wrap: call,
            beside={DISPATCHER: lambda: registered_op(call)},
            kind="call",
            name=CALL,
            shape=op,
            images=1,
            dtype=torch.float32,
            work=lambda: roofline.Work(0, 0),
        )

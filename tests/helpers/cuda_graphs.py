"""CUDA graphs emulated on the CPU: a capture records ops, and a replay calls them again on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import hne.executors.folded
import hne.inference.cuda_graphs
import hne.training.captured_step
import hne_kernels.ops.fused_layers
from hne_kernels import is_traced


class Graph:
    """Replaces ``torch.cuda.CUDAGraph``: the recorded ops, with their arguments and results."""

    captures = 0  # graphs captured since emulate() was called
    replays = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what ops write to, and a copy from before

    def replay(self) -> None:
        Graph.replays += 1
        with torch.no_grad():
            for function, args, kwargs, results in self.calls:
                again = tree_leaves(function(*args, **kwargs))
                for old, new in zip(_new_tensors(args, results), _new_tensors(args, again), strict=True):
                    old.copy_(new)

    def record(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call an op and record it."""
        if function in _WAITING:  # on a GPU the capture fails
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in _written_tensors(function, args, kwargs):
            self.written.setdefault(tensor.untyped_storage().data_ptr(), (_memory_of(tensor), tensor.data.clone()))
        results = function(*args, **kwargs)
        # A graph refers to memory. A parameter can get other memory later; its detached copy keeps referring to this.
        # Writes of a graph raise no versions, nor do those to a copy by `data`.
        args, kwargs, recorded = tree_map_only(torch.Tensor, _memory_of, (args, kwargs, results))
        self.calls.append((function, args, kwargs, recorded))
        return results

    def end_capture(self) -> None:
        """Undo what the recorded ops have computed: a GPU computes it only in the replay."""
        with torch.no_grad():
            for _, args, _, results in self.calls:
                for result in _new_tensors(args, results):
                    result.fill_(float("nan") if result.is_floating_point() else 0)
            for tensor, before in self.written.values():
                tensor.copy_(before)


_WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def _memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the same memory that has a version counter of its own."""
    return tensor.data


def _written_tensors(function: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an op changes in place."""
    parameters = function._schema.arguments
    given = {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
    written = [given[p.name] for p in parameters if p.alias_info and p.alias_info.is_write and p.name in given]
    if function is torch.ops.aten.native_batch_norm.default:  # its schema does not say so
        written += given["running_mean"], given["running_var"]
    return [tensor for tensor in tree_leaves(written) if isinstance(tensor, torch.Tensor)]


def _new_tensors(args: Any, results: Any) -> list[torch.Tensor]:
    """The results that do not share memory with an argument."""
    given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
    tensors = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
    return [t for t in tensors if t.untyped_storage().data_ptr() not in given]


class _Recorder(TorchDispatchMode):
    """Records the ops that are called into a graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.graph.record(func, args, kwargs or {})


class _Stream:
    """Replaces streams and events. Each of their methods does nothing, since ops on a CPU finish before they return."""

    def __init__(self, device: object = None) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def emulate(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Let :mod:`hne.inference.cuda_graphs` and :mod:`hne.training.captured_step` capture on the CPU.

    Returns the graph class, which counts ``captures`` and ``replays``. As on a GPU, a capture computes nothing and
    draws no random numbers, an op that waits for results ends it with an error, and a replay raises no versions of
    tensors.
    """
    capturing = [False]

    @contextlib.contextmanager
    def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        Graph.captures += 1
        capturing[0] = True
        random = torch.get_rng_state()
        try:
            with _Recorder(graph):
                yield
        finally:
            capturing[0] = False
            torch.set_rng_state(random)
            graph.end_capture()

    Graph.captures = Graph.replays = 0
    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "Event": _Stream,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(hne.inference.cuda_graphs, "_check_device", lambda device: None)
    monkeypatch.setattr(hne.training.captured_step, "_is_gpu", lambda device: True)
    monkeypatch.setattr(hne.executors.folded, "is_capturing", lambda: capturing[0])
    # The recorder is a dispatch mode, which a real capture is not.
    for module in (hne_kernels, hne_kernels.dispatch, hne_kernels.ops.fused_layers):
        monkeypatch.setattr(module, "is_traced", lambda: not capturing[0] and is_traced())
    return Graph

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
import hne_kernels.ops.fused_layers
from hne_kernels import is_traced


class Graph:
    """Replaces ``torch.cuda.CUDAGraph``: the recorded ops, with their arguments and results."""

    captures = 0  # graphs captured since emulate() was called

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(_new_tensors(args, results), _new_tensors(args, again), strict=True):
                old.copy_(new)

    def clear_results(self) -> None:
        """Overwrite the results of the capture: a GPU computes them only in the replay."""
        for _, args, _, results in self.calls:
            for result in _new_tensors(args, results):
                result.fill_(float("nan") if result.is_floating_point() else 0)


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
        results = func(*args, **(kwargs or {}))
        # A graph refers to memory. A parameter can get other memory later; its detached copy keeps referring to this.
        args, recorded = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, results))
        self.graph.calls.append((func, args, kwargs or {}, recorded))
        return results


class _Stream:
    """Replaces streams and events. Each of their methods does nothing, since ops on a CPU finish before they return."""

    def __init__(self, device: object = None) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def emulate(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Let :mod:`hne.inference.cuda_graphs` capture on the CPU. Returns the graph class, which counts ``captures``."""
    capturing = [False]

    @contextlib.contextmanager
    def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        Graph.captures += 1
        capturing[0] = True
        with _Recorder(graph):
            yield
        capturing[0] = False
        graph.clear_results()

    Graph.captures = 0
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
    monkeypatch.setattr(hne.executors.folded, "is_capturing", lambda: capturing[0])
    # The recorder is a dispatch mode, which a real capture is not.
    for module in (hne_kernels, hne_kernels.ops.fused_layers):
        monkeypatch.setattr(module, "is_traced", lambda: not capturing[0] and is_traced())
    return Graph

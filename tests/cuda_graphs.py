"""CUDA graphs emulated on the CPU: what is captured runs again on the same memory, and on nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hne.graphs
import hne.inference


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``: the ops that were called, with the tensors that they were called with."""

    captures = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # not a view, nor in place
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, results))
        return results


class _Stream:
    """Stands for streams and events: everything waits for everything on a CPU."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def emulate(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Let :mod:`hne.graphs` capture on the CPU; ``captures`` of what is returned counts."""
    capturing = [False]

    @contextlib.contextmanager
    def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        Graph.captures += 1
        capturing[0] = True
        with _Recorder(graph):
            yield
        capturing[0] = False
        for *_, results in graph.calls:  # nothing is computed before the replay
            for result in tree_leaves(results):
                if isinstance(result, torch.Tensor) and result.is_floating_point() and not result._is_view():
                    result.fill_(float("nan"))

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
    monkeypatch.setattr(hne.graphs, "_check_device", lambda device: None)
    monkeypatch.setattr(hne.inference, "is_capturing", lambda: capturing[0])
    return Graph

"""CUDA graphs emulated on the CPU: what is captured runs again on the same memory, and on nothing else."""

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


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``: the ops that were called, with the tensors that they were called with."""

    captures = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(_made(args, results), _made(args, again), strict=True):
                old.copy_(new)

    def forget_results(self) -> None:
        """Nothing is computed before the replay."""
        for _, args, _, results in self.calls:
            for result in _made(args, results):
                result.fill_(float("nan") if result.is_floating_point() else 0)


def _made(args: Any, results: Any) -> list[torch.Tensor]:
    """Results in memory of their own: neither views of an argument nor arguments that were written to."""
    given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
    made = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
    return [t for t in made if t.untyped_storage().data_ptr() not in given]


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        # The memory is what a graph goes by: parameters may be given another.
        args, kept = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, results))
        self.graph.calls.append((func, args, kwargs or {}, kept))
        return results


class _Stream:
    """Stands for streams and events: everything waits for everything on a CPU."""

    def __init__(self, device: object = None) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def emulate(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Let :mod:`hne.inference.cuda_graphs` capture on the CPU; ``captures`` of what is returned counts."""
    capturing = [False]

    @contextlib.contextmanager
    def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        Graph.captures += 1
        capturing[0] = True
        with _Recorder(graph):
            yield
        capturing[0] = False
        graph.forget_results()

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
    return Graph

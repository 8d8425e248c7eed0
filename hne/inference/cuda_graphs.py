"""Inference by replaying CUDA graphs: all launches of a network for the price of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hne_kernels import checks, dispatch

from ..executors.parameter_versions import Snapshot
from ..layers.modules import Foldable
from ..models.hne import HNE

Function = Callable[[Tensor], Tensor]

_WARM_UPS = 3  # calls before a capture: libraries are loaded, kernels tuned, weights folded


class GraphedHNE:
    """A model in ``eval()`` on a GPU, replayed from CUDA graphs.

    There is one graph for each number of models (or list of sizes), shape and dtype of images, and setting that decides
    which kernels run: backend, autocast, TF32, deterministic algorithms. It is captured when it is first needed, which
    takes as long as a few ordinary calls and, with Triton, the tuning of the kernels. The graphs share their memory.

    Any thread and stream may call; the GPU works on one call at a time. Parameters that have changed are noticed, as
    far as :func:`hne.inference.folded` notices, and all graphs captured anew. Gradients are never recorded.

    Args:
        model: On a GPU, and made outside of ``torch.inference_mode()`` (in which no change can be noticed).

    Raises:
        TypeError: ``model`` is not an :class:`HNE`.
        ValueError: It is not on a GPU.
        RuntimeError: Its parameters do not tell when they change; or, from a call, it is in training mode.
    """

    def __init__(self, model: HNE) -> None:
        if not isinstance(model, HNE):
            raise TypeError(f"model must be an HNE, got {type(model).__name__}")
        self.model = model
        self._foldable = [module for module in model.modules() if isinstance(module, Foldable)]
        self._lock = threading.Lock()
        self._graphs: dict[Hashable, _Graph] = {}
        self._start_over()

    def __call__(self, x: Tensor, num_models: int | None = None) -> Tensor:
        """Logits as from :meth:`HNE.forward`, with its arguments and errors, in memory of their own."""
        n = self.model.num_models if num_models is None else num_models
        return self._run(lambda images: self.model(images, n), x, n)

    def prefix_logits(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Logits as from :meth:`HNE.prefix_logits`, with its arguments and errors, in memory of their own."""
        wanted = self.model.prefix_sizes if sizes is None else tuple(sizes)
        return self._run(lambda images: self.model.prefix_logits(images, wanted), x, wanted)

    def _run(self, function: Function, x: Tensor, what: Hashable) -> Tensor:
        if self.model.training:
            raise RuntimeError("GraphedHNE is for inference: call model.eval() first")
        # Buffers made in inference mode could not be written to outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            key = what, x.shape, x.dtype, x.device, _setting(x)
            graph = self._graphs.get(key)
            # Replayed first: while the GPU is at it, there is time to look at the parameters.
            y = None if graph is None else graph(x)
            if not self._is_current():
                self._start_over()
                y = None
            if y is None:
                graph = self._graphs[key] = self._capture(function, x)
                y = graph(x)
            return y

    def _is_current(self) -> bool:
        return self._parameters.is_current() and all(
            module.folded is weights for graph in self._graphs.values() for module, weights in graph.weights
        )

    def _start_over(self) -> None:
        """Forget the graphs: the parameters are not those that they were captured with."""
        device = next(self.model.parameters()).device
        _check_device(device)
        parameters = Snapshot(self.model.modules())
        if not parameters.is_current():
            raise RuntimeError(
                "model was made under torch.inference_mode(), where changed parameters cannot be noticed: "
                "make it outside of it"
            )
        torch.cuda.synchronize(device)  # what is still being replayed has its memory until it is done
        self._graphs.clear()
        self._parameters, self._memory = parameters, _Memory()

    def _capture(self, function: Function, x: Tensor) -> _Graph:
        self.model._check_images(x)
        graph = _Graph(function, x, self._memory)
        # From here on the weights are kept by the graph that reads them, and no longer than it.
        graph.weights = [(module, module.captured.pop()) for module in self._foldable if module.captured]
        return graph


class _Memory:
    """The memory in which graphs compute, one of them at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.free = torch.cuda.Event()  # after the last replay


class _Graph:
    """A function of images as a CUDA graph, for the shape and dtype of ``x``."""

    def __init__(self, function: Function, x: Tensor, memory: _Memory) -> None:
        self.weights: list[tuple[Foldable, Any]] = []
        self._memory = memory
        with torch.cuda.device(x.device):
            self._images = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    function(self._images)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may allocate memory meanwhile: that concerns only the devices that they work on.
            with torch.cuda.graph(self._graph, memory.pool, stream, capture_error_mode="thread_local"):
                self._logits = function(self._images)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.cuda.device(self._images.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._memory.free)
            self._images.copy_(x)
            self._graph.replay()
            y = self._logits.clone()
            self._memory.free.record(stream)
        return y


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"model must be on a GPU to be captured in CUDA graphs, got {device}")


def _setting(x: Tensor) -> Hashable:
    """What decides, besides the arguments, which kernels a call runs."""
    return (
        dispatch.select(x),
        checks.autocast_dtype(x.device.type),
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )

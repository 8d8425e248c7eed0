"""Inference by CUDA graphs: one launch replays all kernels of a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from hne_kernels import autocast_dtype, backend_for

from ..executors import InferenceSession, ParameterVersions
from ..models import HNE

Function = Callable[[Tensor], Tensor]

_WARM_UPS = 3  # calls before a capture: libraries are loaded, kernels tuned, weights folded


class GraphedHNE:
    """A model in ``eval()`` on a GPU, replayed from CUDA graphs.

    There is one graph for each number of models (or list of sizes), shape and dtype of images, and setting that decides
    which kernels run: backend, autocast, TF32, deterministic algorithms. The first call of a kind captures its graph,
    which takes as long as a few ordinary calls and, with Triton, the tuning of the kernels. The graphs share memory.

    Any thread and stream may call; the GPU works on one call at a time. Changed parameters are noticed as by
    :meth:`hne.executors.InferenceSession.is_current`, and all graphs are captured again. Gradients are never recorded.

    Args:
        model: On a GPU, made outside of ``torch.inference_mode()``, where changes cannot be noticed.

    Raises:
        TypeError: ``model`` is not an :class:`HNE`.
        ValueError: It is not on a GPU.
        RuntimeError: Its parameters have no version counter; or, from a call, it is in training mode.
    """

    def __init__(self, model: HNE) -> None:
        if not isinstance(model, HNE):
            raise TypeError(f"model must be an HNE, got {type(model).__name__}")
        self.model = model
        self._lock = threading.Lock()
        self._graphs: dict[Hashable, _Graph] = {}
        self._reset()

    def __call__(self, x: Tensor, num_models: int | None = None) -> Tensor:
        """Logits as from :meth:`HNE.forward`, with its arguments and errors, in new memory."""
        n = self.model.num_models if num_models is None else num_models
        return self._replay(lambda images: self.model(images, n), x, n)

    def prefix_logits(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Logits as from :meth:`HNE.prefix_logits`, with its arguments and errors, in new memory."""
        wanted = self.model.prefix_sizes if sizes is None else tuple(sizes)
        return self._replay(lambda images: self.model.prefix_logits(images, wanted), x, wanted)

    def _replay(self, function: Function, x: Tensor, arguments: Hashable) -> Tensor:
        if self.model.training:
            raise RuntimeError("GraphedHNE is for inference: call model.eval() first")
        # Buffers made in inference mode could not be written to outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            key = arguments, x.shape, x.dtype, x.device, _setting(x)
            graph = self._graphs.get(key)
            # The replay comes first, so that the check of the parameters overlaps with it.
            y = None if graph is None else graph(x)
            if not self._is_current():
                self._reset()
                y = None
            if y is None:
                graph = self._graphs[key] = self._capture(function, x)
                y = graph(x)
            return y

    def _is_current(self) -> bool:
        sessions = (graph.session for graph in self._graphs.values() if graph.session is not None)
        return self._versions.is_current() and all(self.model.folded is session for session in sessions)

    def _reset(self) -> None:
        """Drop all graphs, since the parameters have changed."""
        device = next(self.model.parameters()).device
        _check_device(device)
        versions = ParameterVersions(self.model.modules())
        if not versions.is_current():
            raise RuntimeError(
                "model was made under torch.inference_mode(), where changed parameters cannot be noticed: "
                "make it outside of it"
            )
        torch.cuda.synchronize(device)  # graphs that are being replayed still use their memory
        self._graphs.clear()
        self._versions, self._memory = versions, _Memory()

    def _capture(self, function: Function, x: Tensor) -> _Graph:
        self.model.check_images(x)
        graph = _Graph(function, x, self._memory)
        if self.model.graph_weights:  # from now on the graph alone keeps the weights alive
            graph.session = self.model.graph_weights.pop()
        return graph


class _Memory:
    """Memory shared by graphs, which are replayed one at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.free = torch.cuda.Event()  # after the last replay


class _Graph:
    """A function of images as a CUDA graph, for the shape and dtype of ``x``."""

    def __init__(self, function: Function, x: Tensor, memory: _Memory) -> None:
        self.session: InferenceSession | None = None  # its weights are read in every replay
        self._memory = memory
        with torch.cuda.device(x.device):
            self._images = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    function(self._images)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may allocate memory during the capture.
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
    """The settings that decide which kernels a call runs."""
    return (
        backend_for(x),
        autocast_dtype(x.device.type),
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )

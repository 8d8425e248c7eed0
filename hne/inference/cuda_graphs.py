"""Inference by CUDA graphs: one launch runs all kernels of a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hne_kernels import autocast_dtype, backend_for

from ..executors import HookVersions, InferenceSession, ParameterVersions
from ..layers import only_recomputes_parameters
from ..models import HNE

Function = Callable[[Tensor, Any], Tensor]

_WARM_UPS = 3  # calls before a capture, to load libraries, tune kernels and fold weights


class GraphedHNE:
    """Inference of a model on a GPU by CUDA graphs.

    There is one graph for each number of models (or list of sizes), shape and dtype of images, and setting that decides
    which kernels run (backend, autocast, TF32, deterministic algorithms). The first call of a kind captures its graph.
    This takes as long as a few ordinary calls and, with Triton, the tuning of the kernels. The graphs share memory.

    Any thread or stream may call; the GPU works on one call at a time. If the model changes, all graphs are captured
    again; :meth:`hne.executors.ParameterVersions.is_current` says which changes are noticed. Within
    :meth:`HNE.frozen_parameters` none are looked for. Gradients are never recorded.

    Args:
        model: A model on a GPU, in eval mode. It must be made outside of ``torch.inference_mode()``, because changes of
            its parameters could not be noticed otherwise.

    Raises:
        TypeError: ``model`` is not an :class:`HNE`.
        ValueError: The model is not on a GPU.
        RuntimeError: The parameters have no version counter; there are hooks, which a graph would not run; or, in a
            call, the model is in training mode.
    """

    def __init__(self, model: HNE) -> None:
        if not isinstance(model, HNE):
            raise TypeError(f"model must be an HNE, got {type(model).__name__}")
        self.model = model
        self._lock = threading.Lock()
        self._graphs: dict[Hashable, _Graph] = {}
        self._reset()

    def __call__(self, x: Tensor, num_models: int | None = None) -> Tensor:
        """The logits of :meth:`HNE.forward` in new memory; same arguments and errors."""
        return self._replay(self.model, x, self.model.num_models if num_models is None else num_models)

    def prefix_logits(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """The logits of :meth:`HNE.prefix_logits` in new memory; same arguments and errors."""
        return self._replay(self.model.prefix_logits, x, self.model.prefix_sizes if sizes is None else tuple(sizes))

    def _replay(self, function: Function, x: Tensor, argument: Hashable) -> Tensor:
        if self.model.training:
            raise RuntimeError("GraphedHNE is for inference: call model.eval() first")
        with self._lock:
            key = argument, x.shape, x.dtype, x.device, kernel_settings(x)
            graph = self._graphs.get(key)
            # The GPU works on the replay while the parameters are checked for changes.
            y = None if graph is None else graph(x)
            if not self._is_current():
                self._reset()
                y = None
            if y is None:
                graph = self._capture(function, x, argument)
                self._graphs[key] = graph
                y = graph(x)
            return y

    def _is_current(self) -> bool:
        """Whether the graphs are still right: the parameters are read once, or not at all while they are frozen."""
        if not self._hooks.is_current():
            return False
        session = self._session
        if session is not None and session.holds_all_weights:
            return self.model.current() is session
        return self._versions.is_current() and (session is None or self.model.folded is session)

    def _reset(self) -> None:
        """Drop all graphs, since the parameters have changed."""
        hooks = HookVersions(m for m in self.model.modules() if not only_recomputes_parameters(m))
        if hooks.has_hooks:
            raise RuntimeError(
                "GraphedHNE replays kernels and would not run hooks: remove the hooks of the model, its layers and of "
                "all modules, or call the model itself"
            )
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
        self._versions, self._hooks, self._memory = versions, hooks, _Memory()
        self._session: InferenceSession | None = None

    def _capture(self, function: Function, x: Tensor, argument: Hashable) -> _Graph:
        self.model.check_images(x)
        # A graph's buffers that were made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            graph = _Graph(lambda images: function(images, argument), x, self._memory)
        self._versions.accept_attributes()  # the calls of the capture may have set some
        if self.model.graph_weights:  # from now on only the graph keeps the weights alive
            graph.session = self.model.graph_weights.pop()
            if self._session is not None and self._session is not graph.session:
                self._reset()  # another thread has changed the parameters since the other graphs were captured
            self._session = graph.session
        return graph


class _Memory:
    """Memory that all graphs share, since only one is replayed at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.free = torch.cuda.Event()  # recorded after each replay, on the stream of the call


class _Graph:
    """A CUDA graph of a function of images, for the shape and dtype of ``x``."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, memory: _Memory) -> None:
        self.session: InferenceSession | None = None  # every replay reads its weights
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
        # The ops below run on the device of their tensors and its current stream, whichever device is current.
        free, stream = self._memory.free, torch.cuda.current_stream(self._images.device)
        free.wait(stream)
        self._images.copy_(x.detach() if x.requires_grad else x)
        self._graph.replay()
        y = self._logits.clone()
        free.record(stream)
        return y


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"model must be on a GPU to be captured in CUDA graphs, got {device}")


def kernel_settings(x: Tensor) -> Hashable:
    """The settings that decide which kernels a call with the tensor ``x`` runs."""
    return (
        backend_for(x),
        autocast_dtype(x.device.type),
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )

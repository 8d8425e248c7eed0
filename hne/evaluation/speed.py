"""One network on this package, on PyTorch, and on other engines: calls that compute the same, to be timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..executors import CopyFreeNetwork
from ..inference import ENGINES, EnsembleMean, freezing, load_engine, missing, write_onnx
from ..losses import objective
from ..models import HNE, FusedHNE

FUSED, EAGER, COMPILED = "fused", "eager", "compile"
SIDES = {FUSED: "this package", EAGER: "eager PyTorch", COMPILED: "torch.compile", **ENGINES}  # titles
Call = Callable[[], Any]


class InferenceSides:
    """Calls that compute the mean logits of the first ``num_models`` members, ``[B, L]``.

    - ``fused``: the model, within ``frozen_parameters()``, as the others hold constants, too.
    - ``eager``: the same in plain PyTorch, layer by layer (:class:`NaiveHNE`).
    - ``compile``: ``torch.compile`` of the network that is exported, in channels-last memory; on a CPU with
      ``freezing``, which packs the weights.
    - each of :data:`hne.inference.ENGINES`: the exported graph (:func:`hne.inference.load_engine`); on a CPU only.

    Args:
        model: The model, in eval mode.
        images: ``[B, C, H, W]``, at least one, on the model's device.
        num_models: Number of members.
        folder: An empty folder for the exported graphs.
    """

    def __init__(self, model: FusedHNE, images: Tensor, num_models: int, folder: Path) -> None:
        self._model, self._images, self._n, self._folder = model, images, num_models, folder

    def unavailable(self, name: str) -> str | None:
        """Why a side cannot be measured here; None if it can."""
        if name not in ENGINES:
            return None
        return missing(name) if self._images.device.type == "cpu" else "measured on a CPU only"

    def make(self, name: str) -> Call:
        """The call of a side; ``compile`` compiles in the first call."""
        if name == FUSED:
            return self._without_gradients(EnsembleMean(self._model, self._n).eval(), self._images)
        if name == EAGER:
            return self._without_gradients(EnsembleMean(self._model.to_naive(), self._n).eval(), self._images)
        if name == COMPILED:
            return self._compiled()
        images = self._images.contiguous()
        return load_engine(name, self._graphs(), images, spin=False)

    def _without_gradients(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Call:
        @torch.inference_mode()
        def call() -> Tensor:
            return function(images)

        return call

    def _compiled(self) -> Call:
        last = self._images.contiguous(memory_format=torch.channels_last)
        network = CopyFreeNetwork(self._model, slice(0, self._n), last[:1]).eval()
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compiled = torch.compile(network, dynamic=False)

        def call() -> Tensor:
            with torch.no_grad(), freezing(last.device.type == "cpu"):
                result: Tensor = compiled(last)
                return result

        return call

    def _graphs(self) -> list[Path]:
        graphs = [self._folder / "grouped.onnx", self._folder / "separate.onnx"]
        ensemble = EnsembleMean(self._model, self._n).eval()
        for graph, separate in zip(graphs, (False, True), strict=True):
            if not graph.exists():
                with torch.no_grad():
                    example = self._images[:1].expand(2, -1, -1, -1).contiguous()
                    write_onnx(ensemble, example, graph, separate)
        return graphs


class TrainingSides:
    """Calls that compute a training step: forward, loss and backward. They return the loss.

    Args:
        model: The model, in training mode.
        images: ``[B, C, H, W]`` on the model's device.
        num_models: Number of members.
    """

    def __init__(self, model: FusedHNE, images: Tensor, num_models: int) -> None:
        self._model, self._images, self._n = model, images, num_models

    def unavailable(self, name: str) -> str | None:
        """Why a side cannot be measured here; None if it can."""
        return "does not train" if name in ENGINES else None

    def make(self, name: str) -> Call:
        """The step of a side; that of ``compile`` compiles in its first call."""
        model: HNE = self._model if name == FUSED else self._model.to_naive()
        forward = torch.compile(model, dynamic=False) if name == COMPILED else model
        loss_of, images, n = objective("I+HD"), self._images, self._n
        target = torch.arange(len(images), device=images.device) % model.num_classes

        def step() -> Tensor:
            model.zero_grad()
            loss = loss_of(forward(images, n), target)
            loss.backward()
            return loss.detach()

        return step

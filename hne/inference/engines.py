"""Engines that run an exported graph on a CPU. Each compiles it for one batch size, and reads images without a copy.

:mod:`hne.runtime` has their settings.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..runtime import onnxruntime_session, openvino_model

Call = Callable[[], Tensor]


def _onnxruntime(graph: Path, images: Tensor, spin: bool) -> Call:
    session = onnxruntime_session(graph, batch=len(images), spin=spin)
    inputs = {"images": images.numpy()}

    def call() -> Tensor:
        (logits,) = session.run(None, inputs)
        return torch.from_numpy(logits)

    return call


def _openvino(graph: Path, images: Tensor, spin: bool) -> Call:
    import openvino as ov

    precision = "bf16" if images.dtype == torch.bfloat16 else "f32"
    request = openvino_model(graph, images.shape, precision=precision).create_infer_request()
    images = images.float()  # as the graph takes them
    request.set_input_tensor(ov.Tensor(images.numpy(), shared_memory=True))
    logits = torch.from_numpy(request.get_output_tensor().data)

    def call(_: Tensor = images) -> Tensor:  # keeps the images alive, which the request does not
        request.infer()
        return logits

    return call


_MAKERS: dict[str, Callable[[Path, Tensor, bool], Call]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}  # titles by the names of their packages


def load_engine(name: str, graphs: Iterable[Path], images: Tensor, *, spin: bool = True) -> Call:
    """A call of an engine, from images to logits.

    Args:
        name: A name of :data:`ENGINES`; its package is installed.
        graphs: Files of :func:`write_onnx` with the same network. The engine takes the one that it runs fastest.
        images: float32 ``[B, C, H, W]``, contiguous. A call reads them anew; they may be written between calls. With
            bfloat16, OpenVINO computes in it, on a copy; ONNX Runtime has no convolution for it.
        spin: Whether threads may go on spinning after a call, for the next one. That takes time from others who compute
            in the meantime: ONNX Runtime spins for 30 ms. (OpenVINO spins for 1 ms in any case.)

    Returns:
        A function without arguments that returns logits ``[B, L]``, which its next call may overwrite.
    """
    return fastest([_MAKERS[name](graph, images, spin) for graph in graphs])


def fastest(calls: list[Call], seconds: float = 0.2) -> Call:
    """The fastest of some calls that compute the same, by medians of alternating turns."""
    if len(calls) == 1:
        return calls[0]
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds * len(calls)
    while len(times[-1]) < 3 or time.perf_counter() < end:
        for index, call in enumerate(calls):
            call()  # in the cache, and with its threads awake
            start = time.perf_counter()
            call()
            times[index].append(time.perf_counter() - start)
    return calls[min(range(len(calls)), key=lambda index: median(times[index]))]


def missing(name: str) -> str | None:
    """Say which packages an engine lacks, and how to install them; None if nothing is missing."""
    packages = [package for package in (name, "onnx", "onnxscript") if find_spec(package) is None]
    if not packages:
        return None
    are = "is" if len(packages) == 1 else "are"
    return f"{' and '.join(packages)} {are} not installed: pip install {' '.join(packages)}"


def freezing(wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Context in which ``torch.compile`` treats parameters as constants, if it compiles without gradients.

    It then folds batch norms and packs weights. The option of the same name of ``torch.compile`` takes effect too late:
    the tracer has already turned parameters into inputs, and nothing is folded.
    """
    if not wanted:
        return contextlib.nullcontext()
    import torch._inductor.config

    patch: contextlib.AbstractContextManager[Any] = torch._inductor.config.patch(freezing=True)
    return patch

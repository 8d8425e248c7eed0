"""Inference engines to compare with: two that run the exported ONNX graph, and PyTorch's own compiler.

Settings favour the peers: fixed batch sizes, as many threads as PyTorch has, and no copies of the images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from meters import Side
from torch import Tensor


def onnxruntime(graph: Path, images: Tensor) -> Side:
    """ONNX Runtime: from images to logits."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Threads spin during a call, as by default, but not for 30 ms after it: that would slow down the next side.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", len(images))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy()}

    def side() -> Tensor:
        (logits,) = session.run(None, inputs)
        return torch.from_numpy(logits)

    return side


def openvino(graph: Path, images: Tensor) -> Side:
    """OpenVINO: from images to logits. Each call overwrites the logits of the previous one."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(graph)
    model.reshape(list(images.shape))
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # on processors with bfloat16 it would use that
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(images.numpy(), shared_memory=True))
    logits = torch.from_numpy(request.get_output_tensor().data)

    def side() -> Tensor:
        request.infer()
        return logits

    return side


PEERS: dict[str, Callable[[Path, Tensor], Side]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def missing(name: str) -> str | None:
    """Say which packages a peer needs that are not installed; None if nothing is missing."""
    packages = [package for package in (name, "onnx", "onnxscript") if find_spec(package) is None]
    if not packages:
        return None
    return f"{' and '.join(packages)} {'is' if len(packages) == 1 else 'are'} not installed: pip install -e '.[peers]'"


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

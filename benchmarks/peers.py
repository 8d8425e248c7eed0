"""Inference engines: two on the graph that ``hne export --format onnx`` writes, and PyTorch's own compiler.

They get what favours them: batches of one size, as many threads as PyTorch has, and images that are not copied.
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
    # Its threads spin within a call, as they do by default, but not for 30 ms after it: that is another side's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", len(images))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy()}

    def side() -> Tensor:
        (logits,) = session.run(None, inputs)
        return torch.from_numpy(logits)

    return side


def openvino(graph: Path, images: Tensor) -> Side:
    """OpenVINO: from images to logits, which the next call overwrites."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(graph)
    model.reshape(list(images.shape))
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bfloat16, it would compute in that
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
    """What to install for a peer, or None if it is there: itself, and what writes the graph."""
    packages = [package for package in (name, "onnx", "onnxscript") if find_spec(package) is None]
    if not packages:
        return None
    return f"{' and '.join(packages)} {'is' if len(packages) == 1 else 'are'} not installed: pip install -e '.[peers]'"


def freezing(wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Within it, what ``torch.compile`` compiles without gradients has its parameters for constants: batch norms are
    folded, weights packed.

    As an option of ``torch.compile`` it comes too late: the tracer has made the parameters inputs, and nothing is
    folded.
    """
    if not wanted:
        return contextlib.nullcontext()
    import torch._inductor.config

    patch: contextlib.AbstractContextManager[Any] = torch._inductor.config.patch(freezing=True)
    return patch

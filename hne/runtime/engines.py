"""Engines that run the programs of steps: functions from one tensor to several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Program = Callable[[Tensor], Sequence[Tensor]]


def _torch(folder: Path, name: str, programs: str) -> Program:
    if programs == "aoti":
        from torch._inductor.package import load_package

        return load_package(str(folder / "steps.pt2"), name)
    module = torch.export.load(folder / f"{name}.pt2").module()
    return torch.inference_mode()(module)


def onnxruntime_session(graph: Path, *, batch: int | None = None, spin: bool = True) -> Any:
    """The session of ONNX Runtime for a graph on the CPU, with all optimisations and as many threads as PyTorch.

    Args:
        graph: A file.
        batch: Size of the dimension "batch", if that is known; the session then takes no other.
        spin: Whether its threads spin while they wait for work, for 30 ms after a call.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def openvino_model(graph: Path, shape: Sequence[int] | None = None, *, precision: str = "f32") -> Any:
    """The model that OpenVINO compiles of a graph for the CPU, with as many threads as PyTorch.

    The hint ``LATENCY`` gives all threads to one call. Threads are not bound to cores, where they would wait for other
    processes.

    Args:
        graph: A file.
        shape: Of its only input, if that is known.
        precision: In which it computes, "f32" or "bf16". (Its own default on processors with bfloat16 is bfloat16.)
    """
    import openvino as ov

    core = ov.Core()
    model = core.read_model(graph)
    if shape is not None:
        model.reshape(list(shape))
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    return core.compile_model(model, "CPU", options)


def _onnxruntime(folder: Path, name: str, programs: str) -> Program:
    session = onnxruntime_session(folder / f"{name}.onnx")
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"x": x.contiguous().numpy()})]


def _openvino(folder: Path, name: str, programs: str) -> Program:
    compiled = openvino_model(folder / f"{name}.onnx")

    def program(x: Tensor) -> list[Tensor]:
        results = compiled([x.contiguous().numpy()])
        return [torch.from_numpy(results[output].copy()) for output in compiled.outputs]

    return program


_LOADERS: dict[str, Callable[[Path, str, str], Program]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
ENGINES = {"torch": ("pt2", "aoti"), "onnxruntime": ("onnx",), "openvino": ("onnx",)}  # formats by engine


def choose_engine(programs: str) -> str:
    """The first installed engine for a format of programs."""
    fitting = [name for name, formats in ENGINES.items() if programs in formats]
    return next((name for name in fitting if find_spec(name) is not None), fitting[0])


def load_programs(engine: str, folder: Path, names: Sequence[str], programs: str) -> list[Program]:
    """The programs of a folder.

    Raises:
        ValueError: The engine is unknown, or does not run this format.
        ModuleNotFoundError: The engine is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if programs not in ENGINES[engine]:
        fitting = [name for name, formats in ENGINES.items() if programs in formats]
        raise ValueError(f"engine: {folder} has {programs} programs, for {' or '.join(fitting)}, got {engine!r}")
    if find_spec(engine) is None:
        raise ModuleNotFoundError(f"{engine} is not installed: pip install {engine}", name=engine)
    return [_LOADERS[engine](folder, name, programs) for name in names]

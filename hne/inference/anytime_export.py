"""Export of anytime inference: a program for each step of the tree, for :class:`hne.runtime.AnytimeSession`."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..executors import CopyFreeNetwork
from ..files import replacing, write_json
from ..hierarchy import Hierarchy
from ..models import HNE
from ..runtime import FORMAT, MANIFEST, VERSION
from .export import any_batch, save_onnx, save_program


class _Step(nn.Module):
    """The network of a leaf, with the logits of that leaf alone."""

    def __init__(self, network: CopyFreeNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results = self.network(x)
        *features, logits = results if isinstance(results, tuple) else (results,)
        return (*features, logits[0])


def needed_later(tree: Hierarchy, leaf: int) -> list[int]:
    """The blocks whose features, as ``leaf`` computes them, a later leaf starts from."""
    blocks, needed = len(tree.branches), set()
    valid = set(range(tree.first_new(leaf), blocks))  # not yet computed anew
    for later in range(leaf + 1, tree.num_models):
        first = tree.first_new(later)
        needed |= valid & {first - 1}
        valid -= set(range(first, blocks))
    return sorted(needed)


@torch.no_grad()
def write_anytime(
    model: HNE,
    folder: str | Path,
    images: Tensor,
    *,
    format: str = "onnx",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a program for each step of anytime inference, and a manifest that says how they fit together.

    The program of a step computes what a leaf adds: from images, or from the features of a block that an earlier step
    has kept, to the leaf's logits and the features that later steps start from. It needs nothing of this package.

    Args:
        model: The model in eval mode, a classifier.
        folder: Made if it does not exist. An earlier manifest is removed first, and the new one is written last.
        images: Example images ``[B, C, H, W]``; B is at least 2. The programs take any batch.
        format: ``onnx``; ``pt2``, programs of ``torch.export``; or ``aoti``, one package that is compiled ahead of time
            (AOTInductor), for this kind of processor. The latter needs a C++ compiler.
        metadata: What the manifest says besides, as JSON-able values; by default ``model.metadata``.

    Raises:
        ValueError: The format is unknown.
        FileError: A file cannot be written.
        RuntimeError: ``onnx`` or ``onnxscript`` is not installed, for that format.
    """
    if format not in _WRITERS:
        raise ValueError(f"format: expected one of {', '.join(_WRITERS)}, got {format!r}")
    folder, tree = Path(folder), model.hierarchy
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    naive = model.to_naive().eval()
    programs, steps = {}, []
    path = {0: images}  # the inputs of the blocks, on the way to the latest leaf
    for leaf in range(tree.num_models):
        first, keep = tree.first_new(leaf), needed_later(tree, leaf)
        network = CopyFreeNetwork(naive, slice(leaf, leaf + 1), path[first], first=first, keep=keep, mean=False)
        step = _Step(network).eval()
        path |= dict(zip((block + 1 for block in keep), step(path[first])[:-1], strict=True))
        name = f"step-{leaf + 1:0{len(str(tree.num_models))}}"
        programs[name] = torch.export.export(step, (path[first].contiguous(),), dynamic_shapes=any_batch())
        steps.append({"program": name, "reads": first, "keeps": [block + 1 for block in keep]})
    files = _WRITERS[format](folder, programs)
    size = (images.shape[2], images.shape[3])
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "programs": format,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "num_models": tree.num_models,
        "num_classes": model.num_classes,
        "image": list(images.shape[1:]),
        "macs": [model.macs(n, size) for n in range(1, tree.num_models + 1)],
        "steps": steps,
        "metadata": dict(model.metadata if metadata is None else metadata),
    }
    write_json(folder / MANIFEST, manifest)


Programs = Mapping[str, torch.export.ExportedProgram]


def _write_onnx(folder: Path, programs: Programs) -> list[Path]:
    paths = []
    for name, program in programs.items():
        paths.append(folder / f"{name}.onnx")
        with replacing(paths[-1]) as temporary:
            outputs = [f"y{index}" for index, _ in enumerate(program.graph_signature.user_outputs)]
            save_onnx(program, program.example_inputs[0][0], temporary, ["x"], outputs)
    return paths


def _write_pt2(folder: Path, programs: Programs) -> list[Path]:
    paths = []
    for name, program in programs.items():
        paths.append(folder / f"{name}.pt2")
        with replacing(paths[-1]) as temporary:
            save_program(program, temporary)
    return paths


def _write_aoti(folder: Path, programs: Programs) -> list[Path]:
    from torch._inductor import aot_compile
    from torch._inductor.package import package_aoti

    compiled: dict[str, Any] = {}
    for name, program in programs.items():
        args, kwargs = program.example_inputs
        compiled[name] = aot_compile(program.module(), args, kwargs, options={"aot_inductor.package": True})
    buffer = io.BytesIO()
    package_aoti(buffer, compiled)
    path = folder / "steps.pt2"
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    return [path]


_WRITERS: dict[str, Callable[[Path, Programs], list[Path]]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "aoti": _write_aoti,
}
ANYTIME_FORMATS = tuple(_WRITERS)

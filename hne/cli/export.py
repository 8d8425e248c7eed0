"""``hne export``."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import InputFormat
from ..files import replacing
from ..models.hne import HNE
from .options import Subparsers, add_checkpoint, checkpoint_path, load_model, new_parser, positive

_DESCRIPTION = """\
Export a trained ensemble as a program that runs without this package's Python code: from images
[batch, channels, height, width] (float32, normalised) to the mean logits [batch, classes] of the
first n networks.

pt2 is a program of torch.export: `torch.export.load("ensemble.pt2").module()(images)`. It is made
of plain PyTorch operations and needs torch alone; with --kernels, of this package's, and needs
`import hne_kernels` first.

onnx is a graph for ONNX Runtime, OpenVINO and others, with input "images" and output "logits".
Writing it needs `pip install onnx onnxscript`.
"""
_EXAMPLES = """\
  hne export runs/digits-hne_tiny --num-models 4 --output digits-4.pt2
  hne export runs/digits-hne_tiny --num-models 4 --format onnx
"""


class Ensemble(nn.Module):
    """The first ``num_models`` leaves of a tree as one network: images [B, C, H, W] to logits [B, L]."""

    def __init__(self, model: HNE, num_models: int) -> None:
        super().__init__()
        self.model = model
        self.num_models = num_models

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, self.num_models).mean(0)


def write_pt2(ensemble: Ensemble, images: Tensor, path: Path) -> Tensor:
    """Write a program of torch.export for any batch size; returns what it makes of ``images``."""
    program = torch.export.export(ensemble, (images,), dynamic_shapes=_ANY_BATCH)
    torch.export.save(program, path)
    result: Tensor = torch.export.load(path).module()(images)
    return result


def write_onnx(ensemble: Ensemble, images: Tensor, path: Path) -> Tensor:
    """Write an ONNX graph for any batch size; returns what it makes of ``images``.

    That is computed by ONNX Runtime where it is installed, and else by the reference evaluator of ``onnx``.

    Raises:
        RuntimeError: ``onnx`` or ``onnxscript`` is not installed.
    """
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise RuntimeError("--format onnx needs two packages more: pip install onnx onnxscript")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.onnx.export(
            ensemble,
            (images,),
            dynamic_shapes=_ANY_BATCH,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.save(path)
    inputs = {"images": images.numpy()}
    if find_spec("onnxruntime"):
        from onnxruntime import InferenceSession

        (logits,) = InferenceSession(path).run(None, inputs)
    else:
        from onnx.reference import ReferenceEvaluator

        (logits,) = ReferenceEvaluator(str(path)).run(None, inputs)
    return torch.from_numpy(logits)


_ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)
_FORMATS: dict[str, Callable[[Ensemble, Tensor, Path], Tensor]] = {"pt2": write_pt2, "onnx": write_onnx}


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "export", "write a stand-alone program", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    parser.add_argument("--format", choices=tuple(_FORMATS), default="pt2", help="(default: pt2)")
    parser.add_argument("--num-models", type=positive, metavar="N", help="networks to keep (default: all)")
    parser.add_argument("--kernels", action="store_true", help="use this package's kernels in the program")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="(default: ensemble-N.FORMAT beside the checkpoint)"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and check that the written program gives the same logits."""
    if args.kernels and args.format != "pt2":
        raise ValueError(f"--kernels: expected with --format pt2, got {args.format}, whose programs know no such ops")
    model, config = load_model(args.checkpoint, torch.device("cpu"), naive=not args.kernels)
    num_models = args.num_models or model.num_models
    ensemble = Ensemble(model, num_models).eval()
    input_format = InputFormat.from_dict(config["data"]["input"])
    images = torch.randn(2, input_format.channels, *input_format.size)
    folder = checkpoint_path(args.checkpoint).parent
    output = args.output or folder / f"ensemble-{num_models}.{args.format}"
    with torch.no_grad(), replacing(output) as temporary:
        expected = ensemble(images)
        got = _FORMATS[args.format](ensemble, images, temporary)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    print(
        f"wrote {output}: {num_models} of {model.num_models} models, "
        f"{model.macs(num_models, input_format.size) / 1e6:.2f} M MACs per image"
    )
    return 0

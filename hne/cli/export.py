"""``hne export``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data import InputFormat
from ..errors import ResultError
from ..files import check_writable, replacing
from ..inference import ANYTIME_FORMATS, Ensemble, EnsembleMean, EnsembleMixture, write_anytime, write_onnx, write_pt2
from ..models import checkpoint
from ..runtime import AnytimeSession
from . import options
from .loading import checkpoint_path, load_model

_DESCRIPTION = """\
Export a trained ensemble as a program that runs without this package's Python code. Its input is
normalised float32 images [batch, channels, height, width], its output the mean logits
[batch, classes] of the first N members. In a regression (diabetes) it is [batch, 2]: mean and variance
of the mixture of the first N members, in the units of the target.

pt2 is a program of torch.export: `torch.export.load("ensemble.pt2").module()(images)`. It consists
of plain PyTorch operations and needs torch alone. With --kernels it consists of this package's
operations and needs `import hne_kernels` first.

onnx is a graph for ONNX Runtime, OpenVINO and others, with input "images" and output "logits".
Writing it needs `pip install onnx onnxscript`.

--anytime writes a folder instead, with a program for each step of the tree and a manifest, for
hne.runtime.AnytimeSession: the first answer after the first step, a better one after each further step,
by deadline or confidence. Its formats are onnx, pt2, and aoti: one package that AOTInductor compiles for
processors like this one.

Batch norms are folded into weights, features are not copied where the tree branches, and the mean of
the members is part of the last layer. The branches of a layer are one grouped convolution
(--branches grouped), or a convolution each (--branches separate). Which is faster depends on the engine,
the batch size and the network, mostly on whether its channels are multiples of 16: try both.
"""
_EXAMPLES = """\
  hne export runs/digits-hne_tiny --num-models 4 --output digits-4.pt2
  hne export runs/digits-hne_tiny --num-models 4 --format onnx
  hne export runs/digits-hne_tiny --anytime --format onnx --output anytime
  hne export runs/digits-hne_tiny --format onnx --branches separate --output separate.onnx
"""


_FORMATS: dict[str, Callable[[Ensemble, Tensor, Path, bool], Tensor]] = {"pt2": write_pt2, "onnx": write_onnx}


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(commands, "export", "write a stand-alone program", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(execute=execute)
    options.add_checkpoint(parser)
    formats = tuple(dict.fromkeys([*_FORMATS, *ANYTIME_FORMATS]))
    parser.add_argument("--format", choices=formats, default="pt2", help="format of the program (default: pt2)")
    parser.add_argument("--anytime", action="store_true", help="write a program for each step, into a folder")
    parser.add_argument(
        "--num-models", type=options.positive_int, metavar="N", help="ensemble size (default: all members)"
    )
    parser.add_argument(
        "--branches",
        choices=("grouped", "separate"),
        default="grouped",
        help="convolutions of a layer's branches, without --kernels (default: grouped)",
    )
    parser.add_argument("--kernels", action="store_true", help="use this package's kernels in the program")
    parser.add_argument(
        "--output",
        type=options.path,
        metavar="FILE",
        help="the file (default: ensemble-N.FORMAT beside the checkpoint), or the folder (default: anytime there)",
    )


def execute(args: argparse.Namespace) -> int:
    """Export, and check that the written program gives the same logits."""
    if args.anytime:
        return _export_steps(args)
    if args.format not in _FORMATS:
        raise ValueError(f"--format: {args.format} is for --anytime only")
    if args.kernels and args.format != "pt2":
        raise ValueError(f"--kernels: expected with --format pt2, got {args.format}, which has no such operations")
    model, stored = load_model(args.checkpoint, torch.device("cpu"), naive=not args.kernels)
    num_models = args.num_models or model.num_models
    target = stored["data"].get("target")
    ensemble: Ensemble = EnsembleMean(model, num_models)
    if target is not None:
        ensemble = EnsembleMixture(model, num_models, target["mean"], target["std"])
    ensemble.eval()
    input_format = InputFormat.from_dict(stored["data"]["input"])
    images = torch.randn(2, input_format.channels, *input_format.size)
    folder = checkpoint_path(args.checkpoint).parent
    output = args.output or folder / f"ensemble-{num_models}.{args.format}"
    check_writable(output)
    with torch.no_grad(), replacing(output) as temporary:
        expected = ensemble(images)
        got = _FORMATS[args.format](ensemble, images, temporary, args.branches == "separate")
        _check_close(got, expected)
    to_stream = output.parts[1:2] in (("dev",), ("proc",))  # perhaps standard output, whose content is the program
    print(
        f"wrote {output}: {num_models} of {model.num_models} models, "
        f"{model.macs(num_models, input_format.size) / 1e6:.2f} M MACs per image",
        file=sys.stderr if to_stream else sys.stdout,
    )
    return 0


def _export_steps(args: argparse.Namespace) -> int:
    """Export the steps of anytime inference, and check that they give the answers of the model."""
    for name, given in (("--kernels", args.kernels), ("--num-models", args.num_models is not None)):
        if given:
            raise ValueError(f"{name}: expected without --anytime, whose programs are plain, one for each model")
    model, stored = load_model(args.checkpoint, torch.device("cpu"))
    if stored["data"].get("target") is not None:
        raise ValueError(f"--anytime: expected a classifier, got a regression of {stored['data']['name']}")
    input_format = InputFormat.from_dict(stored["data"]["input"])
    images = torch.randn(2, input_format.channels, *input_format.size)
    folder = args.output or checkpoint_path(args.checkpoint).parent / "anytime"
    write_anytime(model, folder, images, format=args.format, metadata=checkpoint.description(stored))
    session = AnytimeSession(folder)
    with torch.inference_mode():
        for (_, got), (_, expected) in zip(session.anytime(images), model.anytime(images), strict=True):
            _check_close(got, expected)
    print(f"wrote {folder}: {session.num_models} steps, checked with {session.engine}")
    return 0


def _check_close(got: Tensor, expected: Tensor) -> None:
    """Check that the written program computes what the model computes."""
    if not expected.isfinite().all():
        raise ResultError("the outputs for random images are not finite: train again with a smaller lr")
    try:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    except AssertionError as error:
        raise ResultError(f"nothing was written: the program computes other outputs than the model ({error})") from None

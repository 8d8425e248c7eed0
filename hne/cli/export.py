"""``hne export``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import InputFormat
from ..files import replacing
from ..model import HNE
from .options import (
    Subparsers,
    add_checkpoint,
    checkpoint_path,
    load_model,
    new_parser,
    positive,
)

_DESCRIPTION = """\
Export a trained ensemble as a program that runs without this package's Python code: from images
[batch, channels, height, width] (float32, normalised) to the mean logits [batch, classes] of the
first n networks.

pt2 is a program of torch.export: `torch.export.load("ensemble.pt2").module()(images)`. It is made
of plain PyTorch operations and needs torch alone; with --kernels, of this package's, and needs
`import hne_kernels` first.
"""
_EXAMPLES = """\
  hne export runs/digits-hne_tiny --num-models 4 --output digits-4.pt2
"""


class Ensemble(nn.Module):
    """The first ``num_models`` leaves of a tree as one network: images [B, C, H, W] to logits [B, L]."""

    def __init__(self, model: HNE, num_models: int) -> None:
        super().__init__()
        self.model = model
        self.num_models = num_models

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, self.num_models).mean(0)


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "export", "write a stand-alone program", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    parser.add_argument("--format", choices=("pt2",), default="pt2", help="(default: pt2)")
    parser.add_argument("--num-models", type=positive, metavar="N", help="networks to keep (default: all)")
    parser.add_argument("--kernels", action="store_true", help="use this package's kernels in the program")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="(default: ensemble-N.FORMAT beside the checkpoint)"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and check that the written program gives the same logits."""
    model, config = load_model(args.checkpoint, torch.device("cpu"), naive=not args.kernels)
    num_models = args.num_models or model.num_models
    ensemble = Ensemble(model, num_models).eval()
    input_format = InputFormat.from_dict(config["data"]["input"])
    images = torch.randn(2, input_format.channels, *input_format.size)
    with torch.no_grad():
        expected = ensemble(images)
        program = torch.export.export(ensemble, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    folder = checkpoint_path(args.checkpoint).parent
    output = args.output or folder / f"ensemble-{num_models}.{args.format}"
    with replacing(output) as temporary:
        torch.export.save(program, temporary)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(output).module()(images), expected)
    print(
        f"wrote {output}: {num_models} of {model.num_models} models, "
        f"{model.macs(num_models, input_format.size) / 1e6:.2f} M MACs per image"
    )
    return 0

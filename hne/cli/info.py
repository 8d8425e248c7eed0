"""``hne info``."""

from __future__ import annotations

import argparse

import torch

from hne_kernels import default_sizes, environment_report

from ..models import PRESETS, FusedHNE
from ..reporting import format_macs, show_table
from ..training import DEFAULTS
from . import options

_DESCRIPTION = "Show this machine, the kernels that are usable on it, and the cost of each preset.\n"
_EXAMPLES = """\
  hne info
"""

# Input of a preset (height and width, channels), and the number of outputs: for its data set, else for CIFAR-100 or
# ImageNet.
_INPUTS = {"hne_tiny": (8, 1, 10), "hne_mlp": (1, 10, 2)}
_OUTPUTS = {32: 100, 224: 1000}


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(
        commands, "info", "show this machine, the kernels and the presets", _DESCRIPTION, _EXAMPLES
    )
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Print the tables."""
    for title, values in environment_report():
        show_table([title, ""], values.items(), text_columns=2)
        print()
    for name in PRESETS:
        _show_preset(name)
    return 0


def _show_preset(name: str) -> None:
    pixels = PRESETS[name].image_size
    size, channels, classes = _INPUTS.get(name, (pixels, 3, _OUTPUTS[pixels]))
    with torch.device("meta"):  # the cost takes no memory
        model = FusedHNE.from_preset(name, num_classes=classes, in_channels=channels)
    sizes = default_sizes(model.num_models)
    used = ", ".join(data for data, (_, preset) in DEFAULTS.items() if preset == name)
    show_table(
        ["n", *map(str, sizes)],
        [("MACs", *(format_macs(model.macs(n, size)) for n in sizes))],
        title=(
            f"{name}: {model.num_models} models, branches {'-'.join(map(str, model.hierarchy.branches))}, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters"
        ),
        caption=f"{size}x{size} input, {channels} channels, {classes} outputs; the default for {used or 'none'}\n",
        text_columns=1,
    )

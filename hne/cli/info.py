"""``hne info``."""

from __future__ import annotations

import argparse

from hne_kernels import default_sizes
from hne_kernels import info as kernel_info

from ..models.hne import FusedHNE
from ..models.presets import PRESETS
from ..reporting import format_macs, show_table
from ..training.config import DEFAULTS
from .options import Subparsers, new_parser

_DESCRIPTION = "Show this machine, the kernels that are usable on it, and what each preset costs.\n"
_EXAMPLES = """\
  hne info
"""

# Input that each preset is meant for (height and width, channels), and the classes of its data set in the paper.
_INPUTS = {"hne_mobilenetv2_075": (224, 3, 1000), "hne_tiny": (8, 1, 10), "hne_mlp": (1, 10, 2)}
_CIFAR100 = (32, 3, 100)


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "info", "this machine, the kernels, the presets", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the tables."""
    for title, values in kernel_info.sections():
        show_table([title, ""], values.items(), text_columns=2)
        print()
    for name in PRESETS:
        _show_preset(name)
    return 0


def _show_preset(name: str) -> None:
    size, channels, classes = _INPUTS.get(name, _CIFAR100)
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

"""Options of a training config, each described once for all commands that train.

An option that the user does not give is absent from the namespace: the protocol or a resumed run decides its value.
"""

from __future__ import annotations

import argparse
from argparse import SUPPRESS
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from ..losses import OBJECTIVES
from ..models import PRESETS
from ..training import PROTOCOLS, SCHEDULES, TrainConfig
from .options import distinct_floats, positive_int, positive_ints


def protocol_line(values: Mapping[str, Any]) -> str:
    """The main options of a config or protocol in a line."""
    return (
        f"{values['epochs']} epochs, batch {values['batch_size']}, lr {values['lr']:g} "
        f"{values['schedule']}, weight decay {values['weight_decay']:g}"
    )


class _Option(NamedTuple):
    help: str
    type: Callable[[str], Any] | None = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None


_PROTOCOL_LINES = " ".join(f"{name}: {protocol_line(values)}." for name, values in PROTOCOLS.items())

_OPTIONS: dict[str, _Option] = {
    "limit_train": _Option("train on only K images", positive_int, "K"),
    "image_size": _Option(
        "scale the images of imagenet or folder to this height and width (default: 224)", positive_int, "PIXELS"
    ),
    "val_share": _Option(
        "test on this share of the training images of each class in place of the test images, to choose options "
        "(folder without val/: 0.1)",
        float,
        "SHARE",
    ),
    "split_seed": _Option("random seed of the choice of these images (default: 0)", int, "K"),
    "augment": _Option("no random crops and flips"),
    "preset": _Option("architecture (default: one that suits the data; see `hne info`)", choices=tuple(PRESETS)),
    "width": _Option("factor on every channel count (default: 1)", float, "F"),
    "widths": _Option(
        "slimmable channels: train for every share of the channels from the smallest of these to 1, and evaluate at "
        "these, such as 0.25,0.5,0.75,1 (default: 1 alone)",
        distinct_floats,
        "W1,W2,...",
    ),
    "num_models": _Option("ensemble size: number of members (default: that of the preset)", positive_int, "N"),
    "branches": _Option(
        "another tree: number of branches of each block, for instance 1,1,1,16,16 (heads: --num-models)",
        positive_ints,
        "B0,B1,...",
    ),
    "backbone": _Option(
        "start from a trained network instead of a preset: torchvision:NAME, timm:NAME, or a file of weights with "
        "--backbone-arch; needs --branches",
        metavar="SOURCE",
    ),
    "backbone_arch": _Option("architecture of a file of weights: torchvision:NAME or timm:NAME", metavar="NAME"),
    "perturb": _Option(
        "noise of all branches of the backbone but the first, relative to each tensor's deviation (default: 0.1)",
        float,
        "F",
    ),
    "freeze_trunk": _Option("keep the blocks of one branch as they are in the backbone"),
    "naive": _Option("train the plain PyTorch implementation, for comparison"),
    "objective": _Option(
        "training objective: I each member by itself (eq. 9), H the nested ensembles (eq. 10), D members and HD nested "
        "ensembles distilled from the whole ensemble (eq. 11, 12) (default: I+HD; with protocol tabular I)",
        choices=OBJECTIVES,
    ),
    "alpha": _Option("weight of the second term; the first has 1 - A (default: 0.5, for imagenet 0.75)", float, "A"),
    "temperature": _Option("temperature of the distillation (default: 2)", float, "T"),
    "protocol": _Option(
        "a set of options. cifar and imagenet are the paper's, quick is for short runs, tabular for regression "
        f"(default: one that suits the data). {_PROTOCOL_LINES}",
        choices=tuple(PROTOCOLS),
    ),
    "epochs": _Option("passes over the training images", positive_int, "K"),
    "batch_size": _Option(
        "images per step, of all processes together; an incomplete last batch is left out", positive_int, "K"
    ),
    "lr": _Option("initial learning rate of SGD", float, "LR"),
    "schedule": _Option(
        "learning rate: cosine to zero; halving after 40, 60, 73, 83, 90 and 97 %% of the epochs; or cyclic, which is "
        "halving of 5, 4, 3, 2, 1 times the base rate in turn, epoch by epoch",
        choices=SCHEDULES,
    ),
    "momentum": _Option("momentum of SGD (default: 0.9)", float, "M"),
    "weight_decay": _Option("weight decay of all parameters", float, "W"),
    "clip_grad_norm": _Option("scale gradients down to this norm (default: off)", float, "NORM"),
    "seed": _Option("random seed of weights, order and augmentation (default: 0)", int, "K"),
    "amp": _Option("compute in bfloat16 where it is safe (autocast)"),
    "channels_last": _Option("give the model contiguous NCHW images instead of channels-last ones"),
    "sync_bn": _Option("with torchrun: batch statistics over all processes, for the result of a single process"),
    "cuda_graph": _Option("launch each training step as one CUDA graph, to the same result; needs a GPU"),
}

_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}

TRAINING_DATA = ("limit_train", "image_size", "val_share", "split_seed", "augment")
BACKBONE = ("backbone", "backbone_arch", "perturb", "freeze_trunk")
OPTIMISATION = (
    *("protocol", "epochs", "batch_size", "lr", "schedule"),
    *("momentum", "weight_decay", "clip_grad_norm"),
)
NUMERICS = ("amp", "channels_last", "sync_bn")
LAUNCHES = ("cuda_graph",)


def add_options(group: Any, *names: str, helps: Mapping[str, str] | None = None) -> None:
    """Add options of a config; an option that is on by default becomes ``--no-...``.

    Args:
        group: A parser, or a group of it.
        names: Fields of :class:`TrainConfig`.
        helps: Other help texts, by name.
    """
    for name in names:
        option, default = _OPTIONS[name], _DEFAULTS[name]
        flag = name.replace("_", "-")
        settings: dict[str, Any] = {"dest": name, "default": SUPPRESS, "help": (helps or {}).get(name, option.help)}
        if isinstance(default, bool):
            group.add_argument(
                f"--no-{flag}" if default else f"--{flag}", action="store_const", const=not default, **settings
            )
        elif option.choices is not None:
            group.add_argument(f"--{flag}", choices=option.choices, **settings)
        else:
            group.add_argument(f"--{flag}", type=option.type, metavar=option.metavar, **settings)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a config that the user has given."""
    return {name: value for name, value in vars(args).items() if name in _DEFAULTS}


def as_flags(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give ``values``, without those that are equal to their ``defaults``."""
    words: list[str] = []
    for option, value in values.items():
        flag = option.replace("_", "-")
        if value is False:
            words.append(f"--no-{flag}")
        elif value is True:
            words.append(f"--{flag}")
        elif value != defaults.get(option):
            entries = value if isinstance(value, tuple) else (str(value),)
            words += [f"--{flag}", ",".join(e if isinstance(e, str) else f"{e:g}" for e in entries)]
    return words

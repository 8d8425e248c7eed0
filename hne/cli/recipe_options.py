"""Options of a recipe, for the commands that train: absent from the namespace unless the user has given them."""

from __future__ import annotations

import argparse
from argparse import SUPPRESS
from dataclasses import fields
from typing import Any

from ..models.presets import PRESETS
from ..training.config import PROTOCOLS, SCHEDULES, Recipe
from .options import positive


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the recipe that the user has given."""
    names = {field.name for field in fields(Recipe)}
    return {name: value for name, value in vars(args).items() if name in names}


def protocol_line(values: dict[str, Any]) -> str:
    """The main figures of a recipe or protocol, in a line."""
    return (
        f"{values['epochs']} epochs, batch {values['batch_size']}, lr {values['lr']:g} "
        f"{values['schedule']}, weight decay {values['weight_decay']:g}"
    )


def add(group: Any, *names: str, **options: Any) -> None:
    """An option of the recipe."""
    group.add_argument(*names, default=SUPPRESS, **options)


def add_training_data(parser: argparse.ArgumentParser) -> None:
    """What of the data set is trained on, and how it is varied."""
    group = parser.add_argument_group("training data")
    add(group, "--limit-train", type=positive, metavar="K", help="train on only K images")
    add(
        group,
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="scale imagenet's images to this size (default: 224)",
    )
    add(
        group,
        "--no-augment",
        dest="augment",
        action="store_false",
        help="no random crops and flips",
    )


def add_network(parser: argparse.ArgumentParser) -> Any:
    """The architecture and the number of models; returns the group, for more of its kind."""
    group = parser.add_argument_group("network")
    add(
        group,
        "--preset",
        choices=tuple(PRESETS),
        help="the architecture (default: one that suits the data; `hne info` lists them)",
    )
    add(group, "--num-models", type=positive, metavar="N", help="leaves of the tree")
    return group


def add_distillation(group: Any) -> None:
    """The weights of an objective."""
    add(
        group,
        "--alpha",
        type=float,
        metavar="A",
        help="weight of the second term, the first has 1 - A (default: 0.5; imagenet 0.75)",
    )
    add(group, "--temperature", type=float, metavar="T", help="of the distillation (default: 2)")


def add_optimisation(parser: argparse.ArgumentParser) -> Any:
    """How the objective is minimised; returns the group, for more of its kind."""
    group = parser.add_argument_group("optimisation")
    add(
        group,
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="cifar and imagenet are the paper's; quick is for digits (default: what suits the data). "
        + " ".join(f"{name}: {protocol_line(values)}." for name, values in PROTOCOLS.items()),
    )
    add(group, "--epochs", type=positive, metavar="K", help="passes over the training images")
    add(
        group,
        "--batch-size",
        type=positive,
        metavar="K",
        help="images per step, of all processes together; an incomplete last batch is left out",
    )
    add(group, "--lr", type=float, metavar="LR", help="initial learning rate of SGD")
    add(
        group,
        "--schedule",
        choices=SCHEDULES,
        help="cosine to zero, or halving at 40, 60, 73, 83, 90 and 97 %% of the epochs",
    )
    add(group, "--momentum", type=float, metavar="M", help="of SGD (default: 0.9)")
    add(group, "--weight-decay", type=float, metavar="W", help="of all parameters")
    add(
        group,
        "--clip-grad-norm",
        type=float,
        metavar="NORM",
        help="scale gradients down to this norm (default: off)",
    )
    return group


def add_numerics(parser: argparse.ArgumentParser) -> None:
    """In which precision and memory layout, and over how many processes."""
    group = parser.add_argument_group("numerics")
    add(group, "--amp", action="store_true", help="compute in bfloat16 where it is safe (autocast)")
    add(
        group,
        "--no-channels-last",
        dest="channels_last",
        action="store_false",
        help="give the network contiguous NCHW images instead of channels-last ones",
    )
    add(
        group,
        "--sync-bn",
        action="store_true",
        help="with torchrun: batch statistics over all processes, for the result of a single one",
    )

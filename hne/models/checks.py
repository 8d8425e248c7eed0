"""Checks of the arguments that describe a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hierarchy import Hierarchy
from ..layers import LayerSpec, Module


def check_network(
    hierarchy: Hierarchy,
    blocks: Sequence[Sequence[LayerSpec]],
    num_classes: int,
    in_channels: int,
) -> None:
    """Raise unless the arguments of an :class:`HNE` fit together."""
    if not isinstance(hierarchy, Hierarchy):
        raise TypeError(f"hierarchy must be a Hierarchy, got {type(hierarchy).__name__}")
    if len(blocks) != hierarchy.num_blocks:
        raise ValueError(
            f"the tree {hierarchy.branches} has {hierarchy.num_blocks} blocks, but blocks describes {len(blocks)}"
        )
    for index, block in enumerate(blocks):
        if not block:
            raise ValueError(f"blocks[{index}] must have at least one layer, got none")
        for layer in block:
            if not isinstance(layer, LayerSpec):
                raise TypeError(f"blocks[{index}] must list layer specs (Conv, Bottleneck, ...), got {layer!r}")
    _check_sharing(blocks)
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_sharing(blocks: Sequence[Sequence[LayerSpec]]) -> None:
    """Raise if two templates share parameters: their copies would not."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    for number, block in enumerate(blocks):
        for index, spec in enumerate(block):
            if isinstance(spec, Module):
                for name, parameter in spec.template.named_parameters():
                    place, owner = owners.setdefault(id(parameter), (f"blocks[{number}][{index}]", spec.template))
                    if owner is not spec.template:
                        raise ValueError(
                            f"blocks[{number}][{index}]: its template shares the parameter {name} with that of "
                            f"{place}, but their copies would not: give templates with parameters of their own"
                        )


def check_templates(blocks: Any, templates: Sequence[nn.Module]) -> None:
    """Raise unless there is a template for each :class:`Module` in the blocks of a config."""
    layers = [layer for block in blocks for layer in block if isinstance(layer, dict)]
    names = [str(layer.get("template")) for layer in layers if layer.get("layer") == Module.__name__]
    if len(names) != len(templates):
        raise ValueError(
            f"templates: expected one for each Module of the network ({', '.join(names) or 'it has none'}), "
            f"got {len(templates)}"
        )


def check_images(x: Tensor, in_channels: int, weight: Tensor) -> None:
    """Raise unless ``x`` are images that a network of ``in_channels`` and with the parameter ``weight`` accepts."""
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"x must have 4 dimensions [batch, channels, height, width], got shape {tuple(shape)}")
    if shape[1] != in_channels:
        raise ValueError(f"x must have {in_channels} channels (dimension 1), got shape {tuple(shape)}")
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"x must be images of at least 1x1 pixels, got shape {tuple(shape)}")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of the model, {weight.device}, got {x.device}")
    if x.dtype == weight.dtype or (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        return
    raise TypeError(f"x must have the dtype of the model, {weight.dtype}, got {x.dtype}")


def has_plain_batch_norm(module: nn.Module) -> bool:
    """Whether a module has a batch norm of its own process alone."""
    kind = nn.modules.batchnorm._BatchNorm
    return any(isinstance(part, kind) and not isinstance(part, nn.SyncBatchNorm) for part in module.modules())

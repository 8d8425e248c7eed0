"""One network of this package as a backbone: its layers are taken over as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import BackboneError
from ...hierarchy import Hierarchy
from ...layers import Bottleneck, Module
from .convert import ConvertedLayer
from .cut import SIZES, Shape, TracedUnit
from .units import Unit, evaluating


class NetworkParts(NamedTuple):
    """The layers of each block, the last linear layer, the shape of the images, and random images with their logits."""

    blocks: list[list[ConvertedLayer]]
    head: nn.Linear
    image: Shape
    check: tuple[Tensor, Tensor]


def is_network(net: nn.Module) -> bool:
    """Whether a backbone is an :class:`hne.HNE`, which this module cannot import."""
    return hasattr(net, "layers_of_blocks")


@torch.no_grad()
def network_parts(net: Any, tree: Hierarchy, input_size: int | tuple[int, ...] | None) -> NetworkParts:
    """The parts of an :class:`hne.HNE` of one network.

    Raises:
        BackboneError: It is an ensemble, has another number of blocks than the tree, or does not take the images.
    """
    if net.num_models != 1:
        raise BackboneError(
            f"backbone: expected a single network, got an ensemble of {net.num_models} (branches "
            f"{net.hierarchy.branches})"
        )
    if tree.num_blocks != net.hierarchy.num_blocks:
        raise BackboneError(
            f"branches: expected a count for each of the {net.hierarchy.num_blocks} blocks of the network, "
            f"got {tree.branches}"
        )
    blocks = [
        [_converted(layer, f"blocks.{number}.{index}") for index, layer in enumerate(block)]
        for number, block in enumerate(net.layers_of_blocks())
    ]
    weight, bias = net.head.conv.weight, net.head.conv.bias
    head = nn.Linear(weight.shape[1], net.num_classes, device="meta")
    head.weight = nn.Parameter(weight.flatten(1).clone(), weight.requires_grad)
    head.bias = nn.Parameter(bias.clone(), bias.requires_grad)
    check = _images_and_logits(net, input_size)
    return NetworkParts(blocks, head, tuple(check[0].shape[1:]), check)


def _converted(layer: Any, path: str) -> ConvertedLayer:
    """A layer with the state of its only branch."""
    unit = TracedUnit(Unit(path, layer), (), (), False)
    spec: Any = layer.spec
    if isinstance(spec, Module):
        return ConvertedLayer([unit], replace(spec, template=layer.copies[0]))
    if getattr(layer, "shortcut", spec) is None:  # it stays the identity where the tree branches
        if isinstance(spec, Bottleneck):
            spec = replace(spec, projection=False)
        elif hasattr(spec, "projection"):
            spec = replace(spec, projection="shape")
    return ConvertedLayer([unit], spec, layer.state_dict(keep_vars=True))


def _images_and_logits(net: Any, input_size: int | tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    parameter = net.head.conv.weight
    failure: Exception | None = None
    for size in SIZES if input_size is None else (input_size,):
        height, width = (size, size) if isinstance(size, int) else size[-2:]
        x = torch.randn(2, net.in_channels, height, width, generator=torch.Generator().manual_seed(0)).to(parameter)
        try:
            with evaluating(net):
                return x, net(x)[0].clone()
        except (ValueError, RuntimeError) as error:
            failure = failure or error
    raise BackboneError(f"input_size: the network computes no such images: {failure}") from failure

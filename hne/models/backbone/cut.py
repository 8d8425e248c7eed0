"""Cuts a backbone into the blocks of a tree, and follows the shapes through its units."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import BackboneError
from .families import Cut, in_order, last_linear, recognise
from .units import Unit, check_complete, check_once, evaluating, find, units_at

Shape = tuple[int, ...]
Stage = Sequence[str | nn.Module]

SIZES = (64, 224, 32, 28, 16, 8)  # heights and widths to try


@dataclass(frozen=True)
class TracedUnit:
    """A unit with the shapes of its input and output, each ``[batch, channels, height, width]`` (a feature map),
    ``[batch, tokens, channels]`` or ``[batch, channels]``.

    Attributes:
        writes_input: Whether the module writes into its input.
    """

    unit: Unit
    input: Shape
    output: Shape
    writes_input: bool


class Blocks(NamedTuple):
    """A backbone in the blocks of a tree."""

    blocks: list[list[TracedUnit]]
    head: str
    image: Shape  # channels, height, width
    features: int  # channels of the input of the head


def cut(
    net: nn.Module,
    num_blocks: int,
    stages: Sequence[Stage] | None,
    head: str | None,
    input_size: int | tuple[int, ...] | None,
) -> Blocks:
    """Cut a network into ``num_blocks`` blocks; see :meth:`hne.HNE.from_backbone`.

    Raises:
        BackboneError: The blocks do not fit the network, or its units do not compose.
    """
    named = None if stages is None else _named_stages(net, stages)
    if named is None:
        found = recognise(net) or in_order(net)
    else:
        units = [unit for stage in named for unit in stage]
        starts = [sum(map(len, named[:index])) for index in range(len(named))]
        found = Cut(type(net).__name__, units, head or last_linear(net), starts)
    if head is not None:
        found = found._replace(head=head)
    linear = find(net, found.head)
    if type(linear) is not nn.Linear:
        raise BackboneError(f"head: expected an nn.Linear at {found.head!r}, got {type(linear).__name__}")
    check_once([*(unit.path for unit in found.units if not unit.path.startswith("(")), found.head])
    check_complete(net, found.units, found.head)
    image = image_shape(net, found.units, input_size)
    traced = trace(found.units, image)
    features = _channels(traced[-1].output)
    if features != linear.in_features:
        raise BackboneError(
            f"head: {found.head} expects {linear.in_features} features, but the stages end in {features} channels "
            f"(shape {_text(traced[-1].output)})"
        )
    starts = _starts(found, traced)
    if named is None:
        starts = _group(starts, num_blocks, found.family)
    elif len(starts) != num_blocks:
        raise BackboneError(f"branches: expected one count per stage, got {num_blocks} for {len(starts)} stages")
    ends = [*starts[1:], len(traced)]
    return Blocks([traced[a:b] for a, b in zip(starts, ends, strict=True)], found.head, image, features)


def image_shape(net: nn.Module, units: Sequence[Unit], input_size: int | tuple[int, ...] | None) -> Shape:
    """Channels, height and width of the images.

    Raises:
        BackboneError: The number of channels is not known.
        ValueError: ``input_size`` is neither a size nor a shape.
    """
    weights = (m for unit in units for m in unit.module.modules() if isinstance(m, nn.Conv2d))
    channels = next((conv.in_channels for conv in weights), None)
    size: Any = input_size
    if size is None:
        config = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None)
        side = getattr(net, "image_size", None)
        if isinstance(side, int):
            size = side
        elif (found := _config_entry(config, "input_size")) is not None:
            size = tuple(found)[1:]
            patches = getattr(getattr(net, "patch_embed", None), "img_size", None)
            size = size if patches is None else tuple(patches)
    sizes = [size] if size is not None else list(SIZES)
    for candidate in sizes:
        shape = (candidate, candidate) if isinstance(candidate, int) else tuple(candidate)
        if len(shape) == 2 and channels is not None:
            shape = (channels, *shape)
        if len(shape) == 2:
            raise BackboneError("input_size: give (channels, height, width), as the network has no convolution")
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"input_size must be a size or (channels, height, width), got {input_size!r}")
        if len(sizes) == 1 or _runs(net, shape):
            return shape
    raise BackboneError(
        f"input_size: the backbone computes no images of {', '.join(f'{s}x{s}' for s in SIZES)} pixels: "
        "give the size that it expects"
    )


def trace(units: Sequence[Unit], image: Shape) -> list[TracedUnit]:
    """Run the units one after the other on meta tensors, in eval mode; where a module cannot, on real ones.

    Raises:
        BackboneError: A unit does not take the output of the one before; the message has the shapes.
    """
    for device in ("meta", None):
        try:
            return list(_trace(units, image, device))
        except BackboneError:
            if device is None:
                raise
    raise AssertionError


def _trace(units: Sequence[Unit], image: Shape, device: str | None) -> Iterator[TracedUnit]:
    parameter = next(p for unit in units for p in unit.module.parameters())
    x = torch.zeros(2, *image, device=device or parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for index, unit in enumerate(units):
            module = copied(unit.module, device).eval()
            version = x._version
            try:
                y = module(x)
            except Exception as error:
                before = f"after {units[index - 1]}" if index else "for the images"
                raise BackboneError(
                    f"stages: {unit} does not take the input {_text(x.shape)} {before}: {_first_line(error)}. "
                    "A function that the network's forward applies in between (torch.flatten, F.relu, ...) is missing "
                    "here: put it into the stage as a module, such as nn.Flatten()"
                ) from error
            if not isinstance(y, Tensor) or y.dim() not in (2, 3, 4) or len(y) != 2:
                got = f"the shape {_text(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                raise BackboneError(
                    f"stages: expected a feature map [batch, channels, height, width], tokens [batch, tokens, "
                    f"channels] or [batch, channels] from {unit}, got {got} for a batch of 2"
                )
            yield TracedUnit(unit, tuple(x.shape), tuple(y.shape), x._version != version)
            x = y


def copied(module: nn.Module, device: str | None = None) -> nn.Module:
    """A copy of a module; with ``device="meta"`` without memory for its parameters and buffers."""
    memo: dict[int, Any] = {}
    if device == "meta":
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise BackboneError(
            f"backbone: {type(module).__name__} cannot be copied: {_first_line(error)}. Where a hook computes weights "
            "(pruning, weight norm), make them permanent first, as prune.remove() does"
        ) from error


def _runs(net: nn.Module, image: Shape) -> bool:
    """Whether the network itself computes images of a shape."""
    for device in ("meta", None):
        parameter = next(net.parameters())
        x = torch.zeros(2, *image, device=device or parameter.device, dtype=parameter.dtype)
        try:
            module = net if device is None else copied(net, device)
            with torch.no_grad(), evaluating(module):
                y = module(x)
            return not isinstance(y, Tensor) or len(y) == len(x)  # view(-1, n) may mix pixels into the batch
        except Exception:
            continue
    return False


def _named_stages(net: nn.Module, stages: Sequence[Stage]) -> list[list[Unit]]:
    """The units of the stages that the user has named; a module without parameters may stand for a function."""
    if isinstance(stages, str) or not all(isinstance(stage, list | tuple) for stage in stages):
        raise TypeError(f"stages must be a list of lists of paths, got {stages!r}")
    check_once([path for stage in stages for path in stage if isinstance(path, str)])
    named = []
    for index, stage in enumerate(stages):
        units: list[Unit] = []
        for path in stage:
            if isinstance(path, str):
                units += units_at(net, path)
            elif isinstance(path, nn.Module) and not any(True for _ in path.parameters()):
                units.append(Unit(f"({type(path).__name__})", path))
            else:
                raise TypeError(
                    f"stages[{index}] must list paths such as 'layer1', or modules without parameters, got {path!r}"
                )
        if not units:
            raise BackboneError(f"stages[{index}] has no module")
        named.append(units)
    return named


def _starts(found: Cut, traced: Sequence[TracedUnit]) -> list[int]:
    """The indices of the units with which a stage may begin."""
    if found.starts is not None:
        return found.starts
    starts = [0]
    for index, step in enumerate(traced[: found.resized]):
        if len(step.input) == len(step.output) == 4 and step.output[2] < step.input[2] and index:
            has_parameters = any(True for _ in step.unit.module.parameters())
            starts.append(index if has_parameters else index + 1)
    return [start for start in dict.fromkeys(starts) if start == 0 or start < found.resized]


def _group(starts: list[int], num_blocks: int, family: str) -> list[int]:
    """The first unit of each block: consecutive stages in groups of equal size, larger ones first."""
    if num_blocks > len(starts):
        raise BackboneError(
            f"branches: {family} has {len(starts)} stages, got counts for {num_blocks} blocks: give at most "
            f"{len(starts)}, or cut the network by stages="
        )
    size, larger = divmod(len(starts), num_blocks)
    return [starts[block * size + min(block, larger)] for block in range(num_blocks)]


def _config_entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _channels(shape: Shape) -> int:
    return shape[2] if len(shape) == 3 else shape[1]


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

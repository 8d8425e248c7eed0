"""MSDNet: multi-scale dense networks with early exits (Huang et al., ICLR 2018), as published for CIFAR."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .early_exit import EarlyExitNetwork, check_numbers

_SCALES = 3
_FACTORS = (1, 2, 4)  # of the channels of each scale, fine to coarse, and of the bottlenecks' widths
_REDUCTION = 0.5  # of the channels where a scale ends
_EXIT_CHANNELS = 128


class MSDNet(EarlyExitNetwork):
    """A network with feature maps of three scales in each layer, and exits at the coarsest one.

    Each layer adds channels to those of the layers before (dense connections), from the same scale and from the next
    finer one. A third of the layers has three scales, a third two, and the rest one. The defaults are the network for
    anytime prediction on CIFAR of the authors' PyTorch version (github.com/kalviny/MSDNet-PyTorch), which prunes
    channels to one half where a scale ends. Evaluation is lazy, as in the paper: a finer feature map of the last
    layers before an exit is computed only when a later exit needs it.

    Args:
        num_classes: Number of logits.
        in_channels: Number of channels of the images.
        exits: Number of exits.
        base: Number of layers before the first exit.
        step: Number of layers between exits.
        channels: Channels of the finest scale in the first layer.
        growth: Channels that a layer adds to the finest scale.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        exits: int = 7,
        base: int = 4,
        step: int = 2,
        channels: int = 16,
        growth: int = 6,
    ) -> None:
        super().__init__(exits, num_classes, in_channels)
        self._macs: dict[tuple[int, int], list[int]] = {}  # by the size of the images
        self.options = {"exits": exits, "base": base, "step": step, "channels": channels, "growth": growth}
        check_numbers(**self.options)
        layers = base + step * (exits - 1)
        interval = math.ceil(layers / _SCALES)
        inputs = (in_channels, *(channels * factor for factor in _FACTORS))
        self.first = nn.ModuleList(
            _conv(inputs[scale], inputs[scale + 1], 3, stride=1 if scale == 0 else 2) for scale in range(_SCALES)
        )
        self.layers = nn.ModuleList()
        self.exits = nn.ModuleDict()  # by the number of layers before it
        offset = 0  # of the finest scale that is left
        for number in range(layers):
            finest = number // interval
            self.layers.append(_Layer(channels, growth, finest, finest > offset))
            channels += growth
            if finest > offset:
                reduced = math.floor(_REDUCTION * channels)
                self.layers.append(_Transition(channels, reduced, finest))
                channels = reduced
            offset = finest
            if (number + 1 - base) % step == 0 and number + 1 >= base:
                self.exits[str(len(self.layers))] = _exit(channels * _FACTORS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as in the authors' version
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.weight[0, 0].numel() * module.out_channels)))
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def first_exits(self, x: Tensor, count: int) -> Tensor:
        return torch.stack(list(itertools.islice(self._exit_logits(x), count)))

    def _exit_logits(self, x: Tensor) -> Iterator[Tensor]:
        """Logits of one exit after another; what only later exits need is computed later."""
        known: dict[tuple[int, int], Tensor] = {}
        for number, exit in self.exits.items():
            logits: Tensor = exit(self._features(x, known, int(number), _SCALES - 1))
            yield logits

    def _features(self, x: Tensor, known: dict[tuple[int, int], Tensor], number: int, scale: int) -> Tensor:
        """The feature map of a scale after ``number`` layers, and those that it needs, unless they are ``known``."""
        if (number, scale) not in known:
            if number == 0:
                result = self.first[scale](x if scale == 0 else self._features(x, known, 0, scale - 1))
            else:
                result = self.layers[number - 1](functools.partial(self._features, x, known, number - 1), scale)
            known[number, scale] = result
        return known[number, scale]

    def macs(self, num_models: int | None = None, input_size: int | tuple[int, int] = (32, 32)) -> int:
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
        if size not in self._macs:
            self._macs[size] = self._count_macs(size)
        return self._macs[size][self._check_exits(num_models) - 1]

    def _count_macs(self, size: tuple[int, int]) -> list[int]:
        """Multiply-adds up to each exit."""
        twin, counts = copy.deepcopy(self).to("meta").eval(), []  # shapes without memory
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for _ in twin._exit_logits(torch.empty(1, self.in_channels, *size, device="meta")):
                counts.append(counter.get_total_flops() // 2)
        return counts

    def config(self) -> dict[str, Any]:
        numbers = {"num_classes": self.num_classes, "in_channels": self.in_channels}
        return {"msdnet": {**numbers, **self.options}}


class _Layer(nn.Module):
    """Adds channels to each scale, of which the finest may end here.

    Args:
        channels: Channels of the input at the finest scale of all; ``_FACTORS`` times as many at the coarser ones.
        growth: The same of what is added.
        finest: The finest scale of the output.
        ends: Whether the input has one finer scale, which the output has not.
    """

    def __init__(self, channels: int, growth: int, finest: int, ends: bool) -> None:
        super().__init__()
        self.finest = finest
        self.same, self.down = nn.ModuleList(), nn.ModuleList()
        for scale in range(finest, _SCALES):
            factor, has_finer = _FACTORS[scale], scale > finest or ends
            added = factor * growth // 2 if has_finer else factor * growth
            self.same.append(_bottleneck(factor * channels, added, factor, 1))
            if has_finer:
                finer = _FACTORS[scale - 1]
                self.down.append(_bottleneck(finer * channels, factor * growth - added, finer, 2))

    def forward(self, features: Callable[[int], Tensor], scale: int) -> Tensor:
        """The output at one scale; ``features`` gives the input at a scale."""
        x = features(scale)
        index = scale - self.finest
        below = index - len(self.same) + len(self.down)  # negative: no finer scale adds to this one
        from_finer = [self.down[below](features(scale - 1))] if below >= 0 else []
        return torch.cat([x, *from_finer, self.same[index](x)], 1)


class _Transition(nn.Module):
    """A 1x1 convolution of each scale to fewer channels."""

    def __init__(self, channels: int, reduced: int, finest: int) -> None:
        super().__init__()
        self.finest = finest
        self.convs = nn.ModuleList(_conv(factor * channels, factor * reduced, 1) for factor in _FACTORS[finest:])

    def forward(self, features: Callable[[int], Tensor], scale: int) -> Tensor:
        result: Tensor = self.convs[scale - self.finest](features(scale))
        return result


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _bottleneck(inputs: int, outputs: int, width: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution to at most ``width`` times the outputs, and a 3x3 convolution."""
    middle = min(inputs, width * outputs)
    return nn.Sequential(_conv(inputs, middle, 1), _conv(middle, outputs, 3, stride))


def _exit(channels: int, num_classes: int) -> nn.Sequential:
    """The classifier: two convolutions with stride 2, the mean over what is left, and a linear layer."""
    convs = (_conv(channels, _EXIT_CHANNELS, 3, 2), _conv(_EXIT_CHANNELS, _EXIT_CHANNELS, 3, 2))
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_EXIT_CHANNELS, num_classes))

"""Narrow modules: leading slices of the channels of wider ones, as slimmable networks have them.

A narrow module holds no parameters. It reads those of the wider module anew in every call, as views: a slice of
channels is a stride. Gradients therefore reach the wider parameters, and are zero outside of the slice. Statistics
of a batch differ from width to width, so the running ones are the module's own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .conv import Conv
from .layer import Layer, build_layer
from .parameters import BatchNormModule, BranchConv, BranchLinear, BranchModule, BranchNorm, ConvNorm
from .spec import LayerSpec
from .submodules import prepare_to_read


class Narrow(BranchModule):
    """Base class, beside the class of the wider module.

    Attributes:
        source: The network and the path in it of the wider module, which is looked up in every call: it may be replaced
            or copied. A tuple, so that the network does not become a submodule.
    """

    is_slice = True
    source: tuple[nn.Module, str]

    @property
    def wide(self) -> Any:
        """The wider module."""
        network, path = self.source
        return network.get_submodule(path)

    def reset_parameters(self) -> None:
        """Forget the running statistics; the parameters are those of the wider module."""
        for module in self.children():
            cast("nn.BatchNorm2d", module).reset_running_stats()


class NarrowBatchNorm(nn.BatchNorm2d):
    """A batch norm with running statistics of its own; weight, bias and eps are those of the wider module's.

    Attributes:
        calibrated: Whether the running statistics were computed.
    """

    source: tuple[nn.Module, str]
    channels: tuple[int, int]  # of a branch, and those of them that are normalised here
    calibrated: bool

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self.calibrated = False

    @property
    def weight(self) -> Tensor | None:  # type: ignore[override]
        return self._slice(self._wide.weight)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self._slice(self._wide.bias)

    @property
    def eps(self) -> float:  # type: ignore[override]
        return self._wide.eps

    @property
    def _wide(self) -> nn.BatchNorm2d:
        network, path = self.source
        bn = cast("BatchNormModule", network.get_submodule(path)).bn
        prepare_to_read(bn, nn.BatchNorm2d, nn.SyncBatchNorm)
        return bn

    def _slice(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        all_channels, channels = self.channels
        return tensor.view(-1, all_channels)[:, :channels].reshape(-1)


class NarrowConvNorm(Narrow, ConvNorm):
    """The first input and output channels of each branch of a :class:`ConvNorm`."""

    def weight(self, branches: slice) -> Tensor:
        weight: Tensor = self.wide.weight(branches)
        if weight.dim() == 5:
            return weight[:, : self.channels, : self.in_channels // self.groups]
        weight = weight[:, : self.channels]
        return weight if self.depthwise else weight[:, :, None]  # a depthwise convolution of one channel is dense


class NarrowNorm(Narrow, BranchNorm):
    """The first channels of each branch of a :class:`BranchNorm`."""


class NarrowConv(Narrow, BranchConv):
    """The first input and output channels of each branch of a :class:`BranchConv`."""

    def weight_and_bias(self, branches: slice) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.wide.weight_and_bias(branches)
        bias = None if bias is None else bias[:, : self.channels]
        return weight[:, : self.channels, : self.in_channels], bias


class NarrowLinear(NarrowConv, BranchLinear):
    """The first inputs and outputs of each branch of a :class:`BranchLinear`."""


_NARROW: dict[type[BranchModule], type[Narrow]] = {
    ConvNorm: NarrowConvNorm,
    BranchNorm: NarrowNorm,
    BranchConv: NarrowConv,
    BranchLinear: NarrowLinear,
}


def narrow_layer(
    network: nn.Module, path: str, spec: LayerSpec, in_channels: int, branches: int, replicate: int, *, statistics: bool
) -> Layer:
    """The layer of a narrower spec, with slices of the parameters of a layer of ``network``.

    Args:
        network: The network.
        path: Path of the layer in it.
        spec: The spec of that layer with fewer channels.
        in_channels, branches, replicate: As in :class:`Layer`.
        statistics: Whether its batch norms have running statistics; without, they normalise by those of the batch.

    Raises:
        TypeError: A module in the layer has no slices of channels.
        ValueError: The layer has groups of channels, or fewer channels give it other convolutions.
    """
    wide = cast("Layer", network.get_submodule(path))
    if getattr(spec, "groups", 1) > 1 and not (isinstance(spec, Conv) and spec.groups == spec.channels):
        raise ValueError(f"{path} ({spec}): a convolution in groups has no slices of channels")
    with torch.device("meta"):  # without memory, and without numbers of the random generator
        layer = build_layer(spec, in_channels, branches, replicate)
    _check_same_structure(path, wide, layer)
    for name, module in list(layer.named_modules()):
        if isinstance(module, BranchModule):
            narrow(module, (network, f"{path}.{name}"), statistics=statistics)
    return layer


def narrow(module: BranchModule, source: tuple[nn.Module, str], *, statistics: bool) -> None:
    """Let a module read slices of a wider one, in place; arguments as of :func:`narrow_layer`.

    Raises:
        TypeError: Modules of this class have no slices of channels.
    """
    kind = _NARROW.get(type(module))
    if kind is None:
        known = ", ".join(known.__name__ for known in _NARROW)
        raise TypeError(
            f"{source[1]}: expected a module with slices of channels ({known}), got {type(module).__name__}"
        )
    network, path = source
    wide = cast("BranchModule", network.get_submodule(path))
    module.__class__ = kind
    module.__dict__["source"] = source
    module._modules.pop("conv", None)
    if isinstance(module, BatchNormModule):
        like = next(wide.parameters(), torch.empty(0))
        # No momentum: the running statistics are those of all batches of a calibration, weighted equally.
        bn = nn.BatchNorm2d(
            module.branches * module.channels,
            momentum=None,
            affine=False,
            track_running_stats=statistics,
            device=like.device,
            dtype=like.dtype,
        )
        del bn.eps, bn._parameters["weight"], bn._parameters["bias"]
        bn.__class__ = NarrowBatchNorm
        bn.__dict__["source"], bn.__dict__["channels"] = source, (wide.channels, module.channels)
        bn.__dict__["calibrated"] = False
        bn.affine = True
        module.bn = bn


def _check_same_structure(path: str, wide: Layer, layer: Layer) -> None:
    """Raise unless two layers have the same modules and both or neither an identity as shortcut."""
    modules = [{name for name, _ in each.named_modules()} for each in (wide, layer)]
    identities = [getattr(each, "identity", None) for each in (wide, layer)]
    if modules[0] != modules[1] or identities[0] != identities[1]:
        raise ValueError(
            f"{path} ({wide.spec}): with so few channels ({layer.spec}) its input and output have equally many, and it "
            "would have another shortcut: expected a larger width"
        )

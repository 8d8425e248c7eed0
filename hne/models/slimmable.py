"""Slimmable channels (Yu et al., ICLR 2019; Yu & Huang, ICCV 2019): one model at several widths.

Width is the second knob of a model, beside the number of leaves: the first leaves are leading slices of the branches,
and a width is a leading slice of the channels of each branch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..executors import FoldedWeightCache, SubtreeExecutor
from ..hierarchy import Hierarchy
from ..layers import BatchNormModule, BranchConv, BranchModule, ConvNorm, Layer
from .narrow import NarrowNetwork

SLIM_ENTRIES = frozenset({"widths"})  # of a model's config, where they apply
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_SKELETONS = 128  # narrow networks without statistics that a model keeps


class Slimmable(FoldedWeightCache):
    """Base class of :class:`HNE`: a model that may compute with fewer channels.

    Attributes:
        widths: The widths for evaluation, in rising order and with 1 as the last; empty if the model is not slimmable.
        narrow: The network of each width below 1, which has its running statistics; only of a slimmable model.
    """

    widths: tuple[float, ...] = ()
    narrow: nn.ModuleList
    hierarchy: Hierarchy
    num_classes: int
    in_channels: int
    frozen_blocks: int

    if TYPE_CHECKING:

        def config(self) -> dict[str, Any]: ...

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Self: ...
        def layers_of_blocks(self) -> list[list[Layer]]: ...
        def executor(self) -> SubtreeExecutor: ...
        def check_images(self, x: Tensor) -> None: ...

    def set_widths_(self, widths: Sequence[float]) -> Self:
        """Make the model slimmable, in place: ``model(x, num_models=n, width=w)`` computes the first channels only.

        At width w, every channel count of the model is multiplied by w, rounded to the nearest and at least 1, as
        :meth:`HNE.from_preset` does. All parameters are leading slices of the model's. In training mode any width from
        0 to 1 is computed, with the statistics of the batch. For inference each width needs running statistics of its
        own, which :meth:`calibrate_widths_` computes; they become part of the ``state_dict``.

        Args:
            widths: Above 0 and at most 1; 1 is added if it is missing. Those of before are forgotten, together with
                their statistics; none at all makes the model an ordinary one.

        Returns:
            The model.

        Raises:
            TypeError: A width is not a number, or a layer has no slices of channels (:class:`Module`, transformers).
            ValueError: A width is out of range, occurs twice, or is so small that a layer would have another shortcut;
                or blocks are frozen.
        """
        chosen = sorted(map(check_width, widths))
        if any(one == other for one, other in itertools.pairwise(chosen)):
            raise ValueError(f"widths must differ, got {', '.join(f'{width:g}' for width in chosen)}")
        if chosen and self.frozen_blocks:
            raise ValueError("widths: a model with frozen blocks cannot be slimmable")
        if chosen and chosen[-1] != 1:
            chosen.append(1.0)
        networks = nn.ModuleList(NarrowNetwork(self, width, statistics=True) for width in chosen[:-1])
        self._modules.pop("narrow", None)
        if networks:
            self.narrow = networks.train(self.training)
        self.widths = tuple(chosen)
        return self

    def at_width(self, width: float | None) -> Self | NarrowNetwork:
        """The network that computes a width: itself for None and 1.

        Raises:
            TypeError: ``width`` is not a number.
            ValueError: It is out of range, or the model is not slimmable; or, for inference, it is not one of
                :attr:`widths`.
            RuntimeError: For inference, its running statistics were not computed.
            SkippedModuleError: A layer has hooks, which run at full width only.
        """
        if width is None:
            return self
        width = check_width(width)
        if width == 1:
            return self
        if not self.widths:
            raise ValueError(f"width: the model is not slimmable, call set_widths_([{width:g}]) first")
        network = self.skeleton(width) if self.training else self._calibrated_network(width)
        network.check_hooks()
        return network

    def _calibrated_network(self, width: float) -> NarrowNetwork:
        """The network of a width below 1 for inference; errors as of :meth:`at_width`."""
        if width not in self.widths:
            known = ", ".join(f"{known:g}" for known in self.widths)
            raise ValueError(
                f"width must be one of {known} for inference, got {width:g}; set_widths_() chooses others, and "
                "calibrate_widths_() computes their batch-norm statistics"
            )
        network = self.narrow_networks()[self.widths.index(width)]
        if not network.calibrated:
            raise RuntimeError(
                f"width {width:g} has no batch-norm statistics yet: call calibrate_widths_(batches) of training images"
            )
        return network

    def narrow_networks(self) -> list[NarrowNetwork]:
        """The network of each width below 1."""
        return cast("list[NarrowNetwork]", list(self.narrow)) if "narrow" in self._modules else []

    def skeleton(self, width: float) -> NarrowNetwork:
        """The network of any width below 1, without running statistics."""
        # Not an attribute that is set: that would count as a change of the network.
        kept: dict[float, NarrowNetwork] = self.__dict__.setdefault("_skeletons", {})
        if width not in kept:
            if len(kept) >= _SKELETONS:
                kept.clear()
            kept[width] = NarrowNetwork(self, width, statistics=False)
        return kept[width]

    def calibrate_widths_(self, batches: Iterable[Tensor]) -> Self:
        """Compute the batch-norm statistics of each width below 1, in place (post-statistics; Yu & Huang 2019).

        The statistics of before are forgotten. Those of full width are the moving averages of training, as in any
        model. To be called after training, and again when parameters have changed.

        Args:
            batches: Training images ``[batch, channels, height, width]`` as for :meth:`HNE.forward`, of at least one
                batch. The statistics are the means of those of all batches, each weighted equally.

        Returns:
            The model.

        Raises:
            ValueError: The model is not slimmable, there is no batch, or a batch does not fit.
        """
        if not self.widths:
            raise ValueError("calibrate_widths_: the model is not slimmable, call set_widths_() first")
        networks = self.narrow_networks()
        training, count = self.training, 0
        for network in networks:
            network.reset_statistics()
        self.train()  # batch norms take the statistics of the batch
        try:
            with torch.no_grad():
                for images in batches:
                    self.check_images(images)
                    for network in networks:
                        self.executor().runner(network)(images, slice(0, self.hierarchy.num_models))
                    count += 1
        finally:
            self.train(training)
        if count == 0:
            raise ValueError("batches: expected at least one batch of images, got none")
        for network in networks:
            network.calibrated = True
        return self

    def slim(self, width: float) -> Self:
        """An ordinary model with copies of the slices that compute ``width``: for export, int8, a server.

        Its config is that of a network with fewer channels, and nothing of it is slimmable any more.

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`at_width` in eval mode, also for an ordinary model.
        """
        if check_width(width) == 1:
            return copy.deepcopy(self).set_widths_([])
        network = self._calibrated_network(float(width))
        config = self.config()
        config["blocks"] = [[layer.spec.scaled(width).config() for layer in block] for block in self.layers_of_blocks()]
        for entry in ("widths", "origin"):
            config.pop(entry, None)
        with torch.device("meta"):
            slim = self.from_config(config)
        like = next(self.parameters())
        slim.to_empty(device=like.device).to(like.dtype)
        with torch.no_grad():
            for name, module in slim.named_modules():
                if isinstance(module, BranchModule):
                    _copy_parameters(module, network.get_submodule(name))
        return slim.train(self.training)

    @contextlib.contextmanager
    def frozen_parameters(self) -> Iterator[Self]:
        """As :meth:`FoldedWeightCache.frozen_parameters`, for all widths."""
        with contextlib.ExitStack() as blocks:
            for network in self.narrow_networks():
                blocks.enter_context(network.frozen_parameters())
            blocks.enter_context(super().frozen_parameters())
            yield self

    def read_modules(self) -> Iterator[nn.Module]:
        narrow = {module for network in self.narrow_networks() for module in network.modules()}
        return (module for module in self.modules() if module not in narrow)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_skeletons"}

    def slim_config(self) -> dict[str, Any]:
        """The entries :data:`SLIM_ENTRIES` of the config."""
        return {"widths": list(self.widths)} if self.widths else {}

    def restore_widths(self, config: dict[str, Any]) -> Self:
        """The inverse of :meth:`slim_config`."""
        return self.set_widths_(config["widths"]) if "widths" in config else self


def check_width(width: float) -> float:
    """A width as a float.

    Raises:
        TypeError, ValueError: It is not a number above 0 and at most 1.
    """
    if not isinstance(width, int | float) or isinstance(width, bool):
        raise TypeError(f"width must be a number, got {width!r}")
    if not 0 < width <= 1:
        raise ValueError(f"width must be above 0 and at most 1, got {width}")
    return float(width)


def _copy_parameters(module: BranchModule, source: Any) -> None:
    """Copy parameters and running statistics of a module of equal channels, which may be a slice."""
    everything = slice(0, module.branches)
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    if isinstance(module, BranchConv):
        weight, bias = source.weight_and_bias(everything)
        pairs = [(module.conv.weight, weight), (module.conv.bias, bias)]
    elif isinstance(module, ConvNorm):
        pairs = [(module.conv.weight, source.weight(everything))]
    if isinstance(module, BatchNormModule):
        module.bn.eps = source.bn.eps
        pairs += [(getattr(module.bn, name), getattr(source.bn, name)) for name in _BATCH_NORM]
    for to, values in pairs:
        if to is not None and values is not None:
            to.copy_(values.reshape(to.shape))

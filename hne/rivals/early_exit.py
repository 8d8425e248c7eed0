"""Networks with early exits: classifiers along one network, each of which needs a part of it only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class EarlyExitNetwork(nn.Module, ABC):
    """Base class of networks with early exits. They are trained and evaluated as an :class:`hne.HNE` is.

    The exits take the place of the members: the first n are computed together, and the answer is that of exit n alone
    (:func:`hne.evaluation.evaluate_exits`). The objective ``I``, a sum of cross-entropies, is the loss that early exits
    are trained with (Teerapittayanon et al. 2016; Huang et al. 2018).

    Args:
        exits: Number of exits.
        num_classes: Number of logits.
        in_channels: Number of channels of the images.
    """

    widths: tuple[float, ...] = ()  # as of an HNE that is not slimmable

    def __init__(self, exits: int, num_classes: int, in_channels: int) -> None:
        check_numbers(exits=exits, num_classes=num_classes, in_channels=in_channels)
        super().__init__()
        self.num_models = exits
        self.num_classes = num_classes
        self.in_channels = in_channels

    @abstractmethod
    def first_exits(self, x: Tensor, count: int) -> Tensor:
        """Logits ``[count, batch, classes]`` of the first exits; what only later ones need is not computed."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The description of the network as a JSON-able dictionary, without weights."""

    def forward(self, x: Tensor, num_models: int | None = None) -> Tensor:
        """Logits of the first exits.

        Args:
            x: Images ``[batch, in_channels, height, width]`` in the dtype of the parameters.
            num_models: Number of exits; all by default. What only later ones need is not computed.

        Returns:
            Logits ``[num_models, batch, num_classes]``.

        Raises:
            ValueError: ``x`` has a wrong rank or number of channels, or ``num_models`` is out of range.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be images [batch, {self.in_channels}, height, width], got shape {tuple(x.shape)}")
        return self.first_exits(x, self._check_exits(num_models))

    def sync_batch_norm_(self) -> None:
        """Raise: batch norms of several processes are not synchronised."""
        raise ValueError("sync_bn: expected off for a network with early exits")

    @abstractmethod
    def macs(self, num_models: int | None = None, input_size: int | tuple[int, int] = (32, 32)) -> int:
        """Multiply-adds of convolutions and linear layers for one image, up to an exit and with all exits before it.

        Args:
            num_models: Number of the exit, from 1; the last one by default.
            input_size: Height and width of the image in pixels, or one number for both.
        """

    def _check_exits(self, count: int | None) -> int:
        """``count``, or the number of all exits for None."""
        if count is None:
            return self.num_models
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= self.num_models:
            raise ValueError(f"num_models must be a number of exits from 1 to {self.num_models}, got {count!r}")
        return count


def check_numbers(**numbers: int) -> None:
    """Raise a ValueError unless all arguments are whole numbers of at least 1."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")

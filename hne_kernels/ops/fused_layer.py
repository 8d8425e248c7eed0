"""A layer with its weights (inference)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import checks
from .fused_bottleneck import check as check_bottleneck
from .fused_bottleneck import fused_bottleneck
from .fused_conv2d import check as check_convolution
from .fused_conv2d import fused_conv2d


class FusedLayer(NamedTuple):
    """A layer with its weights, which calls :func:`fused_conv2d` or :func:`fused_bottleneck`.

    In a sequence, ``source`` and ``residual`` count layers backwards: -1 is the output of the layer before, and the
    input of the sequence counts as the output of a layer before the first. Two basic blocks, the second with a
    convolution as its shortcut::

        [FusedLayer(first), FusedLayer(second, residual=-2)]
        [FusedLayer(shortcut), FusedLayer(first, source=-2), FusedLayer(second, residual=-2)]

    Args:
        weights: the tensors that the op takes after ``x``: two for a convolution, eight for a bottleneck (the last two
            may be None).
        stride, replicate, activation: as in either op.
        padding: as in :func:`fused_conv2d`.
        identity, final_activation: as in :func:`fused_bottleneck`.
        mean: average over each feature map before the convolution, which makes it a linear layer.
        source: the layer whose output is the input.
        residual: the layer whose output is the residual of a convolution, or None.
        residual_replicate: as in :func:`fused_conv2d`.
    """

    weights: tuple[Tensor | None, ...]
    stride: int = 1
    padding: int = 0
    replicate: int = 1
    activation: str = "none"
    final_activation: str = "none"
    identity: bool = False
    mean: bool = False
    source: int = -1
    residual: int | None = None
    residual_replicate: int = 1

    @property
    def is_bottleneck(self) -> bool:
        return len(self.weights) == 8

    @property
    def op(self) -> str:
        """Name of the op."""
        return "fused_bottleneck" if self.is_bottleneck else "fused_conv2d"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the op after x, in order, but for those of a residual."""
        if self.is_bottleneck:
            return *self.weights, self.stride, self.replicate, self.activation, self.identity, self.final_activation
        return *self.weights, self.stride, self.padding, self.replicate, self.activation

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that the op takes after the weights, by name."""
        common = {"stride": self.stride, "replicate": self.replicate, "activation": self.activation}
        if self.is_bottleneck:
            return common | {"identity": self.identity, "final_activation": self.final_activation}
        return common | {"padding": self.padding, "residual_replicate": self.residual_replicate}

    def select_branches(self, branches: slice, replicate: int, residual_replicate: int = 1) -> FusedLayer:
        """Some branches of the layer, with ``replicate`` output branches per branch of the input and
        ``residual_replicate`` per branch of the residual; views of its weights."""
        weights = tuple(None if weight is None else weight[branches] for weight in self.weights)
        return self._replace(weights=weights, replicate=replicate, residual_replicate=residual_replicate)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the layer for features ``[G, B, H, W, C]`` and, for a convolution, a residual."""
        op: Callable[..., Tensor] = fused_bottleneck if self.is_bottleneck else fused_conv2d
        if residual is None:
            if self.residual is not None:
                raise ValueError("residual: expected the output of the layer that this one names, got None")
            return op(self.pool(x), *self.weights, **self.options)
        return op(self.pool(x), *self.weights, residual=residual, **self.options)

    def pool(self, x: Tensor) -> Tensor:
        """The mean over each feature map, if the layer reads that, else ``x``."""
        return x.mean((2, 3), keepdim=True) if self.mean else x

    def check(self, x: Tensor, residual: Tensor | None = None) -> tuple[int, ...]:
        """Raise unless the layer fits features and a residual like these; return the shape of its output."""
        if len(self.weights) not in (2, 8):
            raise ValueError(
                f"weights: expected two of a convolution or eight of a bottleneck, got {len(self.weights)}"
            )
        checks.at_least("stride", self.stride, 1)
        checks.at_least("padding", self.padding, 0)
        checks.at_least("replicate", self.replicate, 1)
        checks.at_least("residual_replicate", self.residual_replicate, 1)
        if self.mean:
            x = x.new_empty(()).expand(*x.shape[:2], 1, 1, x.shape[4])
        check: Callable[..., tuple[int, ...]] = check_bottleneck if self.is_bottleneck else check_convolution
        if self.residual is None:
            return check(x, *self.arguments)
        if self.is_bottleneck:
            raise ValueError(f"residual: expected None for a bottleneck, which has its own, got {self.residual}")
        return check(x, *self.arguments, residual, self.residual_replicate)


def select_branches(layers: Sequence[FusedLayer], branches: slice, replicate: int) -> list[FusedLayer]:
    """Some branches of consecutive layers that read no features of earlier ones; views of their weights.

    Args:
        layers: a part of a sequence, such as the convolutions of a block.
        branches: the same branches of every layer.
        replicate: the number of these per branch of the features that the first layer reads.
    """
    return [
        layer.select_branches(
            branches,
            replicate if index + layer.source == -1 else 1,
            replicate if layer.residual is not None and index + layer.residual == -1 else 1,
        )
        for index, layer in enumerate(layers)
    ]

"""A layer with its weights (inference)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .. import checks
from .branch_normalize import branch_normalize
from .branch_normalize import check as check_normalize
from .fused_bottleneck import check as check_bottleneck
from .fused_bottleneck import fused_bottleneck
from .fused_conv2d import check as check_convolution
from .fused_conv2d import fused_conv2d


class FusedLayer(NamedTuple):
    """A layer with its weights: :func:`fused_conv2d`, :func:`fused_bottleneck`, :func:`branch_normalize` or pooling.

    In a sequence, ``source`` and ``residual`` count layers backwards: -1 is the output of the layer before, and the
    input of the sequence counts as the output of a layer before the first. Two basic blocks, the second with a
    convolution as its shortcut::

        [FusedLayer(first), FusedLayer(second, residual=-2)]
        [FusedLayer(shortcut), FusedLayer(first, source=-2), FusedLayer(second, residual=-2)]

    Args:
        weights: the tensors that the op takes after ``x``: two for a convolution, eight for a bottleneck (the last two
            may be None), one for a normalisation: ``[G', 3, C]``, the rows mean, scale and shift; none for pooling.
        stride, replicate, activation: as in either op; a normalisation has no stride, pooling no activation.
        padding: as in :func:`fused_conv2d`; for pooling at most half of the window, and as in PyTorch.
        identity, final_activation: as in :func:`fused_bottleneck`.
        mean: average over each feature map before the convolution, which makes it a linear layer.
        source: the layer whose output is the input.
        residual: the layer whose output is the residual of a convolution, or None.
        residual_replicate: as in :func:`fused_conv2d`.
        pooling: ``max`` or ``average`` over windows of pixels.
        window: height and width of the windows.
        branches: of the output of pooling.
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
    pooling: str = ""
    window: int = 0
    branches: int = 0

    @property
    def is_bottleneck(self) -> bool:
        return len(self.weights) == 8

    @property
    def is_norm(self) -> bool:
        return len(self.weights) == 1

    @property
    def op(self) -> str:
        """Name of the op."""
        return "fused_bottleneck" if self.is_bottleneck else "branch_normalize" if self.is_norm else "fused_conv2d"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the op after x, in order, but for those of a residual."""
        if self.is_bottleneck:
            return *self.weights, self.stride, self.replicate, self.activation, self.identity, self.final_activation
        if self.is_norm:
            return self._norm, None, None, self.activation
        return *self.weights, self.stride, self.padding, self.replicate, self.activation

    @property
    def _norm(self) -> Tensor:
        (rows,) = self.weights
        assert rows is not None
        return rows.transpose(0, 1)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that the op takes after the weights, by name."""
        if self.is_norm:
            return {"activation": self.activation}
        common = {"stride": self.stride, "replicate": self.replicate, "activation": self.activation}
        if self.is_bottleneck:
            return common | {"identity": self.identity, "final_activation": self.final_activation}
        return common | {"padding": self.padding, "residual_replicate": self.residual_replicate}

    def select_branches(self, branches: slice, replicate: int, residual_replicate: int = 1) -> FusedLayer:
        """Some branches of the layer, with ``replicate`` output branches per branch of the input and
        ``residual_replicate`` per branch of the residual; views of its weights."""
        weights = tuple(None if weight is None else weight[branches] for weight in self.weights)
        layer = self._replace(weights=weights, replicate=replicate, residual_replicate=residual_replicate)
        return layer._replace(branches=branches.stop - branches.start) if self.pooling else layer

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the layer for features ``[G, B, H, W, C]`` and, for a convolution, a residual."""
        x = self.input(x)
        if residual is None and self.residual is not None:
            raise ValueError("residual: expected the output of the layer that this one names, got None")
        if residual is not None and len(self.weights) != 2:
            raise ValueError("residual: expected None, since only convolutions add one; got a tensor")
        if self.pooling:
            return x
        if self.is_norm:
            return branch_normalize(x, self._norm, **self.options)
        op: Callable[..., Tensor] = fused_bottleneck if self.is_bottleneck else fused_conv2d
        return op(x, *self.weights, **self.options, **({} if residual is None else {"residual": residual}))

    def input(self, x: Tensor) -> Tensor:
        """What the op reads of features: with ``mean`` their mean over each feature map; for a normalisation, which
        takes no ``replicate``, a copy for each of its branches. Pooling has no op: this is its output."""
        if self.mean:
            return x.mean((2, 3), keepdim=True)
        if self.pooling:
            maps = x.permute(0, 1, 4, 2, 3)
            pool = F.max_pool2d if self.pooling == "max" else F.avg_pool2d
            pooled = pool(maps.flatten(0, 1), self.window, self.stride, self.padding)
            x = pooled.unflatten(0, maps.shape[:2]).permute(0, 1, 3, 4, 2)
        if (self.is_norm or self.pooling) and self.replicate > 1:
            return x.repeat_interleave(self.replicate, 0)[: self.branches or len(self._norm[0])]
        return x

    def check(self, x: Tensor, residual: Tensor | None = None) -> tuple[int, ...]:
        """Raise unless the layer fits features and a residual like these; return the shape of its output."""
        if len(self.weights) not in ((0,) if self.pooling else (1, 2, 8)):
            expected = (
                "none for pooling"
                if self.pooling
                else "two of a convolution, one of a normalisation or eight of a bottleneck"
            )
            raise ValueError(f"weights: expected {expected}, got {len(self.weights)}")
        checks.at_least("stride", self.stride, 1)
        checks.at_least("padding", self.padding, 0)
        checks.at_least("replicate", self.replicate, 1)
        checks.at_least("residual_replicate", self.residual_replicate, 1)
        if self.mean:
            x = x.new_empty(()).expand(*x.shape[:2], 1, 1, x.shape[4])
        if self.residual is not None and (self.is_bottleneck or self.is_norm or self.pooling):
            kind = "bottleneck, which has its own" if self.is_bottleneck else "normalisation or pooling"
            raise ValueError(f"residual: expected None for a {kind}, got {self.residual}")
        if self.pooling:
            return self._check_pooling(x)
        if self.is_norm:
            return self._check_norm(x)
        check: Callable[..., tuple[int, ...]] = check_bottleneck if self.is_bottleneck else check_convolution
        if self.residual is None:
            return check(x, *self.arguments)
        return check(x, *self.arguments, residual, self.residual_replicate)

    def _check_pooling(self, x: Tensor) -> tuple[int, ...]:
        if self.pooling not in ("max", "average"):
            raise ValueError(f"pooling: expected max or average, got {self.pooling}")
        checks.at_least("window", self.window, 1)
        checks.at_least("branches", self.branches, 1)
        if self.activation != "none":
            raise ValueError(f"activation: expected none for pooling, got {self.activation}")
        if self.padding > self.window // 2:
            raise ValueError(f"padding: expected at most half of the window, {self.window // 2}, got {self.padding}")
        if -(-self.branches // self.replicate) != len(x):
            raise ValueError(
                f"branches: expected those of {len(x)} times replicate {self.replicate}, got {self.branches}"
            )
        height, width = (size + 2 * self.padding - self.window for size in x.shape[2:4])
        if height < 0 or width < 0:
            least, step = self.window - 2 * self.padding, f"/{self.stride}" if self.stride > 1 else ""
            raise ValueError(
                f"{self.pooling} pool {self.window}x{self.window}{step}: expected feature maps of at least "
                f"{least}x{least}, got {x.shape[2]}x{x.shape[3]}"
            )
        return self.branches, x.shape[1], height // self.stride + 1, width // self.stride + 1, x.shape[4]

    def _check_norm(self, x: Tensor) -> tuple[int, ...]:
        (rows,) = self.weights
        if rows is None:
            raise ValueError("weights: expected a tensor [branches, 3, channels], got None")
        checks.rank("weights[0]", rows, 3, "[branches, 3, channels]")
        if -(-len(rows) // self.replicate) != len(x):
            raise ValueError(
                f"weights[0]: expected the branches of {len(x)} times replicate {self.replicate}, got {len(rows)}"
            )
        shape = (len(rows), *x.shape[1:])
        check_normalize(x.new_empty(()).expand(shape), self._norm, None, None, self.activation)
        return shape


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

"""What a layer is (a description, plain data) and the parameters it has in every branch.

A block of a network is a list of descriptions: :class:`Conv`, :class:`Bottleneck`, :class:`PoolLinear`. A description
builds a :class:`Layer`, a module that holds the parameters of all branches and says in which order they are used.
*How* they are computed is the business of an :class:`Execution`: ``naive.py``, ``fused.py``, ``inference.py``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

Size = tuple[int, int]
Features = Any  # what passes between the units of a layer; what it is, is up to the execution

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
}


class Execution(Protocol):
    """How layers are computed. ``branches`` is the range wanted (with ``start`` and ``stop``), ``replicate`` the number
    of children that each branch of ``x`` has among them (the last one may have fewer). What ``x`` looks like is up to
    the execution."""

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        """The batch, or the parts of it that go through the whole network one after the other."""

    def enter(self, image: Tensor) -> Tensor:
        """The features of one branch that are the image ``[batch, channels, height, width]``."""

    def select(self, x: Tensor, samples: Tensor) -> Tensor:
        """The features of some samples of the batch, given by their indices."""

    def block(self, layers: Sequence[Layer], x: Tensor, branches: slice, replicate: int) -> Tensor:
        """Layers one after the other; ``replicate`` is of the first."""

    def unit(
        self,
        unit: Unit,
        x: Features,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Features | None = None,
    ) -> Features:
        """``activation(batch_norm(conv(x)) + residual)``."""

    def first_unit(
        self, unit: Unit, x: Features, branches: slice, replicate: int, activation: str
    ) -> tuple[Features, Features]:
        """``x``, for others to read as well, and the unit that a layer begins with."""
        return x, self.unit(unit, x, branches, replicate, activation)

    def linear(
        self,
        linear: Linear,
        x: Tensor,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
    ) -> Tensor:
        """``activation(linear(x))`` of a 1x1 map."""

    def pool(self, x: Tensor) -> Tensor:
        """Average over the map, leaving a 1x1 map."""

    def replicate(self, x: Tensor, branches: slice, replicate: int, channels: int) -> Tensor:
        """The branches of ``x``, of ``channels`` each, given to their children."""

    def logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int) -> Tensor:
        """Logits ``[leaves, batch, classes]``."""

    def prefix_logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]) -> Tensor:
        """Mean logits of the first ``n`` leaves for each ``n`` of ``sizes``, ``[len(sizes), batch, classes]``."""


class Runner(Protocol):
    """Computes a part of the tree."""

    def __call__(
        self, x: Tensor, leaves: slice, first: int = 0, *, keep: bool = False, sizes: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The nodes that some leaves run through, from block ``first`` on.

        Args:
            x: Features that block ``first`` takes, of the parent of its nodes or of the parents; images for block 0.
            leaves: The first leaves, or one of them alone.
            first: A block, or ``num_blocks`` for the heads alone.
            keep: The features after every block are results as well.
            sizes: For the logits of ensembles instead of the leaves', as in :meth:`HNE.prefix_logits`.

        Returns:
            The features of the blocks that are kept, and the logits ``[leaves, batch, classes]``.
        """


# Parameters -----------------------------------------------------------------------------------------------------------


class Branched(nn.Module):
    """Parameters of several branches, laid out as ``torch.nn`` lays out a grouped convolution."""

    def __init__(self, branches: int, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = branches
        self.in_channels = in_channels
        self.channels = channels

    def part(self, tensor: Tensor, branches: slice) -> Tensor:
        """The wanted branches of a parameter or buffer ``[branches * n, ...]``, as a view ``[len, n, ...]``."""
        tensor = tensor.view(self.branches, -1, *tensor.shape[1:])
        return tensor if branches == slice(0, self.branches) else tensor[branches]


class Unit(Branched):
    """A convolution (dense or depthwise, odd kernel, padded to keep the size) and the batch norm after it."""

    def __init__(
        self,
        branches: int,
        in_channels: int,
        channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        depthwise: bool = False,
    ) -> None:
        super().__init__(branches, in_channels, channels)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = kernel_size // 2
        self.depthwise = depthwise
        self.synchronised = False  # batch statistics over all processes, see HNE.sync_batch_norm_
        self.conv = nn.Conv2d(
            branches * in_channels,
            branches * channels,
            kernel_size,
            stride,
            self.padding,
            groups=branches * channels if depthwise else branches,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(branches * channels)

    def reset_parameters(self) -> None:
        """He et al. 2015, fan out. The fan is that of one branch, a network of its own, not of the grouped whole."""
        filters = 1 if self.depthwise else self.channels
        nn.init.normal_(self.conv.weight, std=(2 / (filters * self.kernel_size**2)) ** 0.5)
        self.bn.reset_parameters()

    def macs(self, size: Size) -> int:
        """Multiply-adds of one branch for one map of ``size``."""
        height, width = strided(size, self.stride)
        inputs = 1 if self.depthwise else self.in_channels
        return height * width * self.channels * inputs * self.kernel_size**2


class Foldable(nn.Module):
    """What the inference path folds: layers, and the model as a whole.

    ``folded`` is where it keeps what is derived from the parameters, ``captured`` what of it CUDA graphs read.
    They are no state: neither saved nor copied. The first are dropped whenever the parameters move or the mode changes.
    While it is ``frozen`` (how many times over), the parameters are taken to be as they were.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.folded: Any = None
        self.captured: list[Any] = []
        self.frozen = 0

    def kept(self) -> Any:
        """What is folded, or None where it is not of the parameters as they are now."""
        folded = self.folded  # another thread may drop it meanwhile
        return folded if folded is not None and (self.frozen or folded.is_current()) else None

    def train(self, mode: bool = True) -> Self:
        self.folded = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.folded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "folded": None, "captured": [], "frozen": 0}

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()
        replica.folded, replica.captured, replica.frozen = None, [], 0
        return replica


class Linear(Foldable, Branched):
    """A linear layer per branch: a 1x1 convolution of 1x1 maps, initialised as ``nn.Linear``."""

    def __init__(self, branches: int, in_channels: int, channels: int) -> None:
        super().__init__(branches, in_channels, channels)
        self.conv = nn.Conv2d(branches * in_channels, branches * channels, 1, groups=branches)

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()

    def macs(self) -> int:
        """Multiply-adds of one branch for one sample."""
        return self.in_channels * self.channels


# Layers ---------------------------------------------------------------------------------------------------------------


class Layer(nn.Module, ABC):
    """The parameters of a described layer, for ``branches`` branches."""

    description: Description

    @abstractmethod
    def forward(self, run: Execution, x: Tensor, branches: slice, replicate: int) -> Features:
        """Compute the wanted ``branches``; ``replicate`` as in :class:`Execution`."""

    @abstractmethod
    def macs(self, size: Size) -> int:
        """Multiply-adds of one branch for one map of ``size``."""

    @abstractmethod
    def output_size(self, size: Size) -> Size:
        """Height and width of the output."""


class ConvLayer(Foldable, Layer):
    def __init__(self, description: Conv, in_channels: int, branches: int) -> None:
        super().__init__()
        self.description: Conv = description
        self.unit = Unit(branches, in_channels, description.channels, description.kernel_size, description.stride)

    def forward(self, run: Execution, x: Tensor, branches: slice, replicate: int) -> Features:
        return run.unit(self.unit, x, branches, replicate, self.description.activation)

    def macs(self, size: Size) -> int:
        return self.unit.macs(size)

    def output_size(self, size: Size) -> Size:
        return strided(size, self.description.stride)


class BottleneckLayer(Foldable, Layer):
    def __init__(self, description: Bottleneck, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__()
        self.description: Bottleneck = description
        d = description
        self.expand = Unit(branches, in_channels, d.middle)
        self.depthwise = Unit(branches, d.middle, d.middle, d.kernel_size, d.stride, depthwise=True)
        self.project = Unit(branches, d.middle, d.channels)
        same_shape = d.stride == 1 and in_channels == d.channels
        projected = d.projection and not (same_shape and replicate == 1)
        self.shortcut = Unit(branches, in_channels, d.channels, 1, d.stride) if projected else None
        self.identity = same_shape and not projected

    def forward(self, run: Execution, x: Tensor, branches: slice, replicate: int) -> Features:
        d = self.description
        x, y = run.first_unit(self.expand, x, branches, replicate, d.activation)
        residual = None
        if self.shortcut is not None:
            residual = run.unit(self.shortcut, x, branches, replicate)
        elif self.identity:
            residual = run.replicate(x, branches, replicate, d.channels)
        y = run.unit(self.depthwise, y, branches, 1, d.activation)
        return run.unit(self.project, y, branches, 1, d.final_activation, residual)

    def macs(self, size: Size) -> int:
        out = strided(size, self.description.stride)
        shortcut = 0 if self.shortcut is None else self.shortcut.macs(size)
        return self.expand.macs(size) + self.depthwise.macs(size) + self.project.macs(out) + shortcut

    def output_size(self, size: Size) -> Size:
        return strided(size, self.description.stride)


class PoolLinearLayer(Layer):
    def __init__(self, description: PoolLinear, in_channels: int, branches: int) -> None:
        super().__init__()
        self.description: PoolLinear = description
        self.linear = Linear(branches, in_channels, description.channels)

    def forward(self, run: Execution, x: Tensor, branches: slice, replicate: int) -> Tensor:
        return run.linear(self.linear, run.pool(x), branches, replicate, self.description.activation)

    def macs(self, size: Size) -> int:
        return self.linear.macs()

    def output_size(self, size: Size) -> Size:
        return (1, 1)


# Descriptions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description(ABC):
    """What is common to the descriptions of layers: ``channels`` is the number of output channels of one branch."""

    channels: int

    counts: ClassVar[tuple[str, ...]] = ("channels",)  # the fields that a width multiplier scales

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            name = f"{type(self).__name__}.{field.name}"
            if field.name in (*self.counts, "stride", "kernel_size"):
                if not isinstance(value, int) or isinstance(value, bool):
                    raise TypeError(f"{name} must be an int, got {value!r}")
                if value < 1:
                    raise ValueError(f"{name} must be at least 1, got {value}")
            if field.name == "kernel_size" and value % 2 == 0:
                raise ValueError(f"{name} must be odd (the padding keeps the size), got {value}")
            if field.name.endswith("activation") and value not in ACTIVATIONS:
                raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")

    @abstractmethod
    def build(self, in_channels: int, branches: int, replicate: int) -> Layer:
        """The layer's parameters for ``branches`` branches that enter it with ``replicate`` children each."""

    def scaled(self, width: float) -> Self:
        """The same layer with every channel count times ``width``, rounded to the nearest and at least 1."""
        scaled = {name: max(1, int(getattr(self, name) * width + 0.5)) for name in self.counts}
        return dataclasses.replace(self, **scaled)

    def config(self) -> dict[str, Any]:
        """JSON-able; :func:`description` reads it."""
        return {"layer": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Conv(Description):
    """Convolution, batch norm, activation.

    Args:
        channels: Output channels per branch.
        kernel_size: Odd; the padding is half of it, so a stride of 1 keeps the size.
        stride: Step in pixels; a map of ``H`` rows gives ``ceil(H / stride)``.
        activation: ``none``, ``relu`` or ``relu6``.
    """

    kernel_size: int = 3
    stride: int = 1
    activation: str = "relu"

    def build(self, in_channels: int, branches: int, replicate: int) -> ConvLayer:
        return ConvLayer(self, in_channels, branches)

    def __str__(self) -> str:
        return f"conv {self.kernel_size}x{self.kernel_size} {self.channels}{_stride(self.stride)}"


@dataclass(frozen=True)
class Bottleneck(Description):
    """1x1 convolution to ``middle`` channels, depthwise convolution (it carries the stride), 1x1 convolution to
    ``channels``; each with batch norm, the first two with ``activation``. Then the shortcut is added, and
    ``final_activation`` follows.

    With the defaults, the layer of HNE-ResNet (Table 2): the shortcut is the identity where the layer changes nothing
    about the shape, and a 1x1 convolution with batch norm where it strides, changes the channels or branches. With
    ``relu6``, no final activation and no projection, MobileNetV2's inverted residual (Table 3): the identity where
    stride and channels allow it, else no shortcut.

    Args:
        channels: Output channels per branch.
        middle: Channels between the two 1x1 convolutions.
        kernel_size: Of the depthwise convolution, odd.
        stride: Of the depthwise convolution, and of a projecting shortcut.
        activation, final_activation: ``none``, ``relu`` or ``relu6``.
        projection: Whether the shortcut is a convolution where it cannot be the identity.
    """

    middle: int
    kernel_size: int = 3
    stride: int = 1
    activation: str = "relu"
    final_activation: str = "relu"
    projection: bool = True

    counts: ClassVar[tuple[str, ...]] = ("channels", "middle")

    def build(self, in_channels: int, branches: int, replicate: int) -> BottleneckLayer:
        return BottleneckLayer(self, in_channels, branches, replicate)

    def __str__(self) -> str:
        return f"bottleneck {self.middle}-{self.channels}{_stride(self.stride)}"


@dataclass(frozen=True)
class PoolLinear(Description):
    """Average over the map, then a linear layer with bias and activation; the output is a 1x1 map.

    Args:
        channels: Output features per branch.
        activation: ``none``, ``relu`` or ``relu6``.
    """

    activation: str = "relu"

    def build(self, in_channels: int, branches: int, replicate: int) -> PoolLinearLayer:
        return PoolLinearLayer(self, in_channels, branches)

    def __str__(self) -> str:
        return f"pool, linear {self.channels}"


_DESCRIPTIONS: dict[str, type[Description]] = {cls.__name__: cls for cls in (Conv, Bottleneck, PoolLinear)}


def description(config: dict[str, Any]) -> Description:
    """The layer that :meth:`Description.config` wrote down.

    Raises:
        ValueError: An unknown layer, or an unknown or missing field.
    """
    fields = dict(config)
    name = fields.pop("layer", None)
    if name not in _DESCRIPTIONS:
        raise ValueError(f"layer must be one of {', '.join(_DESCRIPTIONS)}, got {name!r}")
    try:
        return _DESCRIPTIONS[name](**fields)
    except TypeError as error:
        raise ValueError(f"not the description of a {name}: {config} ({error})") from error


def units(module: nn.Module) -> Iterator[Unit | Linear]:
    """Everything with parameters inside ``module``, in order."""
    return (child for child in module.modules() if isinstance(child, Unit | Linear))


def strided(size: Size, stride: int) -> Size:
    """Height and width after a padded convolution with ``stride``."""
    height, width = size
    return -(-height // stride), -(-width // stride)


def _stride(stride: int) -> str:
    return f"/{stride}" if stride > 1 else ""

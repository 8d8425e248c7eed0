"""Parameters of several branches, laid out as ``torch.nn`` lays out a grouped convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from .submodules import CALLED_BY_NAIVE, SkippedModuleError, check_never_called, detach_recomputed, prepare_to_read

Size = tuple[int, int]  # height and width in pixels


class BranchModule(nn.Module, ABC):
    """Base class of modules with the parameters of several branches of equal shape.

    An executor reads the parameters and computes the operation: the module is never called. Its submodules are not
    called either, except by ``NaiveExecutor`` when all branches are computed.

    Args:
        branches: Number of branches.
        in_channels, channels: Input and output channels of one branch.

    Attributes:
        is_slice: Whether the parameters are slices of another module's (:mod:`hne.layers.narrow`).
    """

    is_slice: ClassVar[bool] = False

    def __init__(self, branches: int, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = branches
        self.in_channels = in_channels
        self.channels = channels

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise the parameters and running statistics anew."""

    def select_branches(self, tensor: Tensor, branches: slice) -> Tensor:
        """Some branches of a parameter or buffer ``[all branches * n, ...]``, as a view ``[len(branches), n, ...]``."""
        tensor = tensor.view(self.branches, -1, *tensor.shape[1:])
        return tensor if branches == slice(0, self.branches) else tensor[branches]

    def check_hooks(self) -> None:
        """Raise if this module has hooks.

        Raises:
            SkippedModuleError: It has hooks, which would never run.
        """
        check_never_called(self, "register the hook on the layer or the model")

    def __getstate__(self) -> dict[str, Any]:
        for module in self.children():
            detach_recomputed(module)
        return self.__dict__.copy()


def called_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all below it, except for those whose parameters are read: each :class:`BranchModule` and its
    submodules."""
    if not isinstance(module, BranchModule):
        yield module
        for child in module.children():
            yield from called_modules(child)


def convolved(size: Size, kernel_size: int, stride: int, padding: int) -> Size:
    """Height and width after a convolution or a pooling."""
    height, width = ((side + 2 * padding - kernel_size) // stride + 1 for side in size)
    return height, width


def _check_conv(conv: nn.Module, expected: tuple[Any, ...]) -> None:
    """Raise unless a convolution has the expected settings; bring its weight up to date.

    Args:
        conv: The convolution.
        expected: Kernel size, stride, padding, dilation, groups, padding mode, and whether there is a bias.
    """
    prepare_to_read(conv, nn.Conv2d)
    has_bias = conv._parameters.get("bias", conv) is not None  # without an entry if the bias is computed
    got = (
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.padding_mode,
        has_bias,
    )
    if got != expected:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "bias")
        pairs = zip(names, expected, got, strict=True)
        changes = "; ".join(f"{name}={want!r}, got {value!r}" for name, want, value in pairs if want != value)
        raise SkippedModuleError(conv, f"expected a convolution with {changes}. {CALLED_BY_NAIVE}")


def check_own_parameters(module: nn.Module) -> None:
    """Raise if a parameter is computed from others: a new value would be lost."""
    for name in ("weight", "bias"):
        if name not in module._parameters and hasattr(module, name):
            reason = f"reset_parameters() cannot initialise a pruned or parametrized {name}: remove that first"
            raise SkippedModuleError(module, reason)


def _initialise_as_he(conv: nn.Conv2d, filters: int) -> None:
    """Draw the weight as He et al. (2015), fan out; ``filters`` are those of one branch that read an input channel."""
    check_own_parameters(conv)
    nn.init.normal_(conv.weight, std=(2 / (filters * conv.kernel_size[0] * conv.kernel_size[1])) ** 0.5)


class BatchNormModule(BranchModule):
    """Base class of modules with a batch norm ``bn`` over the channels of all branches.

    Attributes:
        synchronised: Whether batch statistics are over all processes, see :meth:`HNE.sync_batch_norm_`.
    """

    bn: nn.BatchNorm2d

    def __init__(self, branches: int, in_channels: int, channels: int) -> None:
        super().__init__(branches, in_channels, channels)
        self.synchronised = False

    def reset_parameters(self) -> None:
        check_own_parameters(self.bn)
        self.bn.reset_parameters()


class BranchNorm(BatchNormModule):
    """A batch norm of features that no convolution has just computed.

    Args:
        branches: As in :class:`BranchModule`.
        channels: Channels of one branch.
    """

    def __init__(self, branches: int, channels: int) -> None:
        super().__init__(branches, channels, channels)
        self.bn = nn.BatchNorm2d(branches * channels)


class ConvNorm(BatchNormModule):
    """A convolution without bias, followed by batch norm.

    Args:
        branches, in_channels, channels: As in :class:`BranchModule`.
        kernel_size, stride: As in ``nn.Conv2d``.
        padding: Rows and columns of zeros on each side; by default half of the kernel size, with which a stride of 1
            and an odd kernel keep height and width.
        groups: Groups within a branch.
        depthwise: Each channel has a filter of its own, as with as many groups as input and output channels.

    Raises:
        ValueError: ``groups`` do not divide the channels.
    """

    def __init__(
        self,
        branches: int,
        in_channels: int,
        channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        *,
        groups: int = 1,
        depthwise: bool = False,
    ) -> None:
        super().__init__(branches, in_channels, channels)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = kernel_size // 2 if padding is None else padding
        if in_channels % groups or channels % groups:
            raise ValueError(
                f"groups must divide the input and output channels of a branch, got {groups} groups of {in_channels} "
                f"and {channels} channels"
            )
        self.depthwise = depthwise or 1 < groups == in_channels == channels
        self.groups = 1 if self.depthwise else groups
        self.conv = nn.Conv2d(
            branches * in_channels,
            branches * channels,
            kernel_size,
            stride,
            self.padding,
            groups=branches * (channels if self.depthwise else groups),
            bias=False,
        )
        self.bn = nn.BatchNorm2d(branches * channels)

    def reset_parameters(self) -> None:
        """Initialise as He et al. (2015), fan out. The fan counts one branch, since each branch belongs to a network of
        its own."""
        _initialise_as_he(self.conv, 1 if self.depthwise else self.channels // self.groups)
        super().reset_parameters()

    def weight(self, branches: slice) -> Tensor:
        """Filters of some branches: ``[len(branches), channels, in_channels // groups, k, k]``, or
        ``[len(branches), channels, k, k]`` if depthwise.

        Raises:
            SkippedModuleError: ``conv`` was replaced by another kind of module, or has hooks.
        """
        self.check_hooks()
        size, stride, padding = self.kernel_size, self.stride, self.padding
        groups = self.branches * (self.channels if self.depthwise else self.groups)
        conv = self.conv
        _check_conv(conv, ((size, size), (stride, stride), (padding, padding), (1, 1), groups, "zeros", False))
        weight = self.select_branches(conv.weight, branches)
        return weight.squeeze(2) if self.depthwise else weight

    def output_size(self, size: Size) -> Size:
        """Height and width of the output."""
        return convolved(size, self.kernel_size, self.stride, self.padding)

    def macs(self, size: Size) -> int:
        """Multiply-adds of one branch for one input of ``size``."""
        height, width = self.output_size(size)
        inputs = 1 if self.depthwise else self.in_channels // self.groups
        return height * width * self.channels * inputs * self.kernel_size**2


class BranchConv(BranchModule):
    """A dense convolution, by default with a bias.

    With a bias it is initialised as ``nn.Conv2d``; without one it belongs to a network with batch norms, and is
    initialised as a :class:`ConvNorm`.

    Args:
        branches, in_channels, channels: As in :class:`BranchModule`.
        kernel_size, stride, padding, bias: As in ``nn.Conv2d``.
    """

    def __init__(
        self,
        branches: int,
        in_channels: int,
        channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(branches, in_channels, channels)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.has_bias = bias
        self.conv = nn.Conv2d(
            branches * in_channels, branches * channels, kernel_size, stride, padding, groups=branches, bias=bias
        )

    def reset_parameters(self) -> None:
        if self.has_bias:
            check_own_parameters(self.conv)
            self.conv.reset_parameters()
        else:
            _initialise_as_he(self.conv, self.channels)

    def weight_and_bias(self, branches: slice) -> tuple[Tensor, Tensor | None]:
        """Weight ``[len(branches), channels, in_channels, k, k]`` and bias ``[len(branches), channels]`` or None of
        some branches.

        Raises:
            SkippedModuleError: ``conv`` was replaced by another kind of module, or has hooks.
        """
        self.check_hooks()
        size, stride, padding = self.kernel_size, self.stride, self.padding
        conv = self.conv
        settings = (size, size), (stride, stride), (padding, padding), (1, 1), self.branches, "zeros", self.has_bias
        _check_conv(conv, settings)
        bias = None if conv.bias is None else self.select_branches(conv.bias, branches)
        return self.select_branches(conv.weight, branches), bias

    def output_size(self, size: Size) -> Size:
        """Height and width of the output."""
        return convolved(size, self.kernel_size, self.stride, self.padding)

    def macs(self, size: Size) -> int:
        """Multiply-adds of one branch for one input of ``size``."""
        height, width = self.output_size(size)
        return height * width * self.channels * self.in_channels * self.kernel_size**2


class BranchLinear(BranchConv):
    """A linear layer per branch, stored as a 1x1 convolution."""

    def __init__(self, branches: int, in_channels: int, channels: int) -> None:
        super().__init__(branches, in_channels, channels)

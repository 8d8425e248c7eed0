"""Pre-activation blocks: the layers of a WideResNet."""

from __future__ import annotations

from dataclasses import dataclass

from .executor import Executor, Features
from .layer import Layer
from .parameters import BranchConv, BranchNorm, ConvNorm, Size
from .spec import LayerSpec, check_odd, stride_text


@dataclass(frozen=True)
class PreActivation(LayerSpec):
    """A residual block whose batch norms and activations come before the convolutions (Zagoruyko & Komodakis, BMVC
    2016): ``conv2(act(bn2(conv1(act(bn1(x)))))) + shortcut``.

    The shortcut is a 1x1 convolution without batch norm of ``act(bn1(x))`` if the layer strides or changes the
    channels, else ``x``. A :class:`Norm` follows the last such block.

    Args:
        channels: Output channels per branch.
        kernel_size: Kernel size of both convolutions, odd.
        stride: Stride of the first convolution and of a projecting shortcut.
        activation: A name of :data:`hne.layers.ACTIVATIONS`.
    """

    kernel_size: int = 3
    stride: int = 1
    activation: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("PreActivation.kernel_size", self.kernel_size)

    def __str__(self) -> str:
        return f"pre-activation {self.channels}{stride_text(self.stride)}"


class PreActivationLayer(Layer, spec=PreActivation):
    """Implements :class:`PreActivation`.

    The first batch norm takes the statistics of a sum, which no kernel computes while it writes the sum: both the sum
    and its statistics are PyTorch's. The kernels normalise it where the first convolution reads it.
    """

    spec: PreActivation

    def __init__(self, spec: PreActivation, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        self.norm = BranchNorm(branches, in_channels)
        self.first = ConvNorm(branches, in_channels, spec.channels, spec.kernel_size, spec.stride)
        shape = branches, spec.channels, spec.channels, spec.kernel_size
        self.second = BranchConv(*shape, padding=spec.kernel_size // 2, bias=False)
        same_shape = spec.stride == 1 and in_channels == spec.channels
        shortcut = None if same_shape else BranchConv(branches, in_channels, spec.channels, 1, spec.stride, bias=False)
        self.shortcut = shortcut

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        activation = self.spec.activation
        residual = executor.replicate(x, branches, replicate, self.norm.channels)  # each child has its own batch norm
        z = executor.norm(self.norm, residual, branches, activation)
        if self.shortcut is None:
            y = executor.conv_norm(self.first, z, branches, 1, activation)
        else:
            z, y = executor.entry_conv(self.first, z, branches, 1, activation)
            residual = executor.conv(self.shortcut, z, branches)
        return executor.conv(self.second, y, branches, residual=residual)

    def macs(self, size: Size) -> int:
        shortcut = 0 if self.shortcut is None else self.shortcut.macs(size)
        return self.first.macs(size) + self.second.macs(self.output_size(size)) + shortcut

    def output_size(self, size: Size) -> Size:
        return self.first.output_size(size)

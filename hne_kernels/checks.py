"""Checks of arguments. An error names the argument, the expected value and the given one.

The checks run before a kernel touches memory, on every backend, and return the shape of the output, which the fake
implementations (shape inference under ``torch.compile`` and ``torch.export``) use, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6")
PANEL = 16  # output channels in a panel of a packed weight

NO_GRADIENT = "{} is for inference and has no gradient: call it under torch.no_grad(), or use the unfused ops"
CONV_INPUT = "[branches, batch, height, width, channels]"


def rank(name: str, tensor: Tensor, dims: int, layout: str) -> None:
    """Raise unless ``tensor`` has ``dims`` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(tensor).__name__}")
    if tensor.dim() != dims:
        raise ValueError(
            f"{name}: expected {dims} dimensions {layout}, got {tensor.dim()} with shape {tuple(tensor.shape)}"
        )


def shape(name: str, tensor: Tensor, expected: Sequence[int], layout: str) -> None:
    """Raise unless ``tensor`` has exactly the expected shape."""
    rank(name, tensor, len(expected), layout)
    if any(got != want for got, want in zip(tensor.shape, expected, strict=True)):
        raise ValueError(f"{name}: expected shape {tuple(expected)} {layout}, got {tuple(tensor.shape)}")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast for this kind of device, or None where autocast is off."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def same_kind(reference: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise unless all tensors share the device and (outside autocast) the floating dtype of the first."""
    if not first.is_floating_point():
        raise TypeError(f"{reference}: expected a floating-point tensor, got {first.dtype}")
    mixed = autocast_dtype(first.device.type) is not None
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected to be on the device of {reference}, {first.device}, got {tensor.device}"
            )
        if tensor.dtype != first.dtype and not (mixed and tensor.is_floating_point()):
            raise TypeError(f"{name}: expected the dtype of {reference}, {first.dtype}, got {tensor.dtype}")


def at_least(name: str, value: int, minimum: int) -> None:
    """Raise unless ``value`` is a whole number that is not below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if torch._C._get_tracing_state() is not None and isinstance(value, Tensor):
            return  # torch.jit.trace has tensors in place of sizes
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def activation(name: str, value: str) -> None:
    """Raise unless ``value`` names an activation."""
    if value not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(ACTIVATIONS)}, got {value!r}")


def check_branches(x: Tensor, weight: Tensor, replicate: int) -> None:
    """Raise unless ``weight`` has ``replicate`` branches, the children, for every branch of ``x``.

    The last branch of ``x`` may have fewer children: that is a leading slice of the tree.
    """
    at_least("replicate", replicate, 1)
    parents, children = x.shape[0], weight.shape[0]
    if not (parents - 1) * replicate < children <= parents * replicate and (parents or children):
        raise ValueError(
            f"weight: expected {parents * replicate} branches ({parents} of x times replicate {replicate}, or "
            f"fewer children of the last one), got {children}"
        )


def geometry(
    x: Tensor, branches: int, out_channels: int, kernel_size: int, stride: int, padding: int
) -> tuple[int, int, int, int, int]:
    """Check stride, padding and size of a convolution of ``x``; return the output shape ``[G', B, H', W', C_out]``."""
    at_least("stride", stride, 1)
    at_least("padding", padding, 0)
    _, batch, height, width, _ = x.shape
    # Two comparisons, as min() would make torch.compile specialise on the shorter side.
    if height + 2 * padding < kernel_size or width + 2 * padding < kernel_size:
        raise ValueError(
            f"x: expected at least {kernel_size - 2 * padding} rows and columns for a {kernel_size}x{kernel_size} "
            f"kernel with padding {padding}, got {height}x{width}"
        )
    rows = (height + 2 * padding - kernel_size) // stride + 1
    columns = (width + 2 * padding - kernel_size) // stride + 1
    return branches, batch, rows, columns, out_channels


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    replicate: int,
    *,
    depthwise: bool,
) -> tuple[int, int, int, int, int]:
    """Check the arguments of a branch convolution and return its output shape ``[G', B, H', W', C_out]``."""
    layout = "[out_branches, channels, k, k]"
    if not depthwise:
        layout = "[out_branches, out_channels, in_channels, k, k]"
    rank("x", x, 5, CONV_INPUT)
    rank("weight", weight, 4 if depthwise else 5, layout)
    same_kind("x", x, weight=weight, bias=bias)
    branches, channels, kernel_size = weight.shape[0], x.shape[4], weight.shape[-1]
    if weight.shape[-2] != kernel_size or kernel_size < 1:
        raise ValueError(f"weight: expected a square kernel of at least 1x1, got shape {tuple(weight.shape)}")
    check_branches(x, weight, replicate)
    in_channels = weight.shape[1] if depthwise else weight.shape[2]
    if in_channels != channels:
        raise ValueError(
            f"weight: expected {channels} input channels as x has, got {in_channels} in shape {tuple(weight.shape)}"
        )
    out_channels = weight.shape[1]
    if bias is not None:
        shape("bias", bias, (branches, out_channels), "[out_branches, out_channels]")
    return geometry(x, branches, out_channels, kernel_size, stride, padding)


def pointwise(name: str, weight: Tensor) -> None:
    """Raise unless ``weight`` has 1x1 filters."""
    rank(name, weight, 5, "[branches, out_channels, in_channels, 1, 1]")
    if weight.shape[3:] != (1, 1):
        raise ValueError(f"{name}: expected a 1x1 kernel, got shape {tuple(weight.shape)}")


def convolution_gradient(
    grad: Tensor,
    branches: int,
    out_channels: int,
    height: int,
    width: int,
    kernel_size: int,
    stride: int,
    padding: int,
    replicate: int,
) -> None:
    """Raise unless ``grad`` has the output shape of a convolution of ``height`` x ``width`` feature maps."""
    rank("grad", grad, 5, CONV_INPUT)
    for name, value in (("stride", stride), ("replicate", replicate), ("kernel_size", kernel_size)):
        at_least(name, value, 1)
    at_least("padding", padding, 0)
    rows = (height + 2 * padding - kernel_size) // stride + 1
    columns = (width + 2 * padding - kernel_size) // stride + 1
    shape("grad", grad, (branches, grad.shape[1], rows, columns, out_channels), CONV_INPUT)


def packed(name: str, weight: Tensor, bias_name: str, bias: Tensor, channels: int) -> int:
    """Check a packed weight (any square kernel) and its bias; return the number of output channels."""
    layout = f"[out_branches, panels, k, k, in_channels, {PANEL}] (packed by pack_weight)"
    rank(name, weight, 6, layout)
    rank(bias_name, bias, 2, "[out_branches, out_channels]")
    branches, out_channels, kernel_size = weight.shape[0], bias.shape[1], weight.shape[2]
    panels = -(-out_channels // PANEL)
    shape(name, weight, (branches, panels, kernel_size, kernel_size, channels, PANEL), layout)
    shape(bias_name, bias, (branches, out_channels), "[out_branches, out_channels]")
    return out_channels


def no_gradient(op: str, *tensors: Tensor | None) -> None:
    """Raise if autograd would record an op for inference."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(NO_GRADIENT.format(op))


def prefix_sizes(sizes: Sequence[int] | None, num_models: int) -> list[int]:
    """Check the sizes of ensembles, which rise from 1 to ``num_models``; the default is :func:`default_sizes`."""
    if sizes is None:
        return list(default_sizes(num_models))
    sizes = list(sizes)
    if not sizes:
        raise ValueError("sizes: expected at least one ensemble size, got none")
    for size in sizes:
        at_least("sizes", size, 1)
    if any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"sizes: expected strictly rising ensemble sizes, got {sizes}")
    if sizes[-1] > num_models:
        raise ValueError(f"sizes: expected at most {num_models}, the number of models, got {sizes[-1]}")
    return sizes


def default_sizes(num_models: int) -> tuple[int, ...]:
    """Sizes of the ensembles in reports and distillation: 1, 2, 4, ... below ``num_models``, then ``num_models``."""
    at_least("num_models", num_models, 1)
    sizes = []
    size = 1
    while size < num_models:
        sizes.append(size)
        size *= 2
    return (*sizes, num_models)

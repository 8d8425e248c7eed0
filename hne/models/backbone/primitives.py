"""Single modules of ``torch.nn`` as parts of layers: their settings, and their tensors by the names of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...layers import has_hooks

Tensors = dict[str, Tensor]

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Unconvertible(Exception):
    """A module is not exactly a layer of :mod:`hne.layers`; the message says why."""


def require(condition: bool, reason: str) -> None:
    """Raise :class:`Unconvertible` unless a condition holds; ``reason`` says what the module has instead."""
    if not condition:
        raise Unconvertible(reason)


def plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes, no subclass, without hooks and without a ``forward`` of its own."""
    return type(module) in kinds and not has_hooks(module) and "forward" not in module.__dict__


def activation_name(module: nn.Module) -> str | None:
    """The name of an activation in specs; None for another module."""
    if not plain(module, *_ACTIVATIONS) or getattr(module, "approximate", "none") != "none":
        return None
    return _ACTIVATIONS[type(module)]


def is_nothing(module: nn.Module) -> bool:
    """Whether a module returns its input, in training too: an identity, or dropout of probability 0."""
    if has_hooks(module) or "forward" in module.__dict__:
        return False
    if type(module).__name__ in ("StochasticDepth", "DropPath"):
        return not getattr(module, "p", getattr(module, "drop_prob", 1.0))
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return all(is_nothing(child) for child in module)
    return type(module) is nn.Identity or (type(module) in _DROPOUTS and getattr(module, "p", 1.0) == 0)


def conv_settings(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Kernel size, stride, padding and groups of a convolution.

    Raises:
        Unconvertible: It is no ``nn.Conv2d``, or not the same in both directions, or has dilation or no zero padding.
    """
    require(plain(conv, nn.Conv2d), f"{type(conv).__name__} in place of a convolution")
    require(conv.dilation == (1, 1), f"dilation {conv.dilation[0]}")
    require(conv.padding_mode == "zeros", f"padding_mode {conv.padding_mode}")
    padding: Any = conv.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        require(all(size % 2 == 1 for size in conv.kernel_size), "padding 'same' of an even kernel")
        padding = tuple(size // 2 for size in conv.kernel_size)
    for name, pair in (("kernel_size", conv.kernel_size), ("stride", conv.stride), ("padding", padding)):
        require(pair[0] == pair[1], f"{name} {tuple(pair)}")
    return conv.kernel_size[0], conv.stride[0], padding[0], conv.groups


def norm_with_activation(module: Any) -> tuple[Any, str]:
    """A batch norm, and the activation within it (``BatchNormAct2d`` of timm).

    Raises:
        Unconvertible: It is no batch norm, or one with other settings than those of ``nn.BatchNorm2d``.
    """
    activation: str | None = "none"
    if type(module).__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d) and not has_hooks(module):
        require(is_nothing(module._modules.get("drop") or nn.Identity()), "dropout within a norm")
        act = module._modules.get("act") or nn.Identity()
        activation = activation_name(act)
        require(activation is not None, f"the activation {type(act).__name__}")
    else:
        require(plain(module, nn.BatchNorm2d, nn.BatchNorm1d), f"{type(module).__name__} in place of a batch norm")
    require(module.eps == 1e-5, f"eps {module.eps:g}")
    require(module.momentum == 0.1, f"momentum {module.momentum}")
    require(module.affine, "a batch norm without scale")
    require(module.track_running_stats and module.running_mean is not None, "a batch norm without running statistics")
    return module, activation or "none"


def unit_tensors(name: str, conv: Any, bn: Any) -> Tensors:
    """The tensors of a ``ConvNorm``. A bias before batch norm only shifts the mean: it goes into the running mean, and
    has no gradient in training."""
    weight = conv.weight
    mean = bn.running_mean if conv.bias is None else bn.running_mean - conv.bias.detach()
    return {
        f"{name}.conv.weight": weight,
        f"{name}.bn.weight": bn.weight,
        f"{name}.bn.bias": bn.bias,
        f"{name}.bn.running_mean": mean,
        f"{name}.bn.running_var": bn.running_var,
        f"{name}.bn.num_batches_tracked": bn.num_batches_tracked,
    }


def conv_tensors(name: str, conv: Any) -> Tensors:
    """The tensors of a convolution or linear layer."""
    bias = {} if conv.bias is None else {f"{name}.conv.bias": conv.bias}
    return {f"{name}.conv.weight": conv.weight} | bias


def linear_tensors(name: str, linear: Any) -> Tensors:
    """The tensors of a linear layer, which layers store as a 1x1 convolution."""
    require(isinstance(linear, nn.Linear), f"{type(linear).__name__} in place of a linear layer")
    require(linear.bias is not None, "a linear layer without bias")
    return conv_tensors(name, linear)


def layer_norm_tensors(name: str, norm: nn.LayerNorm) -> Tensors:
    """The tensors of a layer norm."""
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def batch_norm_tensors(name: str, bn: Any) -> Tensors:
    """The tensors of a batch norm."""
    keys = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{name}.{key}": getattr(bn, key) for key in keys}


def detached(tensors: Tensors) -> Tensors:
    """Copies of tensors, independent of the backbone; they require gradients where the originals do."""
    return {name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}

"""Compares converted layers, the stages and the whole ensemble with the backbone, on random numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BackboneError
from ...executors import NaiveExecutor
from ...layers import LayerSpec, build_layer
from .cut import Shape, TracedUnit
from .units import evaluating

_TOLERANCE = 1e-5  # of two computations of one network, relative to the largest logit


def computes_the_same(spec: LayerSpec, tensors: dict[str, Tensor], module: nn.Module, shape: Shape) -> str:
    """Whether a layer of one branch computes the same as a module.

    Both are compared in float64: in eval mode, in training mode, and once more in eval mode, where the running
    statistics count that the training step has updated.

    Returns:
        "" if they agree, else the difference in words.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = len(shape) == 3
    channels = shape[2] if tokens else shape[1]
    with torch.random.fork_rng(devices=[]):
        layer = build_layer(spec, channels, 1, 1)
    layer.load_state_dict({name: tensors[name].reshape(value.shape) for name, value in layer.state_dict().items()})
    layer, module = layer.double(), copy.deepcopy(module).cpu().double()
    executor = NaiveExecutor()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for training in (False, True, False):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            maps = x.transpose(1, 2)[..., None] if tokens else x.view(*shape, *[1] * (4 - len(shape)))
            y = layer.train(training)(executor, maps, slice(0, 1), 1)
            try:
                expected = module.train(training)(x.clone())
            except Exception as error:
                return f"cannot be compared ({type(error).__name__})"
            y = y[..., 0].transpose(1, 2) if expected.dim() == 3 else y.reshape(expected.shape)
            if y.shape != expected.shape or not torch.allclose(y, expected, rtol=1e-6, atol=1e-9):
                return f"computes something else in {'training' if training else 'eval'} mode"
    return ""


@torch.no_grad()
def check_stages(net: nn.Module, units: Sequence[TracedUnit], head: nn.Module, image: Shape) -> tuple[Tensor, Tensor]:
    """Check that the units, one after the other, and the head compute what the network computes.

    Returns:
        Random images, and the network's logits for them in eval mode.

    Raises:
        BackboneError: They differ, or the network does not compute logits ``[batch, classes]``.
    """
    parameter = next(net.parameters())
    x = torch.randn(2, *image, generator=torch.Generator().manual_seed(0), dtype=parameter.dtype).to(parameter.device)
    read: list[Tensor] = []  # the input of the head
    hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with evaluating(net):
        try:
            logits = net(x.clone())
        finally:
            hook.remove()
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise BackboneError(f"backbone: expected logits [batch, classes] from {type(net).__name__}, got {got}")
        y: Any = x.clone()
        for step in units:
            y = (copy.copy(step.unit.module).eval() if step.unit.path.startswith("(") else step.unit.module)(y)
        y = y.mean((2, 3)) if y.dim() == 4 else y.mean(1) if y.dim() == 3 else y
        pairs = [(y, read[0]) if len(read) == 1 else (y, y[:0]), (head(y), logits)]
    for name, (got, expected) in zip(("features before the head", "logits"), pairs, strict=True):
        if got.shape == expected.shape and (error := difference(got, expected)) <= _TOLERANCE:
            continue
        differ = (
            f"got {list(got.shape)}" if got.shape != expected.shape else f"they differ by {error:.0e} of the largest"
        )
        raise BackboneError(
            f"stages: one after the other they do not compute what {type(net).__name__} computes: expected {name} "
            f"{list(expected.shape)}, {differ}. Its forward applies functions between the modules (F.relu, "
            "torch.flatten, a sum), or calls them in another order: put such a function into stages= as a module "
            "(nn.ReLU(), nn.Flatten()), or make the part that it belongs to one module"
        )
    return x, logits


def check_first_leaf(model: Any, x: Tensor, expected: Tensor) -> None:
    """Check that the first leaf of an ensemble computes the backbone's logits.

    Raises:
        BackboneError: It does not.
    """
    with evaluating(model):
        y = model(x, num_models=1)[0].detach()
    if not (error := difference(y, expected)) <= 10 * _TOLERANCE:
        raise BackboneError(
            f"backbone: the first network of the ensemble differs from it by {error:.1e} (relative to the largest "
            "logit); a module that is random in eval mode may be the cause"
        )


def difference(y: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest absolute value."""
    scale = float(expected.abs().max())
    return float((y - expected).abs().max()) / max(scale, 1e-30)

"""The hierarchical distillation objective; value and gradient take one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast, autograd, checks, dispatch
from ..tracing import is_symbolic


def hierarchical_distillation_loss(
    logits: Tensor, target: Tensor, *, alpha: float = 0.5, temperature: float = 2.0
) -> Tensor:
    """The training objective of an HNE, ``(1 - alpha) L_I + alpha L_HD`` (eq. 9 and 12).

    ``L_I`` is the sum over the leaves of the cross-entropy with the target. ``L_HD`` is the sum over the ensembles of
    1, 2, 4, ... leaves below N of the cross-entropy with the soft labels of all N, both at ``temperature`` T, times
    T^2. The teacher, all N, gets no gradient. Both are means over the batch.

    Args:
        logits: ``[N, B, L]`` logits of the leaves, floating point.
        target: ``[B]`` class indices, int64.
        alpha: weight of the distillation, 0 to 1.
        temperature: T > 0.

    Returns:
        Scalar in the dtype of ``logits``. NaN for an empty batch, as ``torch.nn.functional.cross_entropy``.

    Raises:
        ValueError: a shape or a number does not fit, or (where the target can be read without waiting for a
            device) a class index lies outside ``0 .. L - 1``.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    op = dispatch.implementation("hierarchical_distillation_loss", logits, late_check=_check_values)
    return op(logits, target, alpha, temperature)[0]


def _check_values(logits: Tensor, target: Tensor, alpha: float, temperature: float) -> None:
    check(logits, target, alpha, temperature)
    _check_range(target, logits.shape[2])


def check(logits: Tensor, target: Tensor, alpha: float, temperature: float) -> None:
    """Check the arguments of :func:`hierarchical_distillation_loss`, but not the class indices."""
    checks.rank("logits", logits, 3, "[models, batch, classes]")
    checks.same_kind("logits", logits)
    models, batch, classes = logits.shape
    if models < 1 or classes < 1:
        raise ValueError(f"logits: expected at least one model and one class, got shape {tuple(logits.shape)}")
    checks.shape("target", target, (batch,), "[batch]")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected class indices of dtype torch.int64, got {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"target: expected to be on the device of logits, {logits.device}, got {target.device}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


def _check_range(target: Tensor, classes: int) -> None:
    # On a GPU this would wait for the device, and traced and fake tensors have no values.
    if type(target) is not Tensor or is_symbolic():
        return
    if target.device.type != "cpu" or target.numel() == 0:
        return
    lowest, highest = (int(value) for value in target.aminmax())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"target: expected class indices from 0 to {classes - 1}, got {wrong}")


@torch.library.register_fake("hne::hierarchical_distillation_loss")
def _(logits: Tensor, target: Tensor, alpha: float, temperature: float) -> tuple[Tensor, Tensor]:
    check(logits, target, alpha, temperature)
    return logits.new_empty(()), logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, grad = output
    ctx.save_for_backward(grad)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, grad_grad: Tensor | None) -> tuple[Any, ...]:
    if grad_grad is not None:
        raise RuntimeError(
            "hierarchical_distillation_loss: double backward is not implemented; use the reference backend, "
            'with hne_kernels.use_backend("reference")'
        )
    (grad,) = ctx.saved_tensors
    return None if grad_loss is None else grad * grad_loss, None, None, None


def differentiate(op: str) -> None:
    """Register autograd and autocast of ``op``."""
    autograd.register(op, _backward, _setup_context)
    autocast.register(op, torch.float32)


differentiate("hierarchical_distillation_loss")

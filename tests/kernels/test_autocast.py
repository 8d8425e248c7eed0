"""Under torch.autocast the ops compute as PyTorch's do: convolutions and heads in bfloat16, losses in float32."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cast, check, evaluate, representative
from placements import Placement
from torch import Tensor

import hne_kernels as K

LOWERED = (
    "branch_conv2d",
    "branch_depthwise_conv2d",
    "fused_conv2d",
    "fused_bottleneck",
    "fused_bottleneck_chain",
    "prefix_logits",
)


@pytest.mark.parametrize("case", [c for c in representative() if c.op in LOWERED], ids=lambda case: case.label)
def test_lowered_ops(case: Case, backend: Placement, rng: torch.Generator) -> None:
    """float32 inputs give bfloat16 results, those of the bfloat16 op for inputs rounded to bfloat16."""
    inputs = case.inputs(rng, backend.dtype, backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        outcome = evaluate(case, inputs)
    assert all(result.dtype == torch.bfloat16 for result in outcome.results)
    check(case, backend.backend, cast(inputs, torch.bfloat16, backend.device), outcome)


@pytest.mark.parametrize(
    "case", [c for c in representative(differentiable=True) if c.op in LOWERED], ids=lambda c: c.label
)
def test_parameters_get_gradients_in_their_own_dtype(case: Case, backend: Placement, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, backend.dtype, backend.device)
    leaves = {name: inputs[name].requires_grad_() for name in case.differentiable}
    with torch.autocast(backend.device, torch.bfloat16):
        results = case({**inputs, **leaves})
        total = sum(result.float().square().sum() for result in results)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32, name
        assert gradient.isfinite().all()


def test_mixed_dtypes_are_fine_under_autocast(backend: Placement, rng: torch.Generator) -> None:
    """The features from an earlier layer are bfloat16 already, the parameters are float32."""
    x = torch.randn(2, 2, 4, 4, 3, generator=rng).to(backend.device, torch.bfloat16)
    weight = torch.randn(2, 5, 3, 3, 3, generator=rng).to(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        mixed = K.branch_conv2d(x, weight, padding=1)
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):
        K.branch_conv2d(x, weight, padding=1)
    torch.testing.assert_close(mixed, K.branch_conv2d(x, weight.bfloat16(), padding=1))


def test_loss_is_computed_in_float32(backend: Placement, rng: torch.Generator) -> None:
    logits = (torch.randn(5, 3, 4, generator=rng) * 5).to(backend.device, torch.bfloat16)
    target = torch.randint(4, (3,), generator=rng).to(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        loss = K.hierarchical_distillation_loss(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, K.hierarchical_distillation_loss(logits.float(), target))


def test_double_stays_double(double: Placement, rng: torch.Generator) -> None:
    x = torch.randn(1, 2, 4, 4, 3, generator=rng, dtype=torch.float64).to(double.device)
    weight = torch.randn(1, 5, 3, 1, 1, generator=rng, dtype=torch.float64).to(double.device)
    with torch.autocast(double.device, torch.bfloat16):
        y = K.branch_conv2d(x, weight)
    assert y.dtype == torch.float64


def _statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    rows = y.double().flatten(1, 3)
    return rows.mean(1), rows.var(1, correction=0)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_statistics_stay_in_float32(depthwise: bool, backend: Placement, rng: torch.Generator) -> None:
    x = torch.randn(2, 3, 4, 4, 5, generator=rng).to(backend.device)
    weight = torch.randn(2, 5, *(() if depthwise else (5,)), 1, 1, generator=rng).to(backend.device)
    one, zero = torch.ones(2, 5, device=backend.device), torch.zeros(2, 5, device=backend.device)
    norm = torch.stack([zero, one, zero])
    with torch.autocast(backend.device, torch.bfloat16):
        y, mean, var = K.branch_norm_conv2d(x, weight, norm, activation="relu")
        z = K.branch_normalize(y, torch.stack([mean, var.add(1e-5).rsqrt(), zero]))
    assert (y.dtype, mean.dtype, var.dtype, z.dtype) == (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
    for got, want in zip((mean, var), _statistics(y), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)  # got is of the values before rounding

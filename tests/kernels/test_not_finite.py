"""NaN and infinity pass through the ops as through PyTorch's, so that a diverging training shows."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, TRAINING_OPS, Case, cast, evaluate, representative
from placements import Placement

import hne_kernels as K

ACTIVATED = [
    case
    for case in representative()
    if case.op in ("fused_conv2d", "fused_bottleneck", *TRAINING_OPS, "branch_normalize")
]


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("case", ACTIVATED, ids=lambda case: case.label)
def test_nan_is_not_clamped(case: Case, activation: str, placement: Placement, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, placement.dtype, placement.device)
    inputs["activation"] = activation
    if case.op == "fused_bottleneck":
        inputs |= {"final_activation": activation, "shortcut": None, "shortcut_bias": None}
    inputs["x"].fill_(float("nan"))
    assert evaluate(case, inputs).results[0].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", representative(), ids=lambda case: case.label)
def test_one_value_spreads_as_far_as_in_the_reference(
    case: Case, value: float, backend: Placement, rng: torch.Generator
) -> None:
    inputs = case.inputs(rng, backend.dtype, backend.device)
    first = next(iter(inputs))
    inputs[first].view(-1)[inputs[first].numel() // 2] = value
    with K.use_backend("reference"):
        want = evaluate(case, inputs).results
    for got, right in zip(evaluate(case, inputs).results, want, strict=True):
        assert torch.equal(got.isfinite(), right.isfinite())


def test_loss_and_gradient_of_a_nan(backend: Placement, rng: torch.Generator) -> None:
    """The loss and the gradient of that sample are NaN, but no other gradient."""
    logits = torch.randn(5, 4, 3, generator=rng).to(backend.device)
    logits[2, 1, 0] = float("nan")
    logits.requires_grad_()
    loss = K.hierarchical_distillation_loss(logits, torch.zeros(4, dtype=torch.int64, device=backend.device))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert gradient[2, 1].isnan().all()
    assert gradient[:, [0, 2, 3]].isfinite().all()


BOTTLENECKS = [case for case in CASES if case.op == "fused_bottleneck"][1:5]


@pytest.mark.parametrize("case", BOTTLENECKS, ids=lambda case: case.label)
def test_infinity_in_any_input_of_a_bottleneck(case: Case, placement: Placement, rng: torch.Generator) -> None:
    """A kernel that multiplies by zeros, instead of leaving values out, must not do so with infinity.

    The yardstick is float64: not all of PyTorch's convolutions multiply infinity by the zeros of a padding.
    """
    if placement.backend == "reference":
        pytest.skip("PyTorch's convolutions are not judged")
    for name in [name for name, value in case.inputs(rng, placement.dtype).items() if isinstance(value, torch.Tensor)]:
        inputs = case.inputs(rng, placement.dtype, placement.device)
        values = inputs[name].view(-1)
        values[torch.randint(values.numel(), (), generator=rng)] = float("inf")
        with K.use_backend("reference"):
            want = evaluate(case, cast(inputs, torch.float64)).results[0]
        assert torch.equal(evaluate(case, inputs).results[0].isfinite().cpu(), want.isfinite()), name

"""Gradients against finite differences, and gradients of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, TRAINING_OPS, Case, Inputs, representative, tensors
from placements import Placement
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hne_kernels as K

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS = "hierarchical_distillation_loss"
ONCE = (*TRAINING_OPS, LOSS)  # ops that are differentiable once


def _tiny(op: str) -> list[Case]:
    """Cases that are small enough for finite differences."""
    small = [c for c in CASES if c.op == op and c.terms <= 30]
    return [c for c in representative() if c.op == op] + small


SMOOTH = [
    case
    for op in (
        "branch_conv2d",
        "branch_depthwise_conv2d",
        "branch_normalize",
        "batch_norm_scale_shift",
        "prefix_mean",
        "prefix_logits",
    )
    for case in _tiny(op)
]


def _leaves(case: Case, inputs: Inputs) -> tuple[Any, list[Tensor]]:
    """The op as a function of its differentiable inputs, and these inputs."""
    names = case.differentiable

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return case({**inputs, **dict(zip(names, leaves, strict=True))})

    return function, [inputs[name].detach().requires_grad_() for name in names]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_gradients_and_their_gradients(case: Case, double: Placement, rng: torch.Generator) -> None:
    function, leaves = _leaves(case, case.inputs(rng, torch.float64, double.device))
    # Random directions instead of whole Jacobians, so that there is time for many small cases.
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "case", [c for c in representative(differentiable=True) if c.op not in ONCE], ids=lambda c: c.label
)
def test_whole_jacobian(case: Case, double: Placement, rng: torch.Generator) -> None:
    function, leaves = _leaves(case, case.inputs(rng, torch.float64, double.device))
    assert gradcheck(function, leaves)


@pytest.mark.parametrize("case", [c for op in ONCE if op != LOSS for c in _tiny(op)], ids=str)
def test_gradients_of_training_ops(case: Case, double: Placement, rng: torch.Generator) -> None:
    function, leaves = _leaves(case, case.inputs(rng, torch.float64, double.device))
    assert gradcheck(function, leaves, fast_mode=case.terms > 100)


@pytest.mark.parametrize("case", [c for op in TRAINING_OPS for c in _tiny(op)], ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(
    case: Case, double: Placement, rng: torch.Generator
) -> None:
    function, leaves = _leaves(case, case.inputs(rng, torch.float64, double.device))
    together = torch.autograd.grad([y.square().sum() for y in function(*leaves)], leaves)
    for i, expected in enumerate(together):
        alone = [leaf.detach().requires_grad_(j == i) for j, leaf in enumerate(leaves)]
        results = [y.square().sum() for y in function(*alone) if y.requires_grad]
        (gradient,) = torch.autograd.grad(results, alone[i])
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("models", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_loss_gradient(models: int, alpha: float, double: Placement, rng: torch.Generator) -> None:
    """As the teacher has no gradient, finite differences must leave the mean of all leaves unchanged."""
    logits = torch.randn(models, 3, 4, generator=rng, dtype=torch.float64).to(double.device)
    moves = torch.randn(models, 3, 4, generator=rng, dtype=torch.float64).to(double.device)
    target = torch.randint(4, (3,), generator=rng).to(double.device)

    def along(z: Tensor) -> Tensor:
        z = logits + (z - z.mean(0) if alpha else z)
        return K.hierarchical_distillation_loss(z, target, alpha=alpha, temperature=2.0)

    assert gradcheck(along, [moves.requires_grad_()], fast_mode=models > 5)


@pytest.mark.parametrize("case", [c for c in representative() if c.op in ONCE], ids=lambda c: c.label)
def test_double_backward_is_right_or_refused(case: Case, double: Placement, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64, double.device)
    if case.op == LOSS:
        inputs["alpha"] = 0.0  # without the teacher, which finite differences would change
    function, leaves = _leaves(case, inputs)
    if double.backend == "reference":
        assert gradgradcheck(function, leaves)
        return
    result = function(*leaves)[0].square().sum()
    first = torch.autograd.grad(result, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{case.op}: double backward .*use the reference backend"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@pytest.mark.parametrize("case", [c for c in representative() if c.op.startswith("fused")], ids=lambda c: c.label)
def test_inference_ops_refuse_a_gradient(case: Case, backend: Placement, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, backend.dtype, backend.device)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors(inputs).items()}
    for name, leaf in leaves.items():
        with pytest.raises(RuntimeError, match=f"{case.op} is for inference and has no gradient"):
            case({**inputs, name: leaf})
    with torch.no_grad():
        assert not case({**inputs, **leaves})[0].requires_grad

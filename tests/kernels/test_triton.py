"""Properties of the Triton backend alone: limits of its indices, wrong inputs without an error, tuning."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch
from cases import CASES, Case, check, evaluate, representative
from torch.autograd import forward_ad

import hne_kernels as K

pytest.importorskip("triton")
if "triton" not in K.available_backends():
    pytest.skip("the triton backend is not usable here", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_vast_number_of_pixels_is_an_error() -> None:
    x, weight = torch.ones(1, 2**20, 1, 1, 1, device=DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE)
    with K.use_backend("triton"), pytest.raises(ValueError, match=r"x: expected at most 2\^31 - 2\^14 pixels a branch"):
        K.branch_depthwise_conv2d(x, weight, padding=2**10)  # of 2^42 pixels


@pytest.mark.parametrize("wrong", [-1, 4, 2**40, -(2**63)])
def test_a_class_out_of_range_reads_nothing(wrong: int) -> None:
    """The loss is NaN, and the gradients of the other samples are the same as without it."""
    logits = torch.randn(3, 4, 4).to(DEVICE)
    target = torch.tensor([0, wrong, 2, 3], device=DEVICE)
    op = torch.ops.hne.triton_hierarchical_distillation_loss
    loss, gradient = op(logits, target, 0.5, 2.0)
    _, want = op(logits, target.clamp(0, 3), 0.5, 2.0)
    assert loss.isnan()
    others = [0, 2, 3]
    assert torch.equal(gradient[:, others], want[:, others])


def test_tuning_while_a_graph_is_captured_is_an_error() -> None:
    from hne_kernels.triton.launch import _measure

    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with capturing, pytest.raises(RuntimeError, match="make the same call once before the capture"):
        _measure(lambda: pytest.fail("launched"), (0.5,))


@pytest.mark.parametrize("op", ["branch_conv2d", "branch_normalize", "fused_conv2d", "fused_bottleneck", "prefix_mean"])
def test_an_op_refuses_tangents(op: str, rng: torch.Generator) -> None:
    """Called without the public function, too: a tangent would be dropped without a word."""
    case = next(case for case in representative() if case.op == op)
    inputs = case.inputs(rng, torch.float32, DEVICE)
    raw = getattr(torch.ops.hne, f"triton_{op}")
    arguments = [inputs[argument.name] for argument in raw.default._schema.arguments]
    x = arguments[0]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"triton_{op}: forward-mode derivatives are not"):
        raw(forward_ad.make_dual(x, torch.ones_like(x)), *arguments[1:])
    if op.startswith("fused"):
        with pytest.raises(RuntimeError, match="is for inference and has no gradient"):
            raw(x.requires_grad_(), *arguments[1:]).sum().backward()


BOTTLENECKS = [case for case in CASES if case.op == "fused_bottleneck"]


@pytest.mark.parametrize("case", BOTTLENECKS, ids=str)
def test_a_fused_bottleneck_rounds_as_one_kernel(case: Case, rng: torch.Generator) -> None:
    """Half precision is computed in one kernel, which keeps the sum and the shortcut in float32."""
    module = importlib.import_module("hne_kernels.triton.fused_bottleneck")
    inputs = case.inputs(rng, torch.bfloat16, DEVICE)
    composed = mock.patch.object(module, "_compose", side_effect=AssertionError("composed"))
    with composed, K.use_backend("triton"), torch.no_grad():
        check(case, "cuda", inputs, evaluate(case, inputs))


@pytest.mark.parametrize("case", BOTTLENECKS[:12], ids=str)
@pytest.mark.parametrize("programs", [1, 64])
def test_tiles_of_a_fused_bottleneck(case: Case, programs: int, rng: torch.Generator) -> None:
    """A buffer for few rows makes bands with a halo; few programs make tiles of several samples."""
    module = importlib.import_module("hne_kernels.triton.fused_bottleneck")
    inputs = case.inputs(rng, torch.float16, DEVICE)
    few = mock.patch.object(module, "programs", return_value=max(programs, 3))
    small = mock.patch.object(module, "_BUFFER", 2**9 if programs > 1 else 2**16)
    with few, small, K.use_backend("triton"), torch.no_grad():
        check(case, "cuda", inputs, evaluate(case, inputs))

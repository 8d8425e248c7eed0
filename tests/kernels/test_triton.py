"""Properties of the Triton backend alone: limits of its indices, wrong inputs without an error, tuning."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

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

"""Work of ops and models, for the lower bound of their time."""

from __future__ import annotations

import pytest
import torch

import hne_kernels as K
from hne import Bottleneck, Conv, FusedHNE, Hierarchy

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.usefixtures("_import_benchmarks")


def test_work_of_an_op() -> None:
    import roofline

    x, weight = torch.ones(2, 3, 8, 8, 16), torch.ones(4, 5, 16, 3, 3)

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return K.branch_conv2d(x, weight, padding=1, replicate=2)

    result, products = 4 * 3 * 8 * 8 * 5 * 4, 2 * 4 * 3 * 8 * 8 * 5 * 16 * 9
    work = roofline.of_op(function, {"x": x, "weight": weight})
    assert work == roofline.Work(x.nbytes + weight.nbytes + result, products)
    work = roofline.of_op(function, {"x": x, "weight": weight}, ["x", "weight"])
    assert work == roofline.Work(2 * (x.nbytes + weight.nbytes) + result, 2 * products)
    assert work.floor_seconds(roofline.Rates(work.bytes / 3, work.flops)) == pytest.approx(3)


def test_work_of_a_model() -> None:
    """A network small enough to count by hand: two branches of one bottleneck after a shared convolution."""
    import roofline

    model = FusedHNE(Hierarchy((1, 2)), [[Conv(4)], [Bottleneck(6, 2, stride=2)]], num_classes=5)
    per_image = (3 * 64 + 4 * 64) + (4 * 64 + 2 * 6 * 16)
    filters = 4 * 3 * 9 + 2 * (4 * 2 + 2 * 9 + 2 * 6 + 4 * 6) + 2 * 6 * 5
    work = roofline.of_inference(model, 2, 10, 8, 2)
    assert work == roofline.Work((10 * per_image + filters) * 2, 2 * 10 * model.macs(2, 8))
    expand, depthwise, project = 4 * 64 + 2 * 2 * 64, 2 * 2 * 64 + 2 * 2 * 16, 2 * 2 * 16 + 2 * 6 * 16
    per_image += expand + depthwise + project  # the first count of the bottleneck stands for the shortcut
    work = roofline.of_training(model, 10, 8, 2)
    assert work == roofline.Work(3 * 10 * per_image * 2 + 8 * filters, 6 * 10 * model.macs(2, 8))

"""PyTorch's counter of floating-point operations counts the ops of this package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import networks
import pytest
import torch
from networks import build, each_tree, images, small_size
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import hne_kernels as K
from hne import PRESETS, Conv, FusedHNE, Hierarchy

BATCH = 2


def count(function: Callable[[], object]) -> int:
    # Attention as two matrix products: PyTorch counts nothing for its fused kernel on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@each_tree
def test_twice_the_multiply_adds(tree: Hierarchy, grad: bool, rng: torch.Generator) -> None:
    model = build(FusedHNE, tree, rng)
    naive, x = model.to_naive(), images(rng, BATCH)
    for n in range(1, model.num_models + 1):
        expected = 2 * BATCH * model.macs(n, x.shape[2:])
        assert count(lambda n=n: model(x, n)) == count(lambda n=n: naive(x, n)) == expected
    assert count(lambda: model.prefix_logits(x)) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_training(preset: str, rng: torch.Generator) -> None:
    """Forward as the naive model. Each convolution has two gradients, except for that of the images."""
    model = FusedHNE.from_preset(preset, num_classes=3, width=0.25).train()
    size = small_size(preset, 16)
    x = torch.randn(BATCH, model.in_channels, size, size, generator=rng)
    forward = 2 * BATCH * model.macs(input_size=size)
    assert count(lambda: model(x)) == count(lambda: model.to_naive()(x)) == forward
    stem = 2 * BATCH * model.layers_of_blocks()[0][0].macs((size, size))
    assert count(lambda: model(x).sum().backward()) == 3 * forward - stem
    x.requires_grad_()
    assert count(lambda: model(x).sum().backward()) == 3 * forward
    assert count(lambda: model.eval()(x).sum().backward()) == 3 * forward


def test_the_convention_is_that_of_pytorch(rng: torch.Generator) -> None:
    """PyTorch's formula for the weight's gradient is right for one group, so for one branch of dense convolutions."""
    model = FusedHNE(Hierarchy((1, 1)), [[Conv(4)], [Conv(8, 3, 2)]], num_classes=3).train()
    naive, x = model.to_naive(), torch.randn(BATCH, 3, 9, 8, generator=rng)
    for needs_grad in (False, True):
        x.requires_grad_(needs_grad)
        assert count(lambda: model(x).sum().backward()) == count(lambda: naive(x).sum().backward())


def test_prepared_layers(rng: torch.Generator) -> None:
    """A call by handle counts the layers, and so does one on tensors without values."""
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng, BATCH)
    with torch.no_grad():
        model(x)
        ((step,),) = model.folded._programs.values()
        handle = step.compute._prepared
        expected = 2 * BATCH * model.macs(input_size=x.shape[2:])
        assert count(lambda: torch.ops.hne.fused_layers(x, handle)) == expected
        assert count(lambda: torch.ops.hne.fused_layers(x.permute(0, 2, 3, 1)[None], handle)) == expected
        assert count(lambda: model.to("meta")(x.to("meta"))) == expected


def test_heads(rng: torch.Generator) -> None:
    features = torch.randn(4, 3, 7, generator=rng, requires_grad=True)
    weight = torch.randn(4, 5, 7, generator=rng, requires_grad=True)
    assert count(lambda: K.prefix_logits(features, weight)) == 2 * 4 * 3 * 7 * 5
    assert count(lambda: K.prefix_logits(features, weight)[1].sum().backward()) == 3 * 2 * 4 * 3 * 7 * 5


def test_every_op_has_a_formula() -> None:
    names = {name.removeprefix("hne::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("hne::")}
    counted = {packet._qualified_op_name.removeprefix("hne::") for packet in flop_registry if "hne" in str(packet)}
    integers = {"prepare_quantized_layers", "quantized_layers"}  # their sums are no floating-point operations
    tf32 = {name for name in names if name.startswith("allow_tf32")}
    assert names - counted == {"prepare_layers"} | integers | tf32


@pytest.mark.parametrize("first", ["hne_kernels", "torch.utils.flop_counter"])
def test_either_import_comes_first(first: str) -> None:
    """The package does not import the counter, which takes long; formulas are there in either order."""
    second = {"hne_kernels": "torch.utils.flop_counter", "torch.utils.flop_counter": "hne_kernels"}[first]
    code = f"""
import sys, torch, {first}
print({first!r} == "torch.utils.flop_counter" or "torch.utils.flop_counter" not in sys.modules)
import {second}
x, weight = torch.ones(1, 2, 3, 3, 2), torch.ones(1, 4, 2, 1, 1)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    torch.ops.hne.branch_conv2d(x, weight, None, 1, 0, 1)
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", str(2 * 2 * 9 * 4 * 2)], done.stderr

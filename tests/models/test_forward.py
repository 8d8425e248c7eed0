"""Logits of both models: they agree, prefixes are slices, and bad input is explained."""

from __future__ import annotations

import networks
import pytest
import torch
from called import OpsOfOurs
from networks import IN_CHANNELS, NUM_CLASSES, build, each_model, each_tree, images
from placements import Placement
from torch import Tensor

import hne_kernels as K
from hne import HNE, PRESETS, Bottleneck, Conv, FusedHNE, Hierarchy, NaiveHNE


@each_tree
def test_fused_agrees_with_naive(tree: Hierarchy, placement: Placement, rng: torch.Generator, grad: bool) -> None:
    if placement.interpreted and (tree.branches != (1, 3, 6) or placement.dtype != torch.float32):
        pytest.skip("Triton's interpreter is slow: only one tree, in float32")
    exact = build(NaiveHNE, tree, rng)
    x = images(rng)
    fused = exact.to_fused().to(placement.device, placement.dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(placement.dtype, 0.2)
    for n in (4, None) if placement.interpreted else (*range(1, tree.num_models), None):
        expected, y = exact(x, n), fused(x.to(placement.device, placement.dtype), n)
        assert y.dtype == placement.dtype
        assert y.requires_grad == grad
        assert y.shape == (n or tree.num_models, len(x), NUM_CLASSES)
        assert (y.cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_presets_agree(preset: str, backend: Placement, rng: torch.Generator) -> None:
    if backend.interpreted and preset != "hne_tiny":
        pytest.skip("Triton's interpreter is slow: only the smallest preset")
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    model = FusedHNE.from_preset(preset, num_classes=NUM_CLASSES, width=0.25).to(backend.device).eval()
    size = networks.small_size(preset, 8 if backend.interpreted else 32)
    x = images(rng, 2, (size, size), torch.float32).to(backend.device)
    expected = model.to_naive().double()(x.double())
    assert (model(x) - expected).abs().max() <= 1e-3 * expected.abs().max()


@each_tree
@each_model
def test_eval_mode_with_gradients(kind: type[HNE], tree: Hierarchy, rng: torch.Generator) -> None:
    """The logits are those without gradients, and the gradients are those of plain PyTorch."""
    model = build(kind, tree, rng)
    x = images(rng, size=(5, 4))
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(model(x), expected)
    naive = model.to_naive()
    for m in (model, naive):
        m(x).square().sum().backward()
    for p, q in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@each_tree
@each_model
def test_fewer_models_are_the_first_ones(kind: type[HNE], tree: Hierarchy, rng: torch.Generator, grad: bool) -> None:
    model = build(kind, tree, rng)
    x = images(rng)
    every = model(x)
    for n in range(1, tree.num_models + 1):
        torch.testing.assert_close(model(x, n), every[:n])


@each_tree
@each_model
def test_prefix_logits_are_means(kind: type[HNE], tree: Hierarchy, rng: torch.Generator, grad: bool) -> None:
    model = build(kind, tree, rng)
    x = images(rng)
    leaves = model(x)
    for sizes in (None, (1,), tuple(range(1, tree.num_models + 1)), (max(1, tree.num_models - 1),)):
        expected = torch.stack([leaves[:n].mean(0) for n in sizes or model.prefix_sizes])
        torch.testing.assert_close(model.prefix_logits(x, sizes), expected)


def test_prefix_sizes_are_the_default_sizes_of_the_kernels() -> None:
    with torch.device("meta"):
        model = NaiveHNE(networks.TREES["odd"], networks.BLOCKS, num_classes=2)
    assert model.prefix_sizes == K.default_sizes(6) == (1, 2, 4, 6)


@each_model
def test_a_weight_changes_only_the_leaves_below_it(kind: type[HNE], rng: torch.Generator) -> None:
    """In the tree (1, 3, 6), branch 1 of block 1 leads to leaves 2 and 3."""
    model = build(kind, networks.TREES["odd"], rng)
    x = images(rng)
    with torch.no_grad():
        before = model(x)
        bias = model.blocks[1][0].project.bn.bias  # 3 branches; the weights have no effect where their input is zero
        bias.view(3, -1)[1].add_(10.0)
        after = model(x)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, True, False, False]


@each_model
def test_empty_batch_and_tiny_images(kind: type[HNE], rng: torch.Generator, grad: bool) -> None:
    model = build(kind, networks.TREES["odd"], rng)
    assert model(images(rng, batch=0)).shape == (6, 0, NUM_CLASSES)
    assert model(images(rng, batch=0), 4).shape == (4, 0, NUM_CLASSES)
    assert model.prefix_logits(images(rng, batch=0)).shape == (4, 0, NUM_CLASSES)
    assert model(images(rng, size=(1, 1))).isfinite().all()


@each_model
def test_any_strides(kind: type[HNE], rng: torch.Generator, grad: bool) -> None:
    model = build(kind, networks.TREES["odd"], rng)
    x = images(rng)
    expected = model(x)
    wide = torch.zeros(6, IN_CHANNELS, 9, 24, dtype=x.dtype)
    wide[::2, :, :, ::2] = x
    for same in (x.contiguous(memory_format=torch.channels_last), wide[::2, :, :, ::2]):
        torch.testing.assert_close(model(same), expected)
    repeated = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(model(repeated), model(repeated.contiguous()))
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected)


def test_second_derivatives_with_frozen_statistics(double: Placement, rng: torch.Generator) -> None:
    """A penalty on gradients needs second derivatives. In eval mode a model has them."""
    fused = build(FusedHNE, networks.TREES["odd"], rng).to(double.device)
    x = images(rng).to(double.device).requires_grad_()
    penalties = []
    for model in (fused, fused.to_naive()):
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), list(model.parameters())))
    for got, want in zip(*penalties, strict=True):
        torch.testing.assert_close(got, want)


def test_channels_last_images_are_not_copied(rng: torch.Generator) -> None:
    x = images(rng).contiguous(memory_format=torch.channels_last)
    features = build(FusedHNE, networks.TREES["odd"], rng).executor().from_images(x)
    assert features.data_ptr() == x.data_ptr()
    assert features.is_contiguous()


@each_model
def test_autocast(kind: type[HNE], rng: torch.Generator, grad: bool) -> None:
    model = build(kind, networks.TREES["doubling"], rng, torch.float32)
    x = images(rng, dtype=torch.float32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() <= 0.2 * expected.abs().max()


def test_number_of_op_calls(rng: torch.Generator) -> None:
    """In training, the next op normalises features while reading them wherever it can. Inference is one op."""
    x = torch.randn(2, 3, 8, 8, generator=rng)
    # Before a bottleneck one op normalises the previous layer's output, stores it, and computes the bottleneck's
    # expansion. If a bottleneck's output is wider than its middle, that op also computes its last convolution.
    inverted = {"materializing branch_norm_conv2d": 3, "depthwise branch_norm_conv2d": 3, "branch_norm_conv2d": 5}
    wide = {
        "branch_pointwise_norm_conv2d": 3,
        "branch_pointwise_stats": 3,
        "materializing branch_norm_conv2d": 1,
        "depthwise branch_norm_conv2d": 3,
        "branch_norm_conv2d": 2,
    }
    for layer, calls in ((Bottleneck(4, 8), inverted), (Bottleneck(8, 4), wide)):
        model = FusedHNE(Hierarchy([1, 2]), [[Conv(8)], [layer] * 3], num_classes=3).train()
        with OpsOfOurs() as ops:
            model(x).sum().backward()
        convolutions = {op: n for op, n in ops.called.items() if "norm_conv2d" in op or "stats" in op}
        assert convolutions == calls | {f"{op}_backward": n for op, n in calls.items()}
    model.eval()
    # Under a dispatch mode, which may record the call, inference would not use prepared layers.
    for call in (lambda: (model(x), model(x, 1)), lambda: list(model.anytime(x))):
        with torch.no_grad(), torch.profiler.profile() as profile:
            call()
        called = {event.key: event.count for event in profile.key_averages() if event.key.startswith("hne::")}
        assert called == {"hne::prepare_layers": 2, "hne::fused_layers": 2}


@each_model
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"x must have 4 dimensions .*got shape \(3, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8, 3), ValueError, r"x must have 4 dimensions .*got shape \(1, 2, 8, 8, 3\)"),
        (torch.zeros(2, 1, 8, 8), ValueError, r"x must have 3 channels .*got shape \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 0, 8), ValueError, r"at least 1x1 pixels, got shape \(2, 3, 0, 8\)"),
        (torch.zeros(2, 3, 8, 8).byte(), TypeError, "dtype of the model, torch.float32, got torch.uint8"),
        (torch.zeros(2, 3, 8, 8).double(), TypeError, "dtype of the model, torch.float32, got torch.float64"),
        (torch.zeros(2, 3, 8, 8, device="meta"), ValueError, "device of the model, cpu, got meta"),
    ],
)
def test_bad_images(kind: type[HNE], x: Tensor, error: type[Exception], message: str, rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["doubling"], rng, torch.float32)
    for call in (model, model.prefix_logits, model.anytime):
        with pytest.raises(error, match=message):
            call(x)


@each_model
def test_bad_numbers_of_models(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["doubling"], rng)
    x = images(rng)
    for n in (0, 5, -1):
        with pytest.raises(ValueError, match=f"num_models must lie between 1 and 4, got {n}"):
            model(x, n)
    with pytest.raises(TypeError, match=r"num_models must be an int, got 1\.0"):
        model(x, 1.0)
    for sizes in ((), (0, 1), (2, 2), (2, 1)):
        with pytest.raises(ValueError, match="sizes must rise from at least 1, got"):
            model.prefix_logits(x, sizes)
    with pytest.raises(ValueError, match="num_models must lie between 1 and 4, got 5"):
        model.prefix_logits(x, (1, 5))

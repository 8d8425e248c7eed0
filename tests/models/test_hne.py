"""The two models: costs, values, prefixes, training, copies, and what they say about bad input."""

from __future__ import annotations

import copy
import io
import json
import pickle

import networks
import pytest
import torch
from called import OpsOfOurs
from networks import IN_CHANNELS, NUM_CLASSES, build, each_tree, images
from placements import Placement
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hne_kernels as K
from hne import HNE, PRESETS, Bottleneck, Conv, FusedHNE, Hierarchy, NaiveHNE, PoolLinear, objective

each_model = pytest.mark.parametrize("kind", [FusedHNE, NaiveHNE])


@pytest.fixture(params=[True, False], ids=["grad", "no-grad"])
def grad(request: pytest.FixtureRequest):
    with torch.set_grad_enabled(request.param):
        yield request.param


# Cost -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "classes", "size", "millions"),
    [
        ("hne_resnet50_cifar", 100, 32, {1: 50.82, 2: 65.71, 4: 107.17, 8: 201.92, 16: 402.36}),
        ("hne_small_resnet50_cifar", 100, 32, {1: 13.09, 2: 16.86, 4: 27.37, 8: 51.42, 16: 102.35}),
        ("hne_mobilenetv2_075", 1000, 224, {1: 179.13, 2: 211.96, 4: 332.92, 8: 602.26}),
    ],
)
@each_model
def test_costs_of_the_papers_networks(
    kind: type[HNE], preset: str, classes: int, size: int, millions: dict[int, float]
) -> None:
    with torch.device("meta"):
        model = kind.from_preset(preset, num_classes=classes)
    assert {n: round(model.macs(n, size) / 1e6, 2) for n in model.prefix_sizes} == millions
    assert model.macs(input_size=(size, size)) == model.macs(model.num_models, size)


@each_tree
def test_macs_are_those_computed(tree: Hierarchy, rng: torch.Generator) -> None:
    model = build(NaiveHNE, tree, rng)
    for n in range(1, tree.num_models + 1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(rng, 2, (9, 12)), n)
        assert counter.get_total_flops() == 2 * 2 * model.macs(n, (9, 12))


def test_cost_does_not_depend_on_where_the_macs_are_asked_for() -> None:
    model = NaiveHNE.from_preset("hne_tiny", num_classes=10)
    assert [model.macs(n) for n in range(1, 9)] == sorted({model.macs(n) for n in range(1, 9)})
    with pytest.raises(ValueError, match="input_size must be at least 1x1, got 0x8"):
        model.macs(1, (0, 8))
    with pytest.raises(ValueError, match="num_models must lie between 1 and 8, got 9"):
        model.macs(9)


# Values ---------------------------------------------------------------------------------------------------------------


@each_tree
def test_fused_agrees_with_naive(tree: Hierarchy, placement: Placement, rng: torch.Generator, grad: bool) -> None:
    if placement.interpreted and (tree.branches != (1, 3, 6) or placement.dtype != torch.float32):
        pytest.skip("the interpreter takes minutes: one tree, in float32")
    exact = build(NaiveHNE, tree, rng)
    x = images(rng)
    fused = exact.to_fused().to(placement.device, placement.dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(placement.dtype, 0.2)
    for n in (*range(1, tree.num_models), None):
        expected, y = exact(x, n), fused(x.to(placement.device, placement.dtype), n)
        assert y.dtype == placement.dtype
        assert y.requires_grad == grad
        assert y.shape == (n or tree.num_models, len(x), NUM_CLASSES)
        assert (y.cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_presets_agree(preset: str, backend: Placement, rng: torch.Generator) -> None:
    if backend.interpreted and preset != "hne_tiny":
        pytest.skip("the interpreter takes minutes: the smallest preset")
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    model = FusedHNE.from_preset(preset, num_classes=NUM_CLASSES, width=0.25).to(backend.device).eval()
    x = images(rng, 2, (32, 32), torch.float32).to(backend.device)
    expected = model.to_naive().double()(x.double())
    assert (model(x) - expected).abs().max() <= 1e-3 * expected.abs().max()


@each_tree
@each_model
def test_gradients_and_evaluation_agree(kind: type[HNE], tree: Hierarchy, rng: torch.Generator) -> None:
    """In eval mode with gradients: the same values, and the gradients of plain PyTorch."""
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


@each_model
def test_a_leaf_is_a_network_of_its_own(kind: type[HNE], rng: torch.Generator) -> None:
    """Leaf 4 of (1, 3, 6): changing what is not on its path leaves it as it was."""
    model = build(kind, networks.TREES["odd"], rng)
    x = images(rng)
    with torch.no_grad():
        before = model(x)
        project = model.blocks[1][0].project.conv.weight  # 3 branches
        project.view(3, -1)[1].mul_(2.0)
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
    """In eval mode a model is differentiable any number of times, as a penalty on gradients needs."""
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


@each_model
def test_training_under_autocast_keeps_statistics_in_float32(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["doubling"], rng, torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective("I+HD")(model(images(rng, dtype=torch.float32)), torch.tensor([0, 1, 2]))
    loss.backward()
    for tensor in (*model.buffers(), *(p.grad for p in model.parameters())):
        assert tensor.dtype in (torch.float32, torch.int64)
        assert tensor.isfinite().all()


# Training -------------------------------------------------------------------------------------------------------------


@each_tree
def test_training_stays_together(tree: Hierarchy, double: Placement, rng: torch.Generator) -> None:
    """A few optimiser steps, of the whole tree and of parts of it: the same weights and running statistics."""
    naive = build(NaiveHNE, tree, rng).train()
    fused = naive.to_fused()
    before = copy.deepcopy(naive.state_dict())
    loss = objective("I+HD", alpha=0.4)
    steps = [tree.num_models, 1, max(1, tree.num_models - 1), tree.num_models]
    batches = [(images(rng, 4), torch.randint(NUM_CLASSES, (4,), generator=rng)) for _ in steps]
    for model in (naive, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for n, (x, target) in zip(steps, batches, strict=True):
            optimizer.zero_grad()
            loss(model(x, n), target).backward()
            optimizer.step()
    for name, value in naive.state_dict().items():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-8, atol=1e-9, msg=name)
    x = images(rng)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), naive.eval()(x), rtol=1e-7, atol=1e-8)


@each_model
def test_only_evaluated_branches_update_their_statistics(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng).train()
    running = model.blocks[2][0].expand.bn.running_var.view(6, -1)
    before = running.clone()
    model(images(rng), 4)
    assert (running != before).any(1).tolist() == [True] * 4 + [False] * 2


@each_model
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_batch_norm_settings_are_honoured(kind: type[HNE], momentum: float | None, rng: torch.Generator) -> None:
    """Frozen batch norms use their running statistics; a momentum of None is a cumulative average."""
    model = build(kind, Hierarchy((1, 1, 1)), rng).train()
    first = model.blocks[0][0].unit
    first.bn.momentum = momentum
    first.bn.reset_running_stats()
    frozen = model.blocks[1][0].expand.bn.eval()
    before = frozen.running_mean.clone()
    means = []
    for _ in range(3):
        x = images(rng)
        model(x)
        y = torch.conv2d(x, first.conv.weight, stride=2, padding=1)
        means.append(y.mean((0, 2, 3)))
    expected = torch.stack(means).mean(0)
    if momentum is not None:
        expected = sum(momentum * (1 - momentum) ** (2 - i) * mean for i, mean in enumerate(means))
    torch.testing.assert_close(first.bn.running_mean, expected.detach())
    assert first.bn.num_batches_tracked == 3
    assert torch.equal(frozen.running_mean, before)


@each_model
def test_one_value_per_channel_cannot_be_normalised(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["single"], rng).train()
    with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value per channel when training"):
        model(images(rng, batch=1, size=(1, 1)))


def test_initialisation_is_that_of_one_branch() -> None:
    """He et al.: deviation sqrt(2 / fan out) of one network, whatever the number of branches."""
    torch.manual_seed(0)
    model = FusedHNE.from_preset("hne_resnet50_cifar", num_classes=100)
    unit = model.blocks[4][1].expand  # 16 branches, 256 > 64
    assert unit.conv.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)
    depthwise = model.blocks[4][1].depthwise
    assert depthwise.conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert model.head.conv.weight.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)
    assert torch.equal(unit.bn.weight, torch.ones_like(unit.bn.weight))


# Compilation ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_to_fast_code(rng: torch.Generator) -> None:
    model = FusedHNE(Hierarchy((1, 2)), [[Conv(4)], [Bottleneck(4, 2)]], num_classes=2).eval()
    x = images(rng, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_for_inference_in_one_graph(rng: torch.Generator, grad: bool) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng, torch.float32)
    x = images(rng, dtype=torch.float32)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # all but the code generation, which is slow
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x, 4), expected[:4], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.blocks[0][0].unit.conv.weight.mul_(0.5)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_for_training_in_one_graph(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng, torch.float32).train()
    twin = copy.deepcopy(model)
    x, target = images(rng, dtype=torch.float32), torch.tensor([0, 1, 2])
    for m, run in ((model, model), (twin, torch.compile(twin, fullgraph=True, backend="aot_eager"))):
        objective("I+HD")(run(x), target).backward()
        assert m.head.conv.weight.grad is not None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-3 * p.grad.abs().max() + 1e-5
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_exports_with_a_dynamic_batch(rng: torch.Generator, grad: bool) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng, torch.float32)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (images(rng, dtype=torch.float32),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        x = images(rng, size, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


# Descriptions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_both_models_have_the_same_state(preset: str) -> None:
    with torch.device("meta"):
        fused = FusedHNE.from_preset(preset, num_classes=7, width=0.25)
        naive = NaiveHNE.from_preset(preset, num_classes=7, width=0.25)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (fused, naive)]
    assert shapes[0] == shapes[1]
    assert fused.config() == naive.config()


def test_presets_can_be_widened_and_pruned() -> None:
    with torch.device("meta"):
        half = NaiveHNE.from_preset("hne_resnet50_cifar", num_classes=10, width=0.5)
        small = NaiveHNE.from_preset("hne_small_resnet50_cifar", num_classes=10)
        thin = NaiveHNE.from_preset("hne_resnet50_cifar", num_classes=10, width=0.001)
        four = NaiveHNE.from_preset("hne_resnet50_cifar", num_classes=10, num_models=4)
        tree = Hierarchy((1, 1, 3, 3, 3))
        three = NaiveHNE.from_preset("hne_resnet50_cifar", num_classes=10, hierarchy=tree, in_channels=1)
    assert half.config() == small.config()
    assert {layer["channels"] for block in thin.config()["blocks"] for layer in block} == {1}
    assert four.hierarchy == Hierarchy((1, 1, 1, 2, 4))
    assert (three.hierarchy, three.num_models, three.in_channels) == (tree, 3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet"}, "preset must be one of hne_resnet50_cifar, .*hne_mlp, got 'resnet'"),
        ({"num_models": 6}, "got num_models = 6"),
        ({"num_models": 32}, "of 4 blocks has a power of two of at most 8 models, got num_models = 32"),
        ({"num_models": 2, "hierarchy": Hierarchy((1, 1, 1, 2))}, "give num_models or hierarchy, not both"),
        ({"hierarchy": Hierarchy((1, 2))}, r"the tree \(1, 2\) has 2 blocks, but blocks describes 4"),
        ({"width": 0.0}, "width must be a positive number, got 0.0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ],
)
def test_bad_presets(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedHNE.from_preset(**{"name": "hne_tiny", "num_classes": 10, **arguments})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Conv(0), ValueError, "Conv.channels must be at least 1, got 0"),
        (lambda: Conv(4, kernel_size=2), ValueError, "Conv.kernel_size must be odd .*got 2"),
        (lambda: Conv(4, stride=1.0), TypeError, r"Conv.stride must be an int, got 1\.0"),
        (lambda: Bottleneck(4, -1), ValueError, "Bottleneck.middle must be at least 1, got -1"),
        (lambda: Bottleneck(4, 2, activation="gelu"), ValueError, "must be one of none, relu, relu6, got 'gelu'"),
        (lambda: PoolLinear(4, "elu"), ValueError, "PoolLinear.activation must be one of .*got 'elu'"),
        (lambda: FusedHNE((1, 2), [], num_classes=2), TypeError, "hierarchy must be a Hierarchy, got tuple"),
        (lambda: FusedHNE(Hierarchy((1,)), [[]], num_classes=2), ValueError, r"blocks\[0\] must have at least one"),
        (lambda: FusedHNE(Hierarchy((1,)), [[nn.ReLU()]], num_classes=2), TypeError, r"blocks\[0\] must list layer"),
        (lambda: FusedHNE(Hierarchy((1,)), [[Conv(2)]], num_classes=2.0), TypeError, "num_classes must be an int"),
    ],
)
def test_bad_descriptions(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@each_tree
@each_model
def test_config_describes_the_network(kind: type[HNE], tree: Hierarchy, rng: torch.Generator) -> None:
    model = build(kind, tree, rng)
    config = json.loads(json.dumps(model.config()))
    twin = kind.from_config(config).double().eval()
    assert twin.config() == config
    assert (twin.hierarchy, twin.num_classes, twin.in_channels) == (tree, NUM_CLASSES, IN_CHANNELS)
    twin.load_state_dict(model.state_dict())
    x = images(rng)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [[{"layer": "Attention"}]]}, "layer must be one of Conv, Bottleneck, PoolLinear, got 'Attention'"),
        ({"blocks": [[{"layer": "Conv", "size": 3}]]}, "not the description of a Conv: .*size"),
        ({"blocks": [[{"layer": "Conv"}]]}, "not the description of a Conv: .*channels"),
        ({"blocks": [[]]}, "blocks describes 1"),
        ({"blocks": 3}, "not a model's config"),
        ({"hierarchy": {"branches": [1, 2], "depth": 3}}, "not a model's config: .*depth"),
        ({"hierarchy": {"branches": [2, 3]}}, "does not divide"),
        ({"num_classes": "many"}, "not a model's config: num_classes must be an int, got 'many'"),
        ({"colour": 1}, r"has the entries \['blocks', .*got .*'colour'"),
    ],
)
def test_bad_configs(change: dict, message: str) -> None:
    config = NaiveHNE.from_preset("hne_tiny", num_classes=3).config()
    with pytest.raises(ValueError, match=message):
        FusedHNE.from_config(config | change)


def test_text_shows_the_tree() -> None:
    with torch.device("meta"):
        text = repr(FusedHNE.from_preset("hne_resnet50_cifar", num_classes=100))
    assert "FusedHNE(16 models, 3 channels > 100 classes, 5,681,008 parameters)" in text
    assert "  3      8         bottleneck 64-256/2, bottleneck 64-256 x3\n" in text
    assert text.endswith("  head   16        pool, linear 100")


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_naive_copies_everything(dtype: torch.dtype, training: bool, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng, dtype).train(training)
    model.blocks[0][0].requires_grad_(False)
    naive = model.to_naive()
    assert type(naive) is NaiveHNE
    assert type(naive.to_fused()) is FusedHNE
    assert naive.training == training
    assert naive.state_dict().keys() == model.state_dict().keys()
    for (name, p), q in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad == (not name.startswith("blocks.0.0."))
        assert p.data_ptr() != q.data_ptr()
        assert torch.equal(p, q)
        assert p.dtype == q.dtype == dtype


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent(how: str, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    with torch.no_grad():
        expected = model(x)  # from here on it has folded weights to share by mistake
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            assert file.tell() < 2 * sum(t.nbytes for t in model.state_dict().values()) + 2**17
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), expected)
        assert not model(x).any()


# Bad input ------------------------------------------------------------------------------------------------------------


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


def test_prefix_sizes_are_those_of_the_kernels() -> None:
    with torch.device("meta"):
        model = NaiveHNE(networks.TREES["odd"], networks.BLOCKS, num_classes=2)
    assert model.prefix_sizes == K.default_sizes(6) == (1, 2, 4, 6)


def test_ops_of_a_step_and_of_a_call(rng: torch.Generator) -> None:
    """No map is written that the next op could normalise as it reads, and inference is one op."""
    x = torch.randn(2, 3, 8, 8, generator=rng)
    # Where a bottleneck follows another, its expansion comes with the end of that one. Where the end is wider than what
    # it is made of, so does the last convolution, after its statistics.
    inverted = {"materializing branch_norm_conv2d": 2, "depthwise branch_norm_conv2d": 3, "branch_norm_conv2d": 6}
    wide = {
        "branch_pointwise_norm_conv2d": 3,
        "branch_pointwise_stats": 3,
        "depthwise branch_norm_conv2d": 3,
        "branch_norm_conv2d": 3,
    }
    for layer, calls in ((Bottleneck(4, 8), inverted), (Bottleneck(8, 4), wide)):
        model = FusedHNE(Hierarchy([1, 2]), [[Conv(8)], [layer] * 3], num_classes=3).train()
        with OpsOfOurs() as ops:
            model(x).sum().backward()
        units = {op: n for op, n in ops.called.items() if "norm_conv2d" in op or "stats" in op}
        assert units == calls | {f"{op}_backward": n for op, n in calls.items()}
    model.eval()
    with torch.no_grad(), OpsOfOurs() as ops:
        model(x)
        model(x, 1)
        assert ops.called == {"prepare_layers": 2, "fused_layers": 2}
        list(model.anytime(x))
    assert ops.called == {"prepare_layers": 4, "fused_layers": 4}

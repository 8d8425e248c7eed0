"""Convolutional layers against plain PyTorch in float64: forward, gradients, running statistics, inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from networks import build, each_model, images
from placements import Placement
from plain_networks import CASES, PlainTree, plain_gradients
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hne_kernels as K
from hne import (
    HNE,
    AveragePool,
    BasicBlock,
    Conv,
    DenseBottleneck,
    FusedHNE,
    Hierarchy,
    MaxPool,
    Norm,
    PreActivation,
)
from hne.layers import LayerSpec, SkippedModuleError, build_layer, spec_from_config

TREE = networks.TREES["odd"]
SIZE = (15, 14)
# All layers in one network, small enough for compilers and Triton's interpreter.
SMALL: list[list[LayerSpec]] = [
    [Conv(4, 7, 2), MaxPool(), BasicBlock(4)],
    [DenseBottleneck(6, 4, stride=2, groups=2, squeeze=2), PreActivation(6), Norm()],
    [PreActivation(9), AveragePool(kernel_size=2, stride=1, padding=1), Conv(6, groups=3, activation="silu")],
]
each_case = pytest.mark.parametrize("blocks", CASES.values(), ids=CASES)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(("_mean", "_var"))}


@each_model
@each_case
@pytest.mark.parametrize("num_models", [None, 4, 1])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_and_statistics(
    kind: type[HNE], blocks: list[list[LayerSpec]], num_models: int | None, training: bool, rng: torch.Generator
) -> None:
    model = build(kind, TREE, rng, blocks=blocks).train(training)
    plain = PlainTree(model)
    x = images(rng, 4, SIZE).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y, expected = model(x, num_models), plain(twin, num_models)
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape, generator=rng, dtype=y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(plain_gradients(plain, model), plain.gradients())
    torch.testing.assert_close(plain.names_in(model, _statistics(model)), _statistics(plain))


@each_model
@each_case
@torch.no_grad()
def test_inference(kind: type[HNE], blocks: list[list[LayerSpec]], rng: torch.Generator) -> None:
    model = build(kind, TREE, rng, blocks=blocks)
    plain = PlainTree(model)
    for batch, size in ((3, SIZE), (1, (13, 17)), (0, SIZE)):
        x = images(rng, batch, size)
        expected = plain(x)
        for n in range(1, 7):
            torch.testing.assert_close(model(x, n), expected[:n])
        nested = torch.stack([expected[:n].mean(0) for n in model.prefix_sizes])
        torch.testing.assert_close(model.prefix_logits(x), nested)
        answers = list(model.anytime(x))
        assert [n for n, _ in answers] == [1, 2, 3, 4, 5, 6]
        for n, y in answers:
            torch.testing.assert_close(y, expected[:n].mean(0))


@each_case
@torch.no_grad()
def test_all_layers_have_folded_weights(
    blocks: list[list[LayerSpec]], monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """Later calls neither fold nor pack weights."""
    model = build(FusedHNE, TREE, rng, blocks=blocks)
    x = images(rng, 2, SIZE)
    expected = model(x)
    assert model.folded.holds_all_weights
    for name in ("pack_weight", "running_normalization"):
        for module in ("folding", "kernels"):
            target = f"hne.executors.{module}." + ("K.pack_weight" if name == "pack_weight" else name)
            monkeypatch.setattr(target, lambda *_: pytest.fail("weights were folded again"))
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model(x, 4), expected[:4])
    list(model.anytime(x))


@torch.no_grad()
def test_number_of_steps(rng: torch.Generator) -> None:
    """Blocks with shortcuts are fused layers: consecutive ones are one call, which ends where another layer follows."""
    blocks: list[list[LayerSpec]] = [
        [Conv(4), MaxPool(), BasicBlock(4)],
        [DenseBottleneck(8, 4, projection="branch"), BasicBlock(8, projection="branch")],
        [BasicBlock(9, stride=2), BasicBlock(9, activation="silu"), DenseBottleneck(9, 3)],
    ]
    model = build(FusedHNE, TREE, rng, blocks=blocks)
    x = images(rng, 2, SIZE)
    torch.testing.assert_close(model(x), PlainTree(model)(x))
    (program,) = model.folded._programs.values()
    lengths = [len(step.compute.layers) if isinstance(step.compute, K.FusedLayers) else None for step in program]
    assert lengths == [2 + 2 + 4 + 2 + 3, None, 3 + 1]


@each_case
@torch.no_grad()
def test_changes_of_each_tensor_are_noticed(blocks: list[list[LayerSpec]], rng: torch.Generator) -> None:
    model = build(FusedHNE, Hierarchy((1, 1, 2)), rng, blocks=blocks)
    x = images(rng, 2, SIZE)
    model(x)
    tensors = {**dict(model.named_parameters()), **_statistics(model)}
    for name, tensor in tensors.items():
        session = model.folded
        tensor.mul_(1.1)
        y = model(x)
        assert model.folded is not session, name
    torch.testing.assert_close(y, PlainTree(model)(x))


@each_case
@torch.no_grad()
def test_frozen_parameters(blocks: list[list[LayerSpec]], rng: torch.Generator) -> None:
    """Changes within the block take no effect in it: of tensors, and of the layers themselves."""
    model = build(FusedHNE, TREE, rng, blocks=blocks)
    x = images(rng, 2, SIZE)
    expected = model(x)
    changed = copy.deepcopy(model)
    with model.frozen_parameters():
        for tensor in (*model.parameters(), *_statistics(model).values()):
            tensor.mul_(1.5)
        for layer in (layer for block in model.layers_of_blocks() for layer in block):
            for name in layer._modules:
                layer._modules[name] = None
            layer.spec = Norm(activation="gelu")
        assert torch.equal(model(x), expected)
        torch.testing.assert_close(model(x, 4), expected[:4])
    for tensor in (*changed.parameters(), *_statistics(changed).values()):
        tensor.mul_(1.5)
    assert not torch.equal(changed(x), expected)


def test_backends(backend: Placement, rng: torch.Generator) -> None:
    """In float32, with all layers: logits with and without gradients, gradients, and inference."""
    blocks, size = (SMALL[:2], (9, 11)) if backend.interpreted else (SMALL, SIZE)  # the interpreter is slow
    tree = Hierarchy((1, 2, 4)[: len(blocks)])
    exact = build(FusedHNE, tree, rng, blocks=blocks)
    for training in (True,) if backend.interpreted else (False, True):
        exact.train(training)
        model, plain = copy.deepcopy(exact).float().to(backend.device), PlainTree(exact)
        x = images(rng, 3, size)
        y, expected = model(x.float().to(backend.device)), plain(x)
        _assert_near(y, expected, 1e-4)
        weights = torch.randn(expected.shape, generator=rng, dtype=expected.dtype)
        (y * weights.to(y)).sum().backward()
        (expected * weights).sum().backward()
        norm = torch.cat([g.flatten() for g in plain.gradients().values()]).norm()
        gradients = plain_gradients(plain, model)
        error = torch.cat([(gradients[name].cpu() - g).flatten() for name, g in plain.gradients().items()]).norm()
        assert error <= 1e-3 * norm
    exact.eval()
    with torch.no_grad():
        model = copy.deepcopy(exact).float().to(backend.device)
        expected = PlainTree(exact)(x)
        for n in range(1, tree.num_models + 1):
            _assert_near(model(x.float().to(backend.device), n), expected[:n], 1e-4)


def _assert_near(y: Tensor, expected: Tensor, tolerance: float) -> None:
    assert y.shape == expected.shape
    assert (y.detach().cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_autocast(training: bool, grad: bool, rng: torch.Generator) -> None:
    model = build(FusedHNE, TREE, rng, torch.float32, SMALL).train(training)
    x = images(rng, 8, SIZE, torch.float32)
    twin = copy.deepcopy(model).double()
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        expected = twin(x.double())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 0.2 * expected.norm()
    if grad:
        y.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@each_model
def test_an_empty_batch(kind: type[HNE], rng: torch.Generator) -> None:
    for training in (True, False):
        model = build(kind, TREE, rng, blocks=SMALL).train(training)
        before = {name: buffer.clone() for name, buffer in _statistics(model).items()}
        model(images(rng, 0, SIZE)).square().sum().backward()
        torch.testing.assert_close(_statistics(model), before)
        for parameter in model.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_second_derivatives_with_frozen_statistics(double: Placement, rng: torch.Generator) -> None:
    fused = build(FusedHNE, TREE, rng, blocks=SMALL).to(double.device)
    x = images(rng, 2, SIZE).to(double.device).requires_grad_()
    penalties = []
    for model in (fused, fused.to_naive()):
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), list(model.parameters()), allow_unused=True))
    for got, want in zip(*penalties, strict=True):
        assert (got is None or not got.any()) if want is None else torch.allclose(got, want)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_compiles_in_one_graph(training: bool, rng: torch.Generator) -> None:
    model = build(FusedHNE, Hierarchy((1, 1, 2)), rng, blocks=SMALL).train(training)
    twin = copy.deepcopy(model)
    x = images(rng, 4, SIZE)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected)
    if training:
        for logits in (y, expected):
            logits.square().sum().backward()
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        torch.testing.assert_close(dict(twin.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_exports_with_a_dynamic_batch(grad: bool, rng: torch.Generator) -> None:
    model = build(FusedHNE, TREE, rng, blocks=SMALL)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (images(rng, 3, SIZE),), dynamic_shapes=({0: batch},))
        for size in (1, 5):
            x = images(rng, size, SIZE)
            torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_transforms_and_traces(rng: torch.Generator) -> None:
    model = build(FusedHNE, TREE, rng, blocks=SMALL)
    x = images(rng, 3, SIZE)
    expected = model(x)
    mapped = torch.func.vmap(lambda image: model(image[None])[:, 0], out_dims=1)(x)
    torch.testing.assert_close(mapped, expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    other = {
        name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    y = torch.func.functional_call(model, other, (x,))
    model.load_state_dict(other)
    torch.testing.assert_close(y, model(x))


@torch.no_grad()
def test_hooks(rng: torch.Generator) -> None:
    """Hooks of layers and of called modules run in inference; those of modules that are read are errors."""
    model = build(FusedHNE, TREE, rng, blocks=SMALL)
    x = images(rng, 2, SIZE)
    expected = model(x)
    seen: list[nn.Module] = []
    bottleneck, norm = model.blocks[1][0], model.blocks[1][2]
    for module in (model.blocks[0][2], bottleneck.squeeze, norm):
        handle = module.register_forward_hook(lambda module, *_: seen.append(module))
        torch.testing.assert_close(model(x), expected)
        assert seen == [module]
        handle.remove()
        seen.clear()
        assert torch.equal(model(x), expected)
    for module, name in ((norm.norm, "blocks.1.2.norm"), (bottleneck.squeeze.reduce, "blocks.1.0.squeeze.reduce")):
        handle = module.register_forward_hook(lambda *_: None)
        for network in (model, model.to_naive()):
            with pytest.raises(SkippedModuleError, match=rf"{name}: a Branch\w+ is never called"):
                network(x)
        handle.remove()
    norm.norm.bn.register_forward_hook(lambda module, *_: seen.append(module))
    with pytest.raises(SkippedModuleError, match=r"blocks\.1\.2\.norm\.bn: its parameters are read"):
        model(x)
    naive = model.to_naive()
    torch.testing.assert_close(naive(x), expected)
    assert seen == [naive.blocks[1][2].norm.bn]


@torch.no_grad()
def test_a_replaced_module_is_named(rng: torch.Generator) -> None:
    model = build(FusedHNE, TREE, rng, blocks=SMALL)
    model.blocks[0][2].second = nn.Conv2d(4, 4, 3).double()
    with pytest.raises(SkippedModuleError, match="expected a ConvNorm, whose parameters are read; got Conv2d"):
        model(images(rng, 2, SIZE))


@torch.no_grad()
def test_single_batch_norms_in_training_mode(rng: torch.Generator) -> None:
    fused = build(FusedHNE, TREE, rng, blocks=SMALL)
    naive = fused.to_naive()
    x = images(rng, 4, SIZE)
    for training in (False, True, False):
        for model in (fused, naive):
            model.get_submodule("blocks.1.1.norm.bn").train(training)
        torch.testing.assert_close(fused(x), naive(x))
        torch.testing.assert_close(_statistics(fused), _statistics(naive))


@each_case
def test_macs(blocks: list[list[LayerSpec]], rng: torch.Generator) -> None:
    """Those of the naive model, of the fused one in inference, and of both in training."""
    model = build(FusedHNE, TREE, rng, blocks=blocks)
    naive, x = model.to_naive(), images(rng, 2, SIZE)
    for training in (False, True):
        for n in (1, 4, 6):
            for network in (naive, model):
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    network.train(training)(x, n)
                assert counter.get_total_flops() == 2 * 2 * model.macs(n, SIZE)


@each_case
def test_config(blocks: list[list[LayerSpec]]) -> None:
    for spec in (spec for block in blocks for spec in block):
        assert spec_from_config(spec.config()) == spec
        assert spec_from_config(spec.scaled(1.0).config()) == spec


def test_scaled() -> None:
    assert BasicBlock(8, squeeze=0).scaled(0.5) == BasicBlock(4)
    assert DenseBottleneck(8, 6, squeeze=3).scaled(0.1) == DenseBottleneck(1, 1, squeeze=1)
    assert MaxPool().scaled(0.5) == MaxPool()
    assert Norm(8).scaled(0.5) == Norm(4)


WRONG: dict[str, Callable[[], Any]] = {
    "BasicBlock.kernel_size must be odd, got 2": lambda: BasicBlock(4, kernel_size=2),
    "BasicBlock.squeeze must be at least 0, got -1": lambda: BasicBlock(4, squeeze=-1),
    "BasicBlock.projection must be one of shape, branch, got 'always'": lambda: BasicBlock(4, projection="always"),
    "BasicBlock.activation must be one of none, relu": lambda: BasicBlock(4, activation="tanh"),
    "DenseBottleneck.kernel_size must be odd, got 4": lambda: DenseBottleneck(4, 4, kernel_size=4),
    "DenseBottleneck.groups must be at least 1, got 0": lambda: DenseBottleneck(4, 4, groups=0),
    "DenseBottleneck.groups must divide DenseBottleneck.middle, got 3 and 4": lambda: DenseBottleneck(4, 4, groups=3),
    "PreActivation.kernel_size must be odd, got 6": lambda: PreActivation(4, kernel_size=6),
    "groups must divide the input and output channels of a branch, got 2 groups of 3 and 4 channels": lambda: (
        build_layer(Conv(4, groups=2), 3, 1, 1)
    ),
    "Norm.channels must be the number of channels of the input, 3, got 4": lambda: build_layer(Norm(4), 3, 1, 1),
    "Norm.channels must be at least 1, got 0": lambda: Norm(0),
    "MaxPool.channels must be the number of channels of the input, 3, got 4": lambda: build_layer(MaxPool(4), 3, 1, 1),
    "MaxPool.padding must be at most half of the window, 1, got 2": lambda: MaxPool(padding=2),
    "MaxPool.padding must be at least 0, got -1": lambda: MaxPool(padding=-1),
    "AveragePool.padding must be at most half of the window, 2, got 3": lambda: AveragePool(kernel_size=5, padding=3),
    "AveragePool.stride must be at least 1, got 0": lambda: AveragePool(stride=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_specs(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


@each_model
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_images_smaller_than_a_window(kind: type[HNE], grad: bool, rng: torch.Generator) -> None:
    model = build(kind, Hierarchy((1, 2)), rng, blocks=[[AveragePool(kernel_size=5)], [Conv(4)]])
    with torch.set_grad_enabled(grad):
        assert model(images(rng, 2, (5, 6))).shape == (2, 2, networks.NUM_CLASSES)
        with pytest.raises(ValueError, match="average pool 5x5/2: expected feature maps of at least 5x5, got 4x6"):
            model(images(rng, 2, (4, 6)))

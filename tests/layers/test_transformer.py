"""Vision transformers: they compute the same as ``nn.MultiheadAttention`` and ``nn.LayerNorm`` in each branch."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import NUM_CLASSES, each_model, each_tree, images
from placements import Placement
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from transformer_models import SIZE, TRANSFORMERS, build, plain_logits

from hne import (
    HNE,
    Bottleneck,
    Conv,
    FusedHNE,
    Hierarchy,
    LayerNorm,
    NaiveHNE,
    PatchEmbedding,
    SelectToken,
    TransformerBlock,
)
from hne.layers import Layer, SkippedModuleError, build_layer
from hne.models import checkpoint


@pytest.fixture(params=[True, False], ids=["grad", "no-grad"])
def grad(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The test runs with and without gradients."""
    with torch.set_grad_enabled(request.param):
        yield request.param


each_network = pytest.mark.parametrize("name", TRANSFORMERS)
TREE = Hierarchy((1, 2, 2), num_models=6)  # several heads on a branch, and blocks that branch or do not


@each_tree
@each_network
def test_same_as_plain_pytorch(name: str, tree: Hierarchy, rng: torch.Generator) -> None:
    """Logits and all gradients, in plain PyTorch, on the kernels, and for inference."""
    naive = build(NaiveHNE, name, tree, rng)
    fused = naive.to_fused()
    x, weight = images(rng, 2, SIZE), torch.randn(tree.num_models, 2, NUM_CLASSES, generator=rng, dtype=torch.float64)
    expected = plain_logits(naive, x)
    grads = torch.autograd.grad((expected * weight).sum(), list(naive.parameters()))
    for model in (naive, fused):
        y = model.train()(x)
        torch.testing.assert_close(y, expected)
        for got, want in zip(torch.autograd.grad((y * weight).sum(), list(model.parameters())), grads, strict=True):
            torch.testing.assert_close(got, want)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
            for n, mean in model.anytime(x):
                torch.testing.assert_close(model(x, n), expected[:n])
                torch.testing.assert_close(mean, expected[:n].mean(0))
            sizes = tuple(range(1, tree.num_models + 1))
            torch.testing.assert_close(
                model.prefix_logits(x, sizes), torch.stack([expected[:n].mean(0) for n in sizes])
            )


@each_network
def test_backends_and_dtypes(name: str, placement: Placement, rng: torch.Generator) -> None:
    if placement.interpreted and placement.dtype != torch.float32:
        pytest.skip("Triton's interpreter is slow: only float32")
    exact = build(NaiveHNE, name, TREE, rng)
    x = images(rng, 3, SIZE)
    expected = plain_logits(exact, x)
    model = exact.to_fused().to(placement.device, placement.dtype)
    x = x.to(placement.device, placement.dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(placement.dtype, 0.06)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(x)
        assert y.dtype == placement.dtype
        assert (y.detach().cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()


@each_network
@each_model
def test_autocast(kind: type[HNE], name: str, rng: torch.Generator, grad: bool) -> None:
    model = build(kind, name, TREE, rng, torch.float32)
    x = images(rng, 2, SIZE, torch.float32)
    expected = plain_logits(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert (y.detach().double() - expected).abs().max() <= 0.06 * expected.abs().max()
    assert not torch.equal(y.float(), model(x))  # it did compute in bfloat16
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)  # its folded weights are in float32
    if grad:
        y.float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("batch", [0, 1])
@each_network
@each_model
def test_small_batches(kind: type[HNE], name: str, batch: int, rng: torch.Generator, grad: bool) -> None:
    model = build(kind, name, TREE, rng)
    x = images(rng, batch, SIZE)
    y = model(x)
    torch.testing.assert_close(y, plain_logits(model, x))
    if grad:
        y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@each_model
def test_among_convolutions(kind: type[HNE], rng: torch.Generator, grad: bool) -> None:
    """Every pixel of a feature map is a token; features that a convolution left unnormalised are read right."""
    blocks = [[Conv(8, stride=2)], [TransformerBlock(8, 2, 9), LayerNorm(), Bottleneck(6, 4)], [LayerNorm(), Conv(4)]]
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    model = kind(Hierarchy((1, 2, 4)), blocks, num_classes=3).double()
    x = images(rng, 3, (7, 10))
    for training in (True, False):
        model.train(training)
        other = model.to_naive() if kind is FusedHNE else model.to_fused()
        torch.testing.assert_close(model(x), other(x))


# Cost -----------------------------------------------------------------------------------------------------------------


@each_tree
@each_network
@each_model
def test_macs_are_the_computed_ones(kind: type[HNE], name: str, tree: Hierarchy, rng: torch.Generator) -> None:
    model = build(kind, name, tree, rng)
    x = images(rng, 2, SIZE)
    for n in range(1, tree.num_models + 1):
        # Attention as two matrix products: PyTorch counts nothing for its fused kernel on a CPU.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(x, n)
        assert counter.get_total_flops() == 2 * 2 * model.macs(n, SIZE)


# Parameters -----------------------------------------------------------------------------------------------------------


def test_initial_parameters() -> None:
    """As in DeiT, torchvision and timm; every branch is drawn for itself."""
    torch.manual_seed(0)
    block = TransformerBlock(64, 4, 128, layer_scale=True)
    model = FusedHNE(Hierarchy((2, 4)), [[PatchEmbedding(64, 8, 32), block], [block, LayerNorm()]], num_classes=2)
    first, second = model.layers_of_blocks()
    deviations = {
        "conv.conv.weight": (3 * 64) ** -0.5,
        "class_token.weight": 0.02,
        "position.weight": 0.02,
        **{f"{name}.conv.weight": 0.02 for name in ("qkv", "project", "up", "down")},
    }
    constants = {"norm1.weight": 1, "norm2.weight": 1, "norm.weight": 1, "scale1.weight": 1e-5, "scale2.weight": 1e-5}
    for layer in (*first, *second):
        for name, parameter in layer.named_parameters():
            if name in deviations:
                spread = parameter.detach().flatten()
                assert abs(spread.mean()) < 0.3 * deviations[name]
                assert abs(spread.std() / deviations[name] - 1) < 0.3
                assert not torch.equal(parameter[: len(parameter) // 2], parameter[len(parameter) // 2 :])
            else:
                torch.testing.assert_close(parameter, torch.full_like(parameter, constants.get(name, 0)))
    with torch.no_grad():
        before = copy.deepcopy(model.state_dict())
        for parameter in model.parameters():
            parameter.fill_(7)
    torch.manual_seed(0)
    model.reset_parameters()
    assert not any((parameter == 7).all() for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()


def test_names_of_the_state() -> None:
    """Checkpoints depend on these names and shapes."""
    with torch.device("meta"):
        patches = build_layer(PatchEmbedding(6, 2, 4), 3, 2, 2)
        block = build_layer(TransformerBlock(6, 3, 8, layer_scale=True), 6, 2, 1)
        norm = build_layer(LayerNorm(), 6, 2, 1)
        token = build_layer(SelectToken(), 6, 2, 1)
    assert _shapes(patches) == {
        "conv.conv.weight": (12, 3, 2, 2),
        "conv.conv.bias": (12,),
        "class_token.weight": (2, 1, 6),
        "position.weight": (2, 5, 6),
    }
    linears = {"qkv": (36, 6), "project": (12, 6), "up": (16, 6), "down": (12, 8)}
    assert _shapes(block) == {
        **{f"{name}.conv.weight": (*shape, 1, 1) for name, shape in linears.items()},
        **{f"{name}.conv.bias": shape[:1] for name, shape in linears.items()},
        **{f"norm{i}.{name}": (12,) for i in (1, 2) for name in ("weight", "bias")},
        **{f"scale{i}.weight": (12,) for i in (1, 2)},
    }
    assert _shapes(norm) == {"norm.weight": (12,), "norm.bias": (12,)}
    assert _shapes(token) == {}


def _shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in layer.state_dict().items()}


@each_network
@each_model
def test_config_and_copies(kind: type[HNE], name: str, rng: torch.Generator, tmp_path: Any) -> None:
    model = build(kind, name, TREE, rng)
    twin = kind.from_config(json.loads(json.dumps(model.config())))
    assert twin.config() == model.config()
    twin.double().eval().load_state_dict(model.state_dict())
    checkpoint.save(tmp_path / "model.safetensors", checkpoint.model_tensors(model), {"model": model.config()})
    loaded, _ = checkpoint.load_model(tmp_path / "model.safetensors", naive=kind is NaiveHNE)
    x = images(rng, 2, SIZE)
    with torch.no_grad():
        expected = model(x)
        for other in (twin, loaded.double(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("name", ["class token", "mean of tokens"])  # whose logits depend on all parameters
def test_folded_weights_follow_the_parameters(name: str, rng: torch.Generator) -> None:
    model = build(FusedHNE, name, TREE, rng)
    x = images(rng, 2, SIZE)
    with torch.no_grad():
        before = model(x)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype), alpha=0.1)
            after = model(x)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, model.to_naive()(x))
            before = after
        with model.frozen_parameters():
            torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("name", ["norm1", "scale2", "position"])
@each_model
def test_modules_that_are_read(kind: type[HNE], name: str, rng: torch.Generator, grad: bool) -> None:
    """Hooks that would not run and modules of another kind are errors; a parametrization is computed."""
    model = build(kind, "class token", TREE, rng)
    x = images(rng, 2, SIZE)
    layer, path = (model.blocks[0][0], "blocks.0.0") if name == "position" else (model.blocks[1][0], "blocks.1.0")
    module = getattr(layer, name)
    handle = module.register_forward_hook(lambda *_: None)
    with pytest.raises(SkippedModuleError, match=rf"^{path}\.{name}: a {type(module).__name__} is never called"):
        model(x)
    handle.remove()
    before = model(x)
    setattr(layer, name, nn.Identity())
    with pytest.raises(SkippedModuleError, match=rf"expected a {type(module).__name__}.* got Identity"):
        model(x)
    setattr(layer, name, module)
    parametrize.register_parametrization(module, "weight", _Half())
    module.parametrizations.weight.original.data.mul_(2)
    model.eval()
    torch.testing.assert_close(model(x), before)
    with pytest.raises(SkippedModuleError, match="cannot initialise a pruned or parametrized weight"):
        model.reset_parameters()


class _Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


# Compiled and exported programs ---------------------------------------------------------------------------------------


def test_compiles_in_one_graph(rng: torch.Generator, grad: bool) -> None:
    torch._dynamo.reset()
    model = build(FusedHNE, "class token", Hierarchy((1, 1, 2)), rng, torch.float32)
    twin = copy.deepcopy(model)
    x = images(rng, 2, SIZE, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # without code generation, which is slow
    y, expected = compiled(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    if grad:
        for logits in (y, expected):
            logits.square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-3 * q.grad.abs().max() + 1e-5
    torch._dynamo.reset()


@each_model
def test_exports_with_a_dynamic_batch(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, "class token", Hierarchy((1, 1, 2)), rng, torch.float32)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (images(rng, 3, SIZE, torch.float32),), dynamic_shapes=({0: batch},))
        for size in (1, 5):
            x = images(rng, size, SIZE, torch.float32)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_transforms(rng: torch.Generator) -> None:
    model = build(FusedHNE, "class token", Hierarchy((1, 1, 2)), rng)
    x = images(rng, 3, SIZE)
    mapped = torch.func.vmap(lambda image: model(image[None])[:, 0], out_dims=1)(x)
    torch.testing.assert_close(mapped, model(x))
    other = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    y = torch.func.functional_call(model, other, (x,))
    model.load_state_dict(other)
    torch.testing.assert_close(y, plain_logits(model, x))


def test_second_derivatives(rng: torch.Generator) -> None:
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    blocks = [[PatchEmbedding(6, 3, 6), TransformerBlock(6, 2, 5, layer_scale=True), LayerNorm()]]
    model = FusedHNE(Hierarchy((2,)), blocks, num_classes=2).double()
    for module in (block := model.blocks[0][1]).scale1, block.scale2:
        nn.init.ones_(module.weight)
    x = images(rng, 1, (6, 6)).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(model, x, fast_mode=True)


# Errors ---------------------------------------------------------------------------------------------------------------


@each_model
def test_another_image_size(kind: type[HNE], rng: torch.Generator, grad: bool) -> None:
    model = build(kind, "class token", TREE, rng)
    message = r"position embedding is for an input of 9x9 pixels \(PatchEmbedding.image_size\), got 9x11"
    with pytest.raises(ValueError, match=message):
        model(images(rng, 2, (9, 11)))  # as many patches as for 9x9
    with pytest.raises(ValueError, match=message):
        model.macs(1, (9, 11))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PatchEmbedding(0), ValueError, "PatchEmbedding.channels must be at least 1, got 0"),
        (lambda: PatchEmbedding(4, 0), ValueError, "PatchEmbedding.patch_size must be at least 1, got 0"),
        (lambda: PatchEmbedding(4, image_size=8.0), TypeError, r"PatchEmbedding.image_size must be an int, got 8\.0"),
        (lambda: PatchEmbedding(4, 5, 12), ValueError, "image_size must be a multiple of patch_size = 5, got 12"),
        (lambda: PatchEmbedding(4, class_token=1), TypeError, "PatchEmbedding.class_token must be a bool, got 1"),
        (lambda: TransformerBlock(None, 1, 4), TypeError, "TransformerBlock.channels must be an int, got None"),
        (lambda: TransformerBlock(4, 0, 4), ValueError, "TransformerBlock.heads must be at least 1, got 0"),
        (lambda: TransformerBlock(4, 3, 4), ValueError, "heads must divide TransformerBlock.channels, got 3 and 4"),
        (lambda: TransformerBlock(4, 2, 0), ValueError, "TransformerBlock.hidden must be at least 1, got 0"),
        (lambda: TransformerBlock(4, 2, 4, "elu"), ValueError, "must be one of none, relu, .*got 'elu'"),
        (lambda: TransformerBlock(4, 2, 4, layer_scale=0.1), TypeError, r"layer_scale must be a bool, got 0\.1"),
        (lambda: TransformerBlock(4, 2, 4, eps=0), ValueError, "TransformerBlock.eps must be positive, got 0"),
        (lambda: TransformerBlock(192, 3, 768).scaled(0.2), ValueError, "heads must divide .*got 3 and 38"),
        (lambda: LayerNorm(eps="small"), TypeError, "LayerNorm.eps must be a number, got 'small'"),
        (lambda: LayerNorm(0), ValueError, "LayerNorm.channels must be at least 1, got 0"),
        (lambda: SelectToken(index=-1), ValueError, "SelectToken.index must be at least 0, got -1"),
        (lambda: build_layer(LayerNorm(5), 4, 1, 1), ValueError, "channels of the input, 4, got 5"),
        (lambda: build_layer(SelectToken(5), 4, 1, 1), ValueError, "channels of the input, 4, got 5"),
        (lambda: build_layer(TransformerBlock(6, 3, 5), 4, 1, 1), ValueError, "channels of the input, 4, got 6"),
        (lambda: build_layer(SelectToken(index=6), 4, 1, 1).output_size((2, 3)), ValueError, "of tokens, 6, got 6"),
    ],
)
def test_bad_specs(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@each_model
def test_a_token_that_is_not_there(kind: type[HNE], rng: torch.Generator, grad: bool) -> None:
    model = kind(Hierarchy((1,)), [[PatchEmbedding(4, 3, 9), SelectToken(index=10)]], num_classes=2).double().eval()
    with pytest.raises(ValueError, match=r"SelectToken\.index must be below the number of tokens, 10, got 10"):
        model(images(rng, 2, SIZE))


def test_scaled_channels() -> None:
    half = TransformerBlock(12, 3, 20).scaled(0.5)
    assert (half.channels, half.heads, half.hidden) == (6, 3, 10)
    assert LayerNorm().scaled(0.5) == LayerNorm()
    assert LayerNorm(12).scaled(0.5) == LayerNorm(6)

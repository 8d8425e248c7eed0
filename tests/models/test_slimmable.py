"""A slimmable model at a width computes what a network with fewer channels and copied weights computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from networks import BLOCKS, IN_CHANNELS, NUM_CLASSES, TREES, build, each_model, images
from placements import Placement
from torch import Tensor, nn

import hne_kernels as K
from hne import HNE, FusedHNE, Hierarchy, NaiveHNE
from hne.executors import ParameterVersions
from hne.layers import BasicBlock, Bottleneck, Conv, DenseBottleneck, MaxPool, Module, Norm, PreActivation
from hne.layers.submodules import SkippedModuleError
from hne.models import checkpoint, scaled

RESIDUAL = [
    [Conv(7, activation="none", norm=False, bias=False), MaxPool()],
    [PreActivation(10, stride=2), PreActivation(10), Norm()],
    [BasicBlock(12, squeeze=4), DenseBottleneck(13, 6, stride=2)],
]


def slimmable(
    kind: type[HNE],
    rng: torch.Generator,
    tree: Hierarchy = TREES["odd"],
    dtype: torch.dtype = torch.float64,
    blocks: list = BLOCKS,
    widths: tuple[float, ...] = (0.3, 0.5, 1),
) -> HNE:
    """A model with different, calibrated statistics at each width."""
    model = build(kind, tree, rng, dtype, blocks).set_widths_(widths)
    return model.calibrate_widths_([images(rng, 4, dtype=dtype), images(rng, 5, dtype=dtype)])


def leading(tensor: Tensor, shape: torch.Size, branches: int) -> Tensor:
    """The first channels of each branch of a parameter, for a parameter of ``shape``."""
    part = tensor.unflatten(0, (branches, -1))[:, : shape[0] // branches]
    return part[:, :, : shape[1]].flatten(0, 1) if len(shape) > 1 else part.flatten(0, 1)


def branches_of(model: HNE, name: str) -> int:
    """The number of branches of a parameter by its name."""
    first, block, *_ = name.split(".")
    return model.num_models if first == "head" else model.hierarchy.branches[int(block)]


def narrow_copy(model: HNE, width: float, blocks: list = BLOCKS) -> HNE:
    """An independent network with fewer channels, in plain PyTorch, with copies of the weights and statistics."""
    small = NaiveHNE(
        model.hierarchy, scaled(blocks, width), num_classes=NUM_CLASSES, in_channels=IN_CHANNELS
    ).to(torch.float64)  # fmt: skip
    state = model.state_dict()
    number = model.widths.index(width)
    for name, tensor in small.state_dict().items():
        if "running" in name or "num_batches" in name:
            tensor.copy_(state[f"narrow.{number}.{name}"])
        else:
            tensor.copy_(leading(state[name].double(), tensor.shape, branches_of(model, name)))
    return small.train(model.training)


@each_model
@pytest.mark.parametrize("blocks", [BLOCKS, RESIDUAL], ids=["bottlenecks", "residual"])
def test_inference(kind: type[HNE], blocks: list, rng: torch.Generator) -> None:
    model = slimmable(kind, rng, blocks=blocks)
    x = images(rng)
    for width in (0.3, 0.5):
        small = narrow_copy(model, width, blocks)
        with torch.no_grad():
            want = small(x)
            for n in (6, 4, 1):
                torch.testing.assert_close(model(x, num_models=n, width=width), want[:n])
            sizes = (1, 2, 5)
            torch.testing.assert_close(model.prefix_logits(x, sizes, width=width), small.prefix_logits(x, sizes))
            for n, mean in model.anytime(x, width=width):
                torch.testing.assert_close(mean, want[:n].mean(0))
        torch.testing.assert_close(model(x, num_models=5, width=width), want[:5])  # with gradients: not folded
        for n in (6, 4, 1):
            assert model.macs(n, (9, 12), width=width) == small.macs(n, (9, 12))
    with torch.no_grad():
        assert torch.equal(model(x, width=1), model(x))
        for other in (model.to_naive(), model.to_fused()):
            torch.testing.assert_close(other(x, width=0.5), want)


@each_model
@pytest.mark.parametrize("blocks", [BLOCKS, RESIDUAL], ids=["bottlenecks", "residual"])
@pytest.mark.parametrize("num_models", [6, 4])
def test_training(kind: type[HNE], blocks: list, num_models: int, rng: torch.Generator) -> None:
    """Gradients are those of the narrow network, at their places, and zero elsewhere."""
    model, width = slimmable(kind, rng, blocks=blocks).train(), 0.5
    small = narrow_copy(model, width, blocks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(rng, 4)
    got, want = model(x, num_models, width=width), small(x, num_models)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn(want.shape, generator=rng, dtype=torch.float64)
    got.backward(cotangent)
    want.backward(cotangent)
    for name, parameter in small.named_parameters():
        full = model.get_parameter(name).grad
        assert full is not None
        expected = torch.zeros_like(full)
        leading_view = expected.unflatten(0, (branches_of(model, name), -1))
        part = parameter.grad.unflatten(0, (branches_of(model, name), -1))
        leading_view[tuple(slice(size) for size in part.shape)] = part
        torch.testing.assert_close(full, expected, msg=lambda text, name=name: f"{name}: {text}")
    for name, tensor in model.state_dict().items():  # running statistics are not those of training
        assert torch.equal(tensor, before[name]), name


def test_backends(backend: Placement, rng: torch.Generator) -> None:
    blocks = [[Conv(6)], [Bottleneck(8, 5, stride=2)]]
    with K.use_backend("reference"):  # on the CPU
        model = slimmable(FusedHNE, rng, Hierarchy((1, 3)), torch.float32, blocks)
        small = narrow_copy(model, 0.5, blocks)
    x = images(rng, 2, (4, 3), torch.float32)
    model, there = model.to(backend.device), x.to(backend.device)
    with torch.no_grad():
        y, want = model(there, width=0.5), small(x.double())
        torch.testing.assert_close(y.cpu().double(), want, rtol=1e-4, atol=1e-4)
    y, want = model.train()(there, width=0.5), small.train()(x.double())
    torch.testing.assert_close(y.cpu().double(), want, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    want.square().sum().backward()
    gradient = model.blocks[0][0].unit.conv.weight.grad[:3].cpu().double()
    torch.testing.assert_close(gradient, small.blocks[0][0].unit.conv.weight.grad, rtol=1e-3, atol=1e-3)


def test_one_channel(rng: torch.Generator) -> None:
    """Every count of channels rounds to 1."""
    blocks = [[Conv(6, stride=2), Conv(8, kernel_size=1)], [Bottleneck(8, 4), Bottleneck(10, 4, stride=2)]]
    model = slimmable(FusedHNE, rng, Hierarchy((1, 3)), blocks=blocks, widths=(0.01,))
    x = images(rng)
    with torch.no_grad():
        torch.testing.assert_close(model(x, width=0.01), narrow_copy(model, 0.01, blocks)(x))


def test_depthwise_convolutions(rng: torch.Generator) -> None:
    """A convolution with a group for each channel, as MobileNetV2 begins with; down to one channel."""
    blocks = [[Conv(8, stride=2), Conv(8, groups=8)], [Conv(10, kernel_size=1), Conv(5, groups=5)]]
    model = slimmable(FusedHNE, rng, Hierarchy((1, 3)), blocks=blocks, widths=(0.1, 0.6))
    x = images(rng)
    for width in (0.1, 0.6):
        small = narrow_copy(model, width, blocks)
        with torch.no_grad():
            torch.testing.assert_close(model(x, width=width), small(x))
        torch.testing.assert_close(model(x, 2, width=width), small(x, 2))


def inverted(in_channels: int, channels: int, stride: int) -> Bottleneck:
    options = {"activation": "relu6", "final_activation": "none", "projection": False}
    return Bottleneck(channels, 6 * in_channels, stride=stride, **options)


def mobilenet_v2(first: int, channels: Sequence[int], last: int) -> list:
    """MobileNetV2 (Sandler et al., CVPR 2018, Table 2) with these channels."""
    layers = [Conv(first, stride=2, activation="relu6"), Conv(first, groups=first, activation="relu6")]
    layers.append(Conv(channels[0], kernel_size=1, activation="none"))
    for before, after, count, stride in zip(
        channels, channels[1:], (2, 3, 4, 3, 3, 1), (2, 2, 2, 1, 2, 1), strict=False
    ):
        layers += [inverted(after if i else before, after, 1 if i else stride) for i in range(count)]
    return [[*layers, Conv(last, kernel_size=1, activation="relu6")]]


def test_multiply_adds_of_a_us_net() -> None:
    """MobileNetV2 at 224 x 224. US-Nets (Yu & Huang 2019; the table of their model zoo) and MobileNetV2 have 300, 209,
    97 and 59 M for widths 1, 0.75, 0.5 and 0.35. They round channels to multiples of 8 (upwards at a loss of 10 %), and
    keep the last 1280. Here channels are rounded to the nearest number, and the last ones are scaled, too: full width
    is the same, smaller widths have less.
    """

    def published(count: int, width: float) -> int:
        rounded = max(8, int(count * width + 4) // 8 * 8)
        return rounded + 8 * (rounded < 0.9 * count * width)

    channels = (16, 24, 32, 64, 96, 160, 320)

    def net(first: int, channels: Sequence[int], last: int) -> FusedHNE:
        return FusedHNE(Hierarchy((1,)), mobilenet_v2(first, channels, last), num_classes=1000)

    with torch.device("meta"):
        model = net(32, channels, 1280).set_widths_([0.35, 0.5, 0.75])
        for width, macs, ours in ((1, 300, 300.8), (0.75, 209, 175.3), (0.5, 97, 83.4), (0.35, 59, 44.1)):
            theirs = net(published(32, width), [published(count, width) for count in channels], 1280)
            assert abs(theirs.macs(1, 224) / 1e6 - macs) < 1
            assert model.macs(1, 224, width=width) / 1e6 == pytest.approx(ours, abs=0.1)


def test_statistics_are_those_of_all_batches(rng: torch.Generator) -> None:
    model = build(FusedHNE, TREES["odd"], rng).set_widths_([0.5])
    batches = [images(rng, 4), images(rng, 4)]
    with torch.no_grad():
        first = [torch.nn.functional.conv2d(x, model.blocks[0][0].unit.conv.weight[:3], None, 2, 1) for x in batches]
    model.calibrate_widths_(batches)
    bn = model.narrow[0].blocks[0][0].unit.bn
    torch.testing.assert_close(bn.running_mean, torch.cat(first).mean((0, 2, 3)))
    variances = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in first])
    torch.testing.assert_close(bn.running_var, variances.mean(0))
    assert not model.training


def test_changed_weights_are_noticed(rng: torch.Generator) -> None:
    model, x = slimmable(FusedHNE, rng), images(rng)
    small, full = narrow_copy(model, 0.5), copy.deepcopy(model)
    with torch.no_grad():
        model(x, width=0.5)
        session = model.narrow[1].folded
        model(x, width=0.5)
        assert model.narrow[1].folded is session  # the folded weights are kept
        model.blocks[1][0].expand.conv.weight.mul_(2)
        small.blocks[1][0].expand.conv.weight.mul_(2)
        torch.testing.assert_close(model(x, width=0.5), small(x))
        model.narrow[1].blocks[0][0].unit.bn.running_mean.add_(1)
        small.blocks[0][0].unit.bn.running_mean.add_(1)
        torch.testing.assert_close(model(x, width=0.5), small(x))
        assert not torch.equal(full(x, width=0.5), model(x, width=0.5))  # a copy has weights of its own
        model.head = copy.deepcopy(full.head)
        assert model(x, width=0.5).isfinite().all()


@torch.no_grad()
def test_frozen_parameters_hold_for_every_width(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    model, x = slimmable(FusedHNE, rng), images(rng)
    before = model(x, width=0.5)
    model.head.conv.bias.add_(1)
    with model.frozen_parameters() as same:
        assert same is model
        frozen = model(x, width=0.5)
        assert not torch.equal(frozen, before), "a change before the block takes effect in it"
        model(x)
        with monkeypatch.context() as patched:
            patched.setattr(ParameterVersions, "is_current", lambda _: pytest.fail("parameters were checked"))
            model(x)
            assert torch.equal(model(x, width=0.5), frozen)
            list(model.anytime(x, width=0.5))
        model.head.conv.bias.add_(1)
        assert torch.equal(model(x, width=0.5), frozen)
        assert not copy.deepcopy(model).narrow[1].freeze_depth
    assert not torch.equal(model(x, width=0.5), frozen), "a change within the block takes effect after it"


@each_model
def test_checkpoint(kind: type[HNE], rng: torch.Generator, tmp_path: Path) -> None:
    model, x = slimmable(kind, rng, dtype=torch.float32), images(rng, dtype=torch.float32)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, checkpoint.model_tensors(model), {"model": model.config()})
    loaded, _ = checkpoint.load_model(path, naive=kind is NaiveHNE)
    assert loaded.widths == (0.3, 0.5, 1)
    copied = kind.from_config(model.config()).eval()
    with pytest.raises(RuntimeError, match=r"width 0.3 has no batch-norm statistics yet: call calibrate_widths_"):
        copied(x, width=0.3)
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        for other in (loaded, copied):
            torch.testing.assert_close(other(x, width=0.3), model(x, width=0.3))
    uncalibrated = model.set_widths_([0.4])
    copied = kind.from_config(model.config()).eval()
    copied.load_state_dict(uncalibrated.state_dict())
    with pytest.raises(RuntimeError, match=r"no batch-norm statistics"):
        copied(x, width=0.4)


def test_an_ordinary_model_stays_one(rng: torch.Generator) -> None:
    model = build(FusedHNE, TREES["odd"], rng)
    before, config = set(model.state_dict()), model.config()
    model.set_widths_([0.5])
    assert set(model.state_dict()) > before
    assert model.config() == {**config, "widths": [0.5, 1.0]}
    model.set_widths_([])
    assert set(model.state_dict()) == before
    assert model.config() == config


@each_model
def test_forgotten_statistics(kind: type[HNE], rng: torch.Generator) -> None:
    """PyTorch's own functions know nothing of widths; the full width has its statistics again, the others have none."""
    model = slimmable(kind, rng)
    torch.optim.swa_utils.update_bn([images(rng)], model)
    model.eval()(images(rng))
    with pytest.raises(RuntimeError, match=r"no batch-norm statistics"):
        model(images(rng), width=0.5)
    model.calibrate_widths_([images(rng)])(images(rng), width=0.5)
    model.reset_parameters()
    with pytest.raises(RuntimeError, match=r"no batch-norm statistics"):
        model(images(rng), width=0.5)


@each_model
def test_slim(kind: type[HNE], rng: torch.Generator) -> None:
    model, x = slimmable(kind, rng), images(rng)
    state = torch.get_rng_state()
    small = model.slim(0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(small) is kind
    assert small.config()["blocks"] == narrow_copy(model, 0.5).config()["blocks"]
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x, width=0.5))
        torch.testing.assert_close(model.slim(1)(x), model(x))
        want = small(x).clone()
        model.head.conv.weight.zero_()
        assert torch.equal(small(x), want)


def test_wrong_widths(rng: torch.Generator) -> None:
    model, x = build(FusedHNE, TREES["odd"], rng), images(rng)
    with pytest.raises(ValueError, match=r"the model is not slimmable, call set_widths_\(\[0.5\]\) first"):
        model(x, width=0.5)
    with pytest.raises(ValueError, match=r"calibrate_widths_: the model is not slimmable"):
        model.calibrate_widths_([x])
    for widths, error, message in (
        ([0.5, 0.5], ValueError, "widths must differ, got 0.5, 0.5"),
        ([0.0], ValueError, "width must be above 0 and at most 1, got 0"),
        ([1.5], ValueError, "width must be above 0 and at most 1, got 1.5"),
        (["0.5"], TypeError, "width must be a number, got '0.5'"),
        ([True], TypeError, "width must be a number, got True"),
    ):
        with pytest.raises(error, match=message):
            model.set_widths_(widths)
        assert model.widths == ()
    model.set_widths_([0.5])
    with pytest.raises(RuntimeError, match=r"width 0.5 has no batch-norm statistics yet: call calibrate_widths_"):
        model(x, width=0.5)
    with pytest.raises(ValueError, match=r"batches: expected at least one batch"):
        model.calibrate_widths_([])
    with pytest.raises(RuntimeError, match=r"no batch-norm statistics"):
        model.anytime(x, width=0.5)
    with pytest.raises(ValueError, match=r"width must be one of 0.5, 1 for inference, got 0.7"):
        model.prefix_logits(x, width=0.7)
    with pytest.raises(TypeError, match=r"width must be a number, got '0.5'"):
        model.macs(1, 9, width="0.5")
    inverted = Bottleneck(8, 4, projection=False)
    for width, layer, error, message in (
        (0.5, Module(nn.Conv2d(6, 4, 1)), ValueError, "modules of other classes"),
        (0.5, Conv(8, groups=2), ValueError, r"blocks.0.1 .*: a convolution in groups has no slices of channels"),
        (0.01, inverted, ValueError, r"blocks.0.1 .*: with so few .* another shortcut: expected a larger width"),
    ):
        net = FusedHNE(Hierarchy((1,)), [[Conv(6), layer]], num_classes=NUM_CLASSES)
        with pytest.raises(error, match=message):
            net.set_widths_([width])
        assert net.widths == ()
    slim = slimmable(FusedHNE, rng)
    handle = slim.blocks[1][0].register_forward_hook(lambda *_: None)
    with pytest.raises(SkippedModuleError, match=r"blocks.1.0: its hooks run at full width only: .* without width=0.5"):
        slim(x, width=0.5)
    handle.remove()
    slim(x, width=0.5)
    vit = FusedHNE.from_preset("hne_vit_tiny", num_classes=3, num_models=1)
    with pytest.raises(TypeError, match="expected a module with slices of channels"):
        vit.set_widths_([0.5])

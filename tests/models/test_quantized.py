"""Networks in int8: close to float32, the same leaf by leaf, in files, and what cannot be converted."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from networks import BLOCKS, IN_CHANNELS, NUM_CLASSES, TREES, build, each_tree
from torch import Tensor

from hne import AnytimePredictor, BasicBlock, Bottleneck, Conv, FusedHNE, Hierarchy, PoolLinear, QuantizedHNE, quantize
from hne.errors import CheckpointError
from hne.models import checkpoint


def images(rng: torch.Generator, batch: int = 4) -> Tensor:
    return torch.randn(batch, IN_CHANNELS, 13, 11, generator=rng)


def network(rng: torch.Generator, tree: str = "doubling") -> tuple[FusedHNE, QuantizedHNE, Tensor]:
    model = build(FusedHNE, TREES[tree], rng, torch.float32)
    x = images(rng)
    return model, quantize(model, x), x


@each_tree
@torch.inference_mode()
def test_close_to_float(tree: Hierarchy, rng: torch.Generator) -> None:
    model = build(FusedHNE, tree, rng, torch.float32)
    x = images(rng, 8)
    quantized = quantize(model, [x[:3], x[3:]])
    expected, computed = model(x), quantized(x)
    assert computed.shape == expected.shape
    assert computed.dtype == torch.float32
    assert (computed - expected).norm() < 0.3 * expected.norm()  # usually 0.02 to 0.04


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@torch.inference_mode()
def test_a_convolution_is_as_precise_as_its_steps(activation: str, rng: torch.Generator) -> None:
    blocks = [[Conv(7, activation=activation)], [PoolLinear(9, activation=activation)]]
    model = build(FusedHNE, Hierarchy((1, 2)), rng, torch.float32, blocks)
    x = images(rng)
    expected, computed = model(x), quantize(model, x)(x)
    assert (computed - expected).abs().max() < 0.05 * (expected.amax() - expected.amin())


@each_tree
@torch.inference_mode()
def test_smaller_ensembles_and_anytime_compute_the_same(tree: Hierarchy, rng: torch.Generator) -> None:
    quantized = quantize(build(FusedHNE, tree, rng, torch.float32), images(rng))
    x = images(rng)
    members = quantized(x)
    for n in range(1, tree.num_models + 1):
        assert torch.equal(quantized(x, n), members[:n])
    steps = quantized.anytime(x)
    for n, mean in steps:
        assert steps.member is not None
        assert torch.equal(steps.member, members[n - 1])
        torch.testing.assert_close(mean, members[:n].mean(0))
    sizes = quantized.prefix_sizes
    torch.testing.assert_close(quantized.prefix_logits(x), torch.stack([members[:n].mean(0) for n in sizes]))
    assert torch.equal(quantized(x.to(memory_format=torch.channels_last)), members)
    for batch in (0, 1):
        assert torch.equal(quantized(x[:batch]), members[:, :batch])


@torch.inference_mode()
def test_samples_leave_the_batch(rng: torch.Generator) -> None:
    _, quantized, x = network(rng)
    members = quantized(x)
    steps = quantized.anytime(x)
    next(steps)
    steps.select(torch.tensor([2, 0]))
    next(steps)
    assert steps.member is not None
    assert torch.equal(steps.member, members[1, [2, 0]])
    answer = AnytimePredictor(quantized)(x)
    torch.testing.assert_close(answer.logits, members.mean(0))


@torch.inference_mode()
def test_copies_and_files_compute_the_same(rng: torch.Generator, tmp_path: Path) -> None:
    model, quantized, x = network(rng, "odd")
    expected = quantized(x)
    assert torch.equal(copy.deepcopy(quantized)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(x), expected)
    file = tmp_path / "int8.safetensors"
    checkpoint.save_quantized(file, quantized, {"note": 1})
    loaded, config = checkpoint.load_quantized(file)
    assert config["note"] == 1
    assert torch.equal(loaded(x), expected)
    assert loaded.macs(2, 13) == model.macs(2, 13)
    with pytest.raises(CheckpointError, match="in int8, for inference only"):
        checkpoint.load_model(file)
    checkpoint.save(file, checkpoint.model_tensors(model), {"model": model.config()})
    with pytest.raises(CheckpointError, match="not in int8"):
        checkpoint.load_quantized(file)


def test_a_damaged_file_is_noticed(rng: torch.Generator, tmp_path: Path) -> None:
    _, quantized, _ = network(rng)
    file = tmp_path / "int8.safetensors"
    tensors = {f"quantized/{i:05d}": tensor for i, tensor in enumerate(quantized.tensors)}
    last = max(tensors)
    layers = quantized.layer_configs()
    config = {"model": quantized.config(), "quantized": layers}
    for wrong_tensors, wrong_config in (
        ({name: tensor for name, tensor in tensors.items() if name != last}, config),
        ({**tensors, last: tensors[last][:1]}, config),
        (tensors, {**config, "quantized": layers[:-1]}),
        (tensors, {**config, "quantized": [*layers[:-1], {**layers[-1], "channels": 64}]}),
        (tensors, {**config, "quantized": [*layers[:-1], {"kind": "conv"}]}),
    ):
        checkpoint.save(file, wrong_tensors, wrong_config)
        with pytest.raises(CheckpointError, match="cannot build its network"):
            checkpoint.load_quantized(file)


def dead_and_constant(rng: torch.Generator, constant: float, channels: slice) -> tuple[Tensor, Tensor]:
    """Logits in float32 and int8 of a network with dead features in one block, constant ones in the next."""
    model = build(FusedHNE, TREES["doubling"], rng, torch.float32)
    with torch.no_grad():
        first, second = list(model.layers_of_blocks()[1])[:2]
        first.expand.bn.bias.fill_(-100.0)  # nothing passes the activation
        second.project.bn.weight.zero_()
        second.project.bn.bias[channels] = constant
    x = images(rng)
    quantized = quantize(model, x)
    with torch.inference_mode():
        return model(x), quantized(x)


def test_dead_and_constant_features(rng: torch.Generator) -> None:
    expected, computed = dead_and_constant(rng, 1.0, slice(None))
    assert (computed - expected).norm() < 0.1 * expected.norm()  # at most 0.045 in 300 networks


def test_one_huge_feature(rng: torch.Generator) -> None:
    """The features of a branch share one scale: little is left of the others, but no sum overflows."""
    expected, computed = dead_and_constant(rng, 1e4, slice(1))
    assert computed.isfinite().all()
    assert (computed - expected).norm() < 2 * expected.norm()  # usually 0.02, 0.6 in one network of 150


def test_what_cannot_be_converted(rng: torch.Generator) -> None:
    def message(error: type[Exception], model: FusedHNE, *batches: Tensor) -> str:
        with pytest.raises(error) as caught:
            quantize(model, batches)
        return str(caught.value)

    x = images(rng)
    for spec in (BasicBlock(8), Conv(8, activation="silu"), Conv(6, groups=3)):
        model = build(FusedHNE, TREES["single"], rng, torch.float32, [[Conv(6)], [Conv(6), spec], [Bottleneck(8, 4)]])
        assert re.match(r"blocks\.1\.1 \(.*int8 inference knows Conv", message(ValueError, model, x))
    model = build(FusedHNE, TREES["single"], rng, torch.float32)
    assert "expected at least one" in message(ValueError, model)
    assert "expected at least one" in message(ValueError, model, x[:0])
    assert "expected finite values" in message(ValueError, model, x * float("nan"))
    assert "channels" in message(ValueError, model, x[:, :2])
    assert "float32" in message(TypeError, build(FusedHNE, TREES["single"], rng), x.double())
    assert "call model.eval() first" in message(RuntimeError, model.train(), x)


def test_wrong_images(rng: torch.Generator) -> None:
    _, quantized, x = network(rng)
    with pytest.raises(ValueError, match="x must be images"):
        quantized(x[:, :1])
    with pytest.raises(ValueError, match="at least 1x1"):
        quantized(x[..., :0])
    with pytest.raises(TypeError, match="x must be float32"):
        quantized(x.double())
    with pytest.raises(ValueError, match="num_models"):
        quantized(x, TREES["doubling"].num_models + 1)
    with pytest.raises(ValueError, match="sizes must rise"):
        quantized.prefix_logits(x, [2, 1])
    with pytest.raises(RuntimeError, match="cannot be trained"):
        quantized.train()
    with pytest.raises(RuntimeError, match="computes on the CPU"):
        quantized.double()
    assert quantized.cpu() is quantized
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert f"{NUM_CLASSES} classes" in repr(quantized)
    assert len(quantized.layers) == 2 + sum(map(len, BLOCKS))

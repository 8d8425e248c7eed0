"""int8 layers agree with the reference bit for bit, on every instruction set and with any number of threads."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_cases import bottleneck_layer, conv_layer, features, pool_linear_layer, quantize_layer
from torch import Tensor

import hne_kernels as K
from hne_kernels import extension
from hne_kernels.reference.quantized_layers import quantized_layers as reference

CONV = [
    # parents, in_channels, channels, kernel_size, options, batch, height, width
    (1, 4, 16, 3, {"padding": 1}, 2, 9, 7),
    (1, 4, 20, 3, {"padding": 1, "stride": 2}, 1, 7, 7),
    (2, 12, 64, 1, {}, 3, 5, 5),
    (2, 8, 68, 1, {"replicate": 2}, 2, 4, 3),
    (3, 64, 132, 1, {"extreme": True}, 1, 3, 3),
    (1, 256, 24, 1, {"extreme": True, "replicate": 3}, 1, 2, 9),
    (2, 8, 4, 5, {"padding": 2, "stride": 3}, 1, 11, 8),
    (1, 4, 8, 7, {"padding": 3, "stride": 2}, 2, 7, 7),
    (1, 8, 8, 2, {"padding": 0}, 2, 2, 2),
    (1, 4, 4, 1, {"stride": 2}, 0, 5, 5),
]
BOTTLENECKS = [
    # parents, in_channels, middle, channels, options, batch, height, width
    (1, 64, 16, 64, {"shortcut": "identity"}, 1, 8, 8),
    (1, 64, 16, 64, {"shortcut": "projected", "replicate": 2}, 3, 8, 8),
    (2, 64, 32, 128, {"shortcut": "projected", "stride": 2}, 2, 8, 8),
    (2, 12, 36, 20, {"stride": 2, "replicate": 2}, 2, 7, 7),
    (3, 24, 144, 24, {"shortcut": "identity"}, 1, 7, 7),
    (1, 20, 76, 20, {"shortcut": "identity", "extreme": True}, 2, 5, 9),
    (2, 128, 64, 132, {"shortcut": "projected", "extreme": True}, 1, 4, 4),
    (1, 8, 12, 8, {"kernel_size": 5, "shortcut": "identity"}, 1, 6, 7),
    (1, 8, 20, 8, {"kernel_size": 7, "stride": 2, "shortcut": "projected"}, 2, 7, 7),
    (1, 4, 8, 4, {"kernel_size": 1, "stride": 2}, 2, 3, 3),
    (1, 4, 4, 4, {"shortcut": "identity"}, 1, 1, 1),
    (2, 4, 4, 4, {"shortcut": "projected"}, 0, 3, 3),
    (1, 16, 96, 24, {}, 1, 40, 33),
    (2, 16, 16, 16, {}, 1, 4, 4),
    (1, 64, 32, 64, {"shortcut": "identity"}, 2, 9, 8),
    (1, 20, 32, 20, {"shortcut": "identity"}, 1, 5, 7),
]


Case = tuple[list[K.QuantizedLayer], Tensor]


def convolution(case: tuple[Any, ...]) -> Case:
    parents, in_channels, channels, kernel_size, options, batch, height, width = case
    layer = conv_layer(parents, in_channels, channels, kernel_size, **options)
    return [layer], features(parents, batch, height, width, in_channels, extreme=options.get("extreme", False))


def bottleneck(case: tuple[Any, ...]) -> Case:
    parents, in_channels, middle, channels, options, batch, height, width = case
    layer = bottleneck_layer(parents, in_channels, middle, channels, **options)
    return [layer], features(parents, batch, height, width, in_channels, extreme=options.get("extreme", False))


def check(layers: list[K.QuantizedLayer], x: Tensor, keep: tuple[int, ...] = ()) -> None:
    computed = K.QuantizedLayers(layers, keep)(x)
    expected = [y for index, y in enumerate(reference(x, layers)) if index in (*keep, len(layers) - 1)]
    assert len(computed) == len(expected)
    for ours, theirs in zip(computed, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CONV, ids=str)
def test_convolutions_agree(case: tuple[Any, ...]) -> None:
    check(*convolution(case))


@pytest.mark.parametrize("case", BOTTLENECKS, ids=str)
def test_bottlenecks_agree(case: tuple[Any, ...]) -> None:
    check(*bottleneck(case))


def test_largest_sums_do_not_saturate() -> None:
    # All features 255 and all weights 64: a pair of products is just below 2^15.
    layer = conv_layer(1, 64, 16)
    weight, bias, scale, zeros = layer.tensors
    tensors = (torch.full_like(weight, 64), bias, torch.full_like(scale, 1e-4), zeros)
    check([layer._replace(tensors=tensors)], torch.full((1, 2, 3, 3, 64), 255, dtype=torch.uint8))
    tensors = (torch.full_like(weight, -64), bias, torch.full_like(scale, 1e-4), torch.full_like(zeros, 255))
    check([layer._replace(tensors=tensors)], torch.full((1, 2, 3, 3, 64), 255, dtype=torch.uint8))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_linear_layers_agree(batch: int) -> None:
    layers = [pool_linear_layer(2, 12, 200, replicate=2), pool_linear_layer(4, 200, 12)]
    check(layers, features(2, batch, 5, 3, 12), keep=(0,))


def network() -> list[K.QuantizedLayer]:
    return [
        quantize_layer(3),
        conv_layer(1, 4, 16, 3, padding=1),
        conv_layer(1, 16, 64),
        bottleneck_layer(1, 64, 16, 64, shortcut="projected"),
        bottleneck_layer(1, 64, 16, 64, shortcut="identity"),
        bottleneck_layer(1, 64, 20, 72, stride=2, replicate=3, shortcut="projected"),
        bottleneck_layer(3, 72, 20, 72, shortcut="identity"),
        conv_layer(3, 72, 80),
        pool_linear_layer(3, 80, 12),
    ]


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_a_network_agrees(batch: int) -> None:
    layers, x = network(), torch.randn(batch, 3, 13, 11)
    check(layers, x)
    check(layers, x.to(memory_format=torch.channels_last), keep=(0, 2, 4, 6))
    check(layers[6:], features(3, batch, 7, 6, 72))


def test_results_do_not_depend_on_the_threads() -> None:
    layers, x = K.QuantizedLayers(network()), torch.randn(3, 3, 13, 11)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layers(x)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_images_out_of_range_saturate() -> None:
    layer = K.QuantizedLayer("quantize", (torch.tensor([3.0]), torch.tensor([7], dtype=torch.int32)), 1, 2, 4)
    values = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.5, -0.5, 82.5]
    check([layer], torch.tensor(values * 5).repeat(2).view(1, 2, 1, -1))


def test_poisoned_memory_does_not_show() -> None:
    layers, x = K.QuantizedLayers(network()), torch.randn(8, 3, 16, 16)
    expected = layers(x)[0]
    extension.cpu_library().poison_memory(True)
    try:
        assert torch.equal(layers(x)[0], expected)
    finally:
        extension.cpu_library().poison_memory(False)


LEVELS = [("portable", "0"), ("avx2", "0"), ("avx2", "1"), ("avx512", "0"), ("avx512", "1")]
SCRIPT = """
import pickle, sys, torch, hne_kernels as K
for layers, x, expected in pickle.load(open(sys.argv[1], "rb")):
    layers = [K.QuantizedLayer(*layer) for layer in layers]
    assert torch.equal(K.QuantizedLayers(layers)(x)[0], expected), (layers[0][:1], layers[0][2:], x.shape)
"""


@pytest.mark.any_level
def test_all_instruction_sets_agree(tmp_path: Path) -> None:
    library = extension.cpu_library()
    supported = library.cpu_capabilities_supported().split(", ")
    cases = [*map(convolution, CONV), *map(bottleneck, BOTTLENECKS), (network(), torch.randn(2, 3, 13, 11))]
    file = tmp_path / "cases.pickle"
    file.write_bytes(
        pickle.dumps([([tuple(layer) for layer in layers], x, reference(x, layers)[-1]) for layers, x in cases])
    )
    processes = []
    for level, vnni in LEVELS:
        if level in supported and (level, vnni == "1") != (library.cpu_capability(), library.cpu_vnni()):
            environment = {**os.environ, "HNE_CPU_CAPABILITY": level, "HNE_CPU_VNNI": vnni}
            processes.append(subprocess.Popen([sys.executable, "-c", SCRIPT, str(file)], env=environment))
    assert [process.wait() for process in processes] == [0] * len(processes)


def test_a_copy_computes_the_same() -> None:
    layers, x = K.QuantizedLayers(network(), keep=[4]), torch.randn(2, 3, 9, 9)
    copy = pickle.loads(pickle.dumps(layers))
    for ours, theirs in zip(layers(x), copy(x), strict=True):
        assert torch.equal(ours, theirs)


def test_wrong_arguments() -> None:
    layers, x = network(), torch.randn(1, 3, 9, 9)
    conv = layers[1]
    weight, bias, scale, zeros = conv.tensors
    assert bias is not None

    def message(error: type[Exception], wrong: list[K.QuantizedLayer], keep: tuple[int, ...] = ()) -> str:
        with pytest.raises(error) as caught:
            K.QuantizedLayers(wrong, keep)
        return str(caught.value)

    assert "layers: expected at least one" in message(ValueError, [])
    assert "keep: expected numbers from 0 to 8, got 9" in message(ValueError, layers, (9,))
    for options, error, text in (
        ({"kind": "linear"}, ValueError, "layer 1: kind: expected one of conv"),
        ({"channels": 18}, ValueError, "layer 1: channels: expected multiples of 4"),
        ({"stride": 0}, ValueError, "layer 1: stride"),
        ({"tensors": (weight, bias)}, ValueError, "layer 1: tensors: expected 4, got 2"),
        ({"tensors": (weight, bias[:, 1:], scale, zeros)}, ValueError, "layer 1: tensors[1]"),
        ({"tensors": (weight, bias.float(), scale, zeros)}, TypeError, "layer 1: tensors[1]: expected torch.int32"),
        ({"tensors": (None, bias, scale, zeros)}, ValueError, "layer 1: tensors[0]: expected a tensor"),
    ):
        assert text in message(error, [layers[0], conv._replace(**options), *layers[2:]])
    assert "layer 2: expected 1 branches of 16 channels as input" in message(ValueError, [*layers[:2], layers[3]])
    assert "layer 1: expected 1 branches" in message(ValueError, [layers[0], layers[0]])
    whole = K.QuantizedLayers(layers)
    for error, wrong, text in (
        (ValueError, x[0], "x"),
        (ValueError, x[:, :2], "x: expected 3 channels"),
        (TypeError, x.double(), "x: expected torch.float32"),
    ):
        with pytest.raises(error, match=text):
            whole(wrong)
    with pytest.raises(ValueError, match="x: expected 3 branches"):
        K.QuantizedLayers(layers[6:])(features(2, 1, 3, 3, 72))
    with pytest.raises(RuntimeError, match="smaller than the kernel"):
        K.QuantizedLayers([conv_layer(1, 4, 4, 5)])(features(1, 1, 3, 3, 4))

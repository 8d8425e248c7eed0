"""int8 layers agree with the reference bit for bit, on every instruction set and with any number of threads."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.quantized_cases import bottleneck_layer, conv_layer, features, pool_linear_layer, quantize_layer

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
]


def check(layers: list[K.QuantizedLayer], x: torch.Tensor, keep: tuple[int, ...] = ()) -> None:
    computed = K.QuantizedLayers(layers, keep)(x)
    expected = [y for index, y in enumerate(reference(x, layers)) if index in (*keep, len(layers) - 1)]
    assert len(computed) == len(expected)
    for ours, theirs in zip(computed, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CONV, ids=str)
def test_convolutions_agree(case):
    parents, in_channels, channels, kernel_size, options, batch, height, width = case
    layer = conv_layer(parents, in_channels, channels, kernel_size, **options)
    extreme = options.get("extreme", False)
    check([layer], features(parents, batch, height, width, in_channels, extreme=extreme))


@pytest.mark.parametrize("case", BOTTLENECKS, ids=str)
def test_bottlenecks_agree(case):
    parents, in_channels, middle, channels, options, batch, height, width = case
    layer = bottleneck_layer(parents, in_channels, middle, channels, **options)
    extreme = options.get("extreme", False)
    check([layer], features(parents, batch, height, width, in_channels, extreme=extreme))


def test_largest_sums_do_not_saturate():
    # All features 255 and all weights 64: a pair of products is just below 2^15.
    layer = conv_layer(1, 64, 16)
    weight, bias, scale, zeros = layer.tensors
    tensors = (torch.full_like(weight, 64), bias, torch.full_like(scale, 1e-4), zeros)
    check([layer._replace(tensors=tensors)], torch.full((1, 2, 3, 3, 64), 255, dtype=torch.uint8))
    tensors = (torch.full_like(weight, -64), bias, torch.full_like(scale, 1e-4), torch.full_like(zeros, 255))
    check([layer._replace(tensors=tensors)], torch.full((1, 2, 3, 3, 64), 255, dtype=torch.uint8))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_linear_layers_agree(batch):
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
def test_a_network_agrees(batch):
    layers, x = network(), torch.randn(batch, 3, 13, 11)
    check(layers, x)
    check(layers, x.to(memory_format=torch.channels_last), keep=(0, 2, 4, 6))
    check(layers[6:], features(3, batch, 7, 6, 72))


def test_results_do_not_depend_on_the_threads():
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


def test_images_out_of_range_saturate():
    layer = K.QuantizedLayer("quantize", (torch.tensor([3.0]), torch.tensor([7], dtype=torch.int32)), 1, 2, 4)
    values = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.5, -0.5, 82.5]
    check([layer], torch.tensor(values * 5).repeat(2).view(1, 2, 1, -1))


def test_poisoned_memory_does_not_show():
    layers, x = K.QuantizedLayers(network()), torch.randn(8, 3, 16, 16)
    expected = layers(x)[0]
    extension.cpu_library().poison_memory(True)
    try:
        assert torch.equal(layers(x)[0], expected)
    finally:
        extension.cpu_library().poison_memory(False)


LEVELS = [("portable", "0"), ("avx2", "0"), ("avx2", "1"), ("avx512", "0"), ("avx512", "1")]


def test_all_instruction_sets_agree(tmp_path: Path):
    supported = extension.cpu_library().cpu_capabilities_supported().split(", ")
    layers = [network(), [conv_layer(3, 64, 132, extreme=True)], [bottleneck_layer(1, 20, 76, 20, extreme=True)]]
    inputs = [
        torch.randn(2, 3, 13, 11),
        features(3, 2, 3, 3, 64, extreme=True),
        features(1, 2, 9, 9, 20, extreme=True),
    ]
    expected = [reference(x, each)[-1] for each, x in zip(layers, inputs, strict=True)]
    file = tmp_path / "case.pickle"
    file.write_bytes(pickle.dumps(([[tuple(layer) for layer in each] for each in layers], inputs, expected)))
    script = (
        "import pickle, sys, torch, hne_kernels as K\n"
        "layers, inputs, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "for each, x, y in zip(layers, inputs, expected):\n"
        "    assert torch.equal(K.QuantizedLayers([K.QuantizedLayer(*layer) for layer in each])(x)[0], y)\n"
    )
    for level, vnni in LEVELS:
        if level in supported:
            environment = {**os.environ, "HNE_CPU_CAPABILITY": level, "HNE_CPU_VNNI": vnni}
            subprocess.run([sys.executable, "-c", script, str(file)], env=environment, check=True)


def test_a_copy_computes_the_same():
    layers, x = K.QuantizedLayers(network(), keep=[4]), torch.randn(2, 3, 9, 9)
    copy = pickle.loads(pickle.dumps(layers))
    for ours, theirs in zip(layers(x), copy(x), strict=True):
        assert torch.equal(ours, theirs)

"""The number of multiply-adds of a network, and of parts of it."""

from __future__ import annotations

import pytest
import torch
from networks import build, each_model, each_tree, images
from torch.utils.flop_counter import FlopCounterMode

from hne import HNE, PRESETS, Hierarchy, NaiveHNE


@pytest.mark.parametrize(
    ("preset", "classes", "size", "millions"),
    [
        ("hne_resnet50_cifar", 100, 32, {1: 50.82, 2: 65.71, 4: 107.17, 8: 201.92, 16: 402.36}),
        ("hne_small_resnet50_cifar", 100, 32, {1: 13.09, 2: 16.86, 4: 27.37, 8: 51.42, 16: 102.35}),
        ("hne_mobilenetv2_075", 1000, 224, {1: 179.13, 2: 211.96, 4: 332.92, 8: 602.26}),
        ("hne_resnet18", 1000, 224, {1: 1814.07, 2: 2225.63, 4: 3459.78, 8: 6339.12}),
        ("hne_resnet50", 1000, 224, {1: 4089.18, 2: 4900.47, 4: 7987.38, 8: 15188.80}),
        ("hne_resnet18_cifar", 10, 32, {1: 555.42, 2: 689.65, 4: 1092.31, 8: 2031.85}),
        ("hne_wrn28_10", 10, 32, {1: 5243.33, 2: 6187.05, 4: 8913.36, 8: 16148.56}),
        ("hne_vit_tiny", 1000, 224, {1: 1253.68, 2: 1560.02, 4: 2478.85, 8: 4622.65}),
    ],
)
@each_model
def test_costs_of_presets(kind: type[HNE], preset: str, classes: int, size: int, millions: dict[int, float]) -> None:
    with torch.device("meta"):
        model = kind.from_preset(preset, num_classes=classes)
    assert {n: round(model.macs(n, size) / 1e6, 2) for n in model.prefix_sizes} == millions
    assert model.macs(input_size=(size, size)) == model.macs(model.num_models, size)


@pytest.mark.parametrize(
    ("preset", "classes", "parameters"),
    [
        ("hne_resnet18", 1000, 11_689_512),  # torchvision
        ("hne_resnet50", 1000, 25_557_032),  # torchvision
        ("hne_resnet18_cifar", 10, 11_173_962),
        ("hne_wrn28_10", 10, 36_479_194),  # Zagoruyko & Komodakis, Table 4: 36.5 million
        ("hne_vit_tiny", 1000, 5_717_416),  # timm's deit_tiny_patch16_224
    ],
)
def test_one_network_of_a_preset_is_the_published_one(preset: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = NaiveHNE.from_preset(preset, num_classes=classes, num_models=1)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_macs_of_presets_are_those_that_pytorch_counts(preset: str) -> None:
    size = 1 if preset == "hne_mlp" else PRESETS[preset].image_size
    with torch.device("meta"):
        model = NaiveHNE.from_preset(preset, num_classes=7).eval()
        x = torch.empty(1, 3, size, size)
    for n in model.prefix_sizes:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, n)
        assert counter.get_total_flops() == 2 * model.macs(n, size)


@each_tree
def test_macs_are_the_computed_ones(tree: Hierarchy, rng: torch.Generator) -> None:
    model = build(NaiveHNE, tree, rng)
    for n in range(1, tree.num_models + 1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(rng, 2, (9, 12)), n)
        assert counter.get_total_flops() == 2 * 2 * model.macs(n, (9, 12))


def test_macs_rise_with_the_number_of_models() -> None:
    model = NaiveHNE.from_preset("hne_tiny", num_classes=10)
    assert [model.macs(n) for n in range(1, 9)] == sorted({model.macs(n) for n in range(1, 9)})
    with pytest.raises(ValueError, match="input_size must be at least 1x1, got 0x8"):
        model.macs(1, (0, 8))
    with pytest.raises(ValueError, match="num_models must lie between 1 and 8, got 9"):
        model.macs(9)

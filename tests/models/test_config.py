"""Presets, configs, layer specs and the text of a model."""

from __future__ import annotations

import json

import pytest
import torch
from networks import IN_CHANNELS, NUM_CLASSES, build, each_model, each_tree, images
from torch import nn

from hne import HNE, PRESETS, Bottleneck, Conv, FusedHNE, Hierarchy, NaiveHNE, PoolLinear


@pytest.mark.parametrize("preset", PRESETS)
def test_both_models_have_the_same_state(preset: str) -> None:
    with torch.device("meta"):
        fused = FusedHNE.from_preset(preset, num_classes=7, width=0.25)
        naive = NaiveHNE.from_preset(preset, num_classes=7, width=0.25)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (fused, naive)]
    assert shapes[0] == shapes[1]
    assert fused.config() == naive.config()


def test_presets_with_another_width_or_tree() -> None:
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
        (lambda: Conv(4, kernel_size=0), ValueError, "Conv.kernel_size must be at least 1, got 0"),
        (lambda: Conv(4, padding=-1), ValueError, "Conv.padding must be at least 0, got -1"),
        (lambda: Conv(4, groups=3), ValueError, "Conv.groups must divide Conv.channels, got 3 and 4"),
        (lambda: Conv(4, groups=2, norm=False), ValueError, "Conv.groups must be 1 without batch norm, got 2"),
        (lambda: Conv(4, stride=1.0), TypeError, r"Conv.stride must be an int, got 1\.0"),
        (lambda: Bottleneck(4, -1), ValueError, "Bottleneck.middle must be at least 1, got -1"),
        (lambda: Bottleneck(4, 2, activation="elu"), ValueError, "must be one of none, relu, relu6, .*got 'elu'"),
        (lambda: PoolLinear(4, "elu"), ValueError, "PoolLinear.activation must be one of .*got 'elu'"),
        (lambda: FusedHNE((1, 2), [], num_classes=2), TypeError, "hierarchy must be a Hierarchy, got tuple"),
        (lambda: FusedHNE(Hierarchy((1,)), [[]], num_classes=2), ValueError, r"blocks\[0\] must have at least one"),
        (lambda: FusedHNE(Hierarchy((1,)), [[nn.ReLU()]], num_classes=2), TypeError, r"blocks\[0\] must list layer"),
        (lambda: FusedHNE(Hierarchy((1,)), [[Conv(2)]], num_classes=2.0), TypeError, "num_classes must be an int"),
    ],
)
def test_bad_specs_and_networks(make, error: type[Exception], message: str) -> None:
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
        ({"blocks": [[{"layer": "Attention"}]]}, "layer must be one of .*Conv.*, got 'Attention'"),
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


def test_repr_shows_the_tree() -> None:
    with torch.device("meta"):
        text = repr(FusedHNE.from_preset("hne_resnet50_cifar", num_classes=100))
    assert "FusedHNE(16 models, 3 channels > 100 classes, 5,681,008 parameters)" in text
    assert "  3      8         bottleneck 64-256/2, bottleneck 64-256 x3\n" in text
    assert text.endswith("  head   16        pool, linear 100")

"""The networks of torchvision and timm themselves, with random weights, where the packages can be imported."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from backbones import trained

from hne import FusedHNE, Module

MODELS = {
    "torchvision:resnet18": (1, 1, 2, 4),
    "torchvision:resnext50_32x4d": (1, 1, 1, 1, 2),
    "torchvision:mobilenet_v2": (1, 1, 2, 4),
    "torchvision:vit_b_32": (1, 2),
    "timm:resnet18": (1, 1, 2, 4),
    "timm:seresnet50": (1, 1, 1, 1, 2),
    "timm:mobilenetv2_100": (1, 1, 2, 4),
    "timm:vit_tiny_patch16_224": (1, 2),
    "timm:deit3_small_patch16_224": (1, 2),
}


def library(name: str) -> Any:
    """A package, or a skipped test where it cannot be imported, as one for another version of PyTorch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_first_leaf_is_the_network(name: str) -> None:
    package, _, model_name = name.partition(":")
    make = library(package).create_model if package == "timm" else library("torchvision.models").get_model
    net = trained(make(model_name), 224).double()
    model = FusedHNE.from_backbone(net, MODELS[name])
    layers = [layer for block in model.layers_of_blocks() for layer in block]
    modules = [layer for layer in layers if isinstance(layer.spec, Module)]
    assert len(modules) == (name in ("torchvision:mobilenet_v2", "timm:deit3_small_patch16_224"))  # dropout, tokens
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, num_models=1)[0], net(x), rtol=1e-9, atol=1e-9)

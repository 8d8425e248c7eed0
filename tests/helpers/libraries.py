"""Stand-ins for the packages torchvision and timm, with the functions that find a model by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import timm_like
import torch
import torchvision_like
from backbones import trained
from torch import nn

MODELS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "torchvision": {
        "resnet18": torchvision_like.ResNet,
        "mobilenet_v2": torchvision_like.MobileNetV2,
        "vit_b_16": torchvision_like.VisionTransformer,
    },
    "timm": {"resnet18": timm_like.ResNet, "vit_tiny": timm_like.VisionTransformer},
}


def pretrained(library: str, name: str, **options: Any) -> nn.Module:
    """A model with the weights that its library publishes: the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        return trained(MODELS[library][name](**options), 32).train()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let imports of both packages find the stand-ins."""
    torchvision: Any = ModuleType("torchvision")
    torchvision.models = ModuleType("torchvision.models")
    torchvision.models.list_models = lambda: sorted(MODELS["torchvision"])

    def get_model(name: str, weights: str | None = None, **options: Any) -> nn.Module:
        if weights is not None and weights != "DEFAULT":
            raise ValueError(weights)
        make = MODELS["torchvision"][name]
        return make(**options) if weights is None else pretrained("torchvision", name, **options)

    torchvision.models.get_model = get_model
    timm: Any = ModuleType("timm")
    timm.list_models = lambda: sorted(MODELS["timm"])

    def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("cannot reach the server of the weights")
        return MODELS["timm"][name](**options)

    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision.models)
    monkeypatch.setitem(sys.modules, "timm", timm)

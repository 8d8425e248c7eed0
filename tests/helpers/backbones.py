"""Backbones for tests, with random weights and running statistics in place of trained ones."""

from __future__ import annotations

from collections.abc import Callable

import timm_like
import torch
import torchvision_like
from torch import nn


def sequential() -> nn.Sequential:
    """A network of plain modules for images of 16x16 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 8, 4, 2, 1, bias=False), nn.GroupNorm(2, 8), nn.GELU()),
        *(nn.Flatten(), nn.Linear(8 * 16, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 7)),
    )


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "torchvision-resnet-basic": torchvision_like.ResNet,
    "torchvision-resnet-bottleneck": lambda: torchvision_like.ResNet(torchvision_like.Bottleneck, width=4),
    "torchvision-resnext": lambda: torchvision_like.ResNet(torchvision_like.Bottleneck, width=4, groups=2),
    "torchvision-mobilenetv2": torchvision_like.MobileNetV2,
    "torchvision-vgg": torchvision_like.VGG,
    "torchvision-vit": torchvision_like.VisionTransformer,
    "timm-resnet": timm_like.ResNet,
    "timm-seresnet-silu": lambda: timm_like.ResNet(squeeze=4, act=nn.SiLU),
    "timm-mobilenetv2": timm_like.EfficientNet,
    "timm-vgg": timm_like.VGG,
    "timm-vit": timm_like.VisionTransformer,
    "timm-vit-average": lambda: timm_like.VisionTransformer("avg", layer_scale=True),
    "timm-vit-registers": lambda: timm_like.VisionTransformer(registers=3, no_embed_class=True),
    "timm-vit-average-registers": lambda: timm_like.VisionTransformer("avg", registers=2),
    "wide-resnet": timm_like.wide_resnet,
    "sequential": sequential,
}
IMAGE_SIZES = {"sequential": 16}  # by name; 32 for others


def trained(net: nn.Module, size: int = 64) -> nn.Module:
    """The network in eval mode, with other values in every parameter, and the running statistics of a random batch."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            parameter.add_(0.05 * torch.randn_like(parameter) if parameter.dim() == 1 or not parameter.any() else 0)
        for module in norms:
            module.momentum, momentum = 1.0, module.momentum
            module.old_momentum = momentum
        net.train()(torch.randn(8, 3, size, size))
        for module in norms:
            module.momentum = module.__dict__.pop("old_momentum")
            module.running_var.clamp_(min=float(module.running_var.mean()) / 10)  # no channel amplifies rounding
            module.num_batches_tracked.fill_(11)
    return net.eval()


def backbone(name: str) -> nn.Module:
    """A backbone by name."""
    return trained(BACKBONES[name](), image_size(name))


def image_size(name: str) -> int:
    """Height and width of the images of a backbone."""
    return IMAGE_SIZES.get(name, 32)

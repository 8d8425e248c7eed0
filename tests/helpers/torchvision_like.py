"""Networks with the class names, attributes and ``state_dict`` keys of torchvision, which need not be installed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(
        self,
        block: type = BasicBlock,
        layers: Sequence[int] = (1, 1, 2, 1),
        width: int = 8,
        num_classes: int = 7,
        **options: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for index, count in enumerate(layers):
            planes, blocks = width * 2**index, []
            for position in range(count):
                stride = 2 if index and not position else 1
                downsample = None
                if stride > 1 or inputs != planes * block.expansion:
                    conv = nn.Conv2d(inputs, planes * block.expansion, 1, stride, bias=False)
                    downsample = nn.Sequential(conv, nn.BatchNorm2d(planes * block.expansion))
                blocks.append(block(inputs, planes, stride, downsample, **options))
                inputs = planes * block.expansion
            setattr(self, f"layer{index + 1}", nn.Sequential(*blocks))
        self.depth = len(layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for index in range(self.depth):
            x = getattr(self, f"layer{index + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Conv2dNormActivation(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [] if expansion == 1 else [Conv2dNormActivation(inputs, hidden, 1)]
        layers += [Conv2dNormActivation(hidden, hidden, stride=stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """Five stages, as the published network; fewer layers and channels."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        features: list[nn.Module] = [Conv2dNormActivation(3, 8, stride=2), InvertedResidual(8, 6, 1, 1)]
        inputs = 6
        for outputs, count, stride in ((8, 2, 2), (12, 2, 2), (16, 2, 2), (20, 1, 1), (24, 2, 2)):
            for index in range(count):
                features.append(InvertedResidual(inputs, outputs, 1 if index else stride, 6))
                inputs = outputs
        features.append(Conv2dNormActivation(inputs, 40, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(40, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class VGG(nn.Module):
    """Five stages, each with a pooling at its end."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channels in (4, 0, 6, 0, 8, 8, 0, 10, 0, 12, 0):
            if channels:
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                inputs = channels
            else:
                layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 49, 20),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(20, 20),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(20, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class MLPBlock(nn.Sequential):
    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        parts = nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(dropout)
        super().__init__(*parts, nn.Linear(hidden, channels), nn.Dropout(dropout))


class EncoderBlock(nn.Module):
    def __init__(self, heads: int, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLPBlock(channels, hidden, dropout)

    def forward(self, input: Tensor) -> Tensor:
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, tokens: int, depth: int, heads: int, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, channels).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        make = partial(EncoderBlock, heads, channels, hidden, dropout)
        self.layers = nn.Sequential(OrderedDict((f"encoder_layer_{index}", make()) for index in range(depth)))
        self.ln = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(input + self.pos_embedding)))


class VisionTransformer(nn.Module):
    def __init__(
        self, image_size: int = 32, patch_size: int = 8, depth: int = 5, num_classes: int = 7, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.image_size, self.channels = image_size, 12
        self.conv_proj = nn.Conv2d(3, 12, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 12))
        self.encoder = Encoder((image_size // patch_size) ** 2 + 1, depth, 3, 12, 20, dropout)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(12, num_classes)))
        nn.init.zeros_(self.heads.head.weight)  # as torchvision does

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2:] == (self.image_size, self.image_size)
        x = self.conv_proj(x).reshape(len(x), self.channels, -1).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return self.heads(self.encoder(x)[:, 0])

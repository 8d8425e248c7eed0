"""Networks with the class names, attributes and ``state_dict`` keys of timm, which need not be installed; and the
WideResNet for CIFAR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep) / keep


class SEModule(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.bn = nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(x.mean((2, 3), keepdim=True))))))


class SelectAdaptivePool2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool_type = "avg"
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.pool(x))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, squeeze: int, drop_path: float, act: type) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.drop_block = nn.Identity()
        self.act1 = act(inplace=True)
        self.aa = nn.Identity()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = SEModule(planes, squeeze) if squeeze else None
        self.act2 = act(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        self.drop_path = DropPath(drop_path) if drop_path else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        x = self.bn2(self.conv2(x))
        x = x if self.se is None else self.se(x)
        x = x if self.drop_path is None else self.drop_path(x)
        x += shortcut if self.downsample is None else self.downsample(shortcut)
        return self.act2(x)


class ResNet(nn.Module):
    """``drop_rate`` is that of the dropout before the head."""

    def __init__(
        self,
        squeeze: int = 0,
        drop_path: float = 0.0,
        drop_rate: float = 0.0,
        act: type = nn.ReLU,
        num_classes: int = 7,
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.conv1 = nn.Sequential(  # the deep stem
            *(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), act(inplace=True)),
            nn.Conv2d(6, 8, 3, 1, 1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = act(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 8
        for index, planes in enumerate((8, 12, 16), 1):
            options = (squeeze, drop_path, act)
            first = BasicBlock(inputs, planes, 1 if index == 1 else 2, *options)
            setattr(self, f"layer{index}", nn.Sequential(first, BasicBlock(planes, planes, 1, *options)))
            inputs = planes
        self.global_pool = SelectAdaptivePool2d()
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.global_pool(self.layer3(self.layer2(self.layer1(x))))
        if self.drop_rate:
            x = nn.functional.dropout(x, float(self.drop_rate), self.training)
        return self.fc(x)


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int, apply_act: bool = True) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU6(inplace=True) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class DepthwiseSeparableConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.has_skip = False
        self.conv_dw = nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs, bias=False)
        self.bn1 = BatchNormAct2d(inputs)
        self.aa = nn.Identity()
        self.se = nn.Identity()
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = BatchNormAct2d(outputs, apply_act=False)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(self.se(self.aa(self.bn1(self.conv_dw(x))))))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 6 * inputs
        self.has_skip = inputs == outputs and stride == 1
        self.conv_pw = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = BatchNormAct2d(hidden)
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = BatchNormAct2d(hidden)
        self.aa = nn.Identity()
        self.se = nn.Identity()
        self.conv_pwl = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = BatchNormAct2d(outputs, apply_act=False)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.se(self.aa(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))))
        x = self.bn3(self.conv_pwl(x))
        return self.drop_path(x) + shortcut if self.has_skip else x


class EfficientNet(nn.Module):
    """MobileNetV2 of timm; four stages."""

    def __init__(self, num_classes: int = 7, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.conv_stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = BatchNormAct2d(8)
        stages: list[nn.Module] = [nn.Sequential(DepthwiseSeparableConv(8, 6))]
        inputs = 6
        for outputs, stride in ((8, 2), (12, 2), (16, 1), (20, 2)):
            blocks = [InvertedResidual(inputs, outputs, stride), InvertedResidual(outputs, outputs, 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(inputs, 40, 1, bias=False)
        self.bn2 = BatchNormAct2d(40)
        self.global_pool = SelectAdaptivePool2d()
        self.classifier = nn.Linear(40, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x)))))
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return self.classifier(x)


class ConvMlp(nn.Module):
    def __init__(self, inputs: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.input_kernel_size = kernel
        self.fc1 = nn.Conv2d(inputs, hidden, kernel)
        self.act1 = nn.ReLU(True)
        self.drop = nn.Dropout(0.0)
        self.fc2 = nn.Conv2d(hidden, hidden, 1)
        self.act2 = nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.fc2(self.drop(self.act1(self.fc1(x)))))


class ClassifierHead(nn.Module):
    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.global_pool = SelectAdaptivePool2d()
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(inputs, num_classes)
        self.flatten = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.fc(self.drop(self.global_pool(x))))


class VGG(nn.Module):
    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 32, 32)}
        layers: list[nn.Module] = []
        for inputs, channels in ((3, 4), (4, 6), (6, 8)):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.pre_logits = ConvMlp(8, 20, 3)
        self.head = ClassifierHead(20, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pre_logits(self.features(x)))


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2])
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(x.shape)))


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    def __init__(self, channels: int, heads: int, hidden: int, layer_scale: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads)
        self.ls1 = LayerScale(channels) if layer_scale else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, hidden)
        self.ls2 = LayerScale(channels) if layer_scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch_size: int, image_size: int) -> None:
        super().__init__()
        self.img_size = (image_size, image_size)
        self.proj = nn.Conv2d(3, channels, patch_size, patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class VisionTransformer(nn.Module):
    def __init__(
        self,
        global_pool: str = "token",
        layer_scale: bool = False,
        drop_path: float = 0.0,
        depth: int = 4,
        num_classes: int = 7,
        registers: int = 0,
        no_embed_class: bool = False,
    ) -> None:
        super().__init__()
        self.global_pool = global_pool
        self.no_embed_class, self.dynamic_img_size = no_embed_class, False
        self.default_cfg = {"input_size": (3, 224, 224)}
        self.patch_embed = PatchEmbed(12, 8, 32)
        token = global_pool == "token"
        self.cls_token = nn.Parameter(torch.randn(1, 1, 12)) if token else None
        self.reg_token = nn.Parameter(torch.randn(1, registers, 12)) if registers else None
        self.num_prefix_tokens = token + registers
        prefix = 0 if no_embed_class else self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.randn(1, 16 + prefix, 12))
        self.pos_drop = nn.Dropout(0.0)
        self.patch_drop = nn.Identity()
        self.norm_pre = nn.Identity()
        self.blocks = nn.Sequential(*(Block(12, 3, 20, layer_scale, drop_path) for _ in range(depth)))
        self.norm = nn.LayerNorm(12, eps=1e-6) if token else nn.Identity()
        self.fc_norm = nn.Identity() if token else nn.LayerNorm(12, eps=1e-6)
        self.head_drop = nn.Dropout(0.0)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        first = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.no_embed_class:
            x = torch.cat([*first, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*first, x], dim=1) + self.pos_embed
        x = self.norm(self.blocks(self.norm_pre(self.patch_drop(self.pos_drop(x)))))
        x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(1)
        return self.head(self.head_drop(self.fc_norm(x)))


def wide_resnet(num_classes: int = 7, droprate: float = 0.0) -> nn.Module:
    """The WideResNet for CIFAR (Zagoruyko & Komodakis 2016), as the well-known code writes it."""

    class BasicBlock(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.bn1 = nn.BatchNorm2d(inputs)
            self.relu1 = nn.ReLU(inplace=True)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.droprate = droprate
            self.equalInOut = inputs == outputs
            conv = None if self.equalInOut else nn.Conv2d(inputs, outputs, 1, stride, 0, bias=False)
            self.convShortcut = conv

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu1(self.bn1(x))
            if not self.equalInOut:
                x = out
            out = self.relu2(self.bn2(self.conv1(out)))
            if self.droprate > 0:
                out = nn.functional.dropout(out, self.droprate, self.training)
            out = self.conv2(out)
            return torch.add(x if self.convShortcut is None else self.convShortcut(x), out)

    class NetworkBlock(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.layer = nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    class WideResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
            self.block1 = NetworkBlock(6, 8, 1)
            self.block2 = NetworkBlock(8, 12, 2)
            self.block3 = NetworkBlock(12, 16, 2)
            self.bn1 = nn.BatchNorm2d(16)
            self.relu = nn.ReLU(inplace=True)
            self.fc = nn.Linear(16, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
            return self.fc(nn.functional.avg_pool2d(out, 8).view(-1, 16))

    network: Any = WideResNet()
    return network

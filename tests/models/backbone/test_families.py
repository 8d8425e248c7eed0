"""The first network of an ensemble is its backbone, for each known family; blocks become layers with kernels."""

from __future__ import annotations

from typing import Any

import pytest
import timm_like
import torch
import torchvision_like
from backbones import BACKBONES, backbone, image_size, trained
from torch import nn

from hne import FusedHNE, Module, NaiveHNE
from hne.models import HNE


@pytest.mark.parametrize("name", BACKBONES)
def test_the_first_leaf_is_the_backbone(name: str) -> None:
    """In float64, in all executions, in eval mode and for the gradients of the input."""
    net = backbone(name).double()
    x = torch.randn(3, 3, image_size(name), image_size(name), dtype=torch.float64, requires_grad=True)
    expected = net(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    model = FusedHNE.from_backbone(net, (1, 2, 4))
    assert not model.training
    assert model.num_models == 4
    with torch.no_grad():
        close(model(x, num_models=1)[0], expected)  # folded
        assert model(x).shape == (4, 3, 7)
        _, first = next(model.anytime(x))
        close(first, expected)
        close(model.to_naive()(x, num_models=1)[0], expected)
    logits = model(x, num_models=1)[0]
    close(logits, expected)
    close(torch.autograd.grad(logits.square().sum(), x)[0], gradient)


@pytest.mark.parametrize("name", BACKBONES)
def test_equal_to_1e_minus_5_in_float32(name: str) -> None:
    net = backbone(name)
    model = NaiveHNE.from_backbone(net, (1, 2))
    x = torch.randn(2, 3, image_size(name), image_size(name))
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(model(x, num_models=1)[0], expected, rtol=1e-5, atol=1e-5)


TRAINABLE = {name: make for name, make in BACKBONES.items() if name not in ("sequential", "torchvision-mobilenetv2")}


@pytest.mark.parametrize("name", [name for name in TRAINABLE if "vgg" not in name or "timm" in name])  # dropout
def test_a_training_step_of_the_first_leaf_is_that_of_the_backbone(name: str) -> None:
    """Logits, gradients of all weights and running statistics, in training mode; networks without dropout."""
    net = backbone(name).double().train()
    model = FusedHNE.from_backbone(net, (1, 1), perturb=0.0)
    assert model.training
    x = torch.randn(4, 3, image_size(name), image_size(name), dtype=torch.float64)
    expected, logits = net(x), model(x)[0]
    close(logits, expected)
    expected.square().sum().backward()
    logits.square().sum().backward()
    close(squares(model), squares(net))
    with torch.no_grad():
        close(model.eval()(x)[0], net.eval()(x))


def squares(net: nn.Module) -> torch.Tensor:
    """The sum of the squares of all gradients. A bias before a batch norm has none."""
    return torch.stack([p.grad.square().sum() for p in net.parameters() if p.grad is not None]).sum()


BLOCKS = {
    "torchvision-resnet-basic": "Conv MaxPool | BasicBlock | BasicBlock | BasicBlock BasicBlock | BasicBlock",
    "torchvision-resnet-bottleneck": "Conv MaxPool DenseBottleneck | DenseBottleneck | DenseBottleneck DenseBottleneck "
    "| DenseBottleneck",
    "torchvision-mobilenetv2": "Conv Conv Conv | Bottleneck Bottleneck | Bottleneck Bottleneck | Bottleneck Bottleneck "
    "Bottleneck | Bottleneck Bottleneck Conv Module",  # dropout before the head
    "torchvision-vgg": "Conv MaxPool | Conv MaxPool | Conv Conv MaxPool | Conv MaxPool | Conv MaxPool Module Conv "
    "Module Conv Module",
    "torchvision-vit": "PatchEmbedding TransformerBlock TransformerBlock | TransformerBlock TransformerBlock | "
    "TransformerBlock SelectToken LayerNorm",
    "timm-seresnet-silu": "Conv Conv MaxPool BasicBlock BasicBlock | BasicBlock BasicBlock | BasicBlock BasicBlock",
    "timm-mobilenetv2": "Conv Conv Conv Bottleneck Bottleneck | Bottleneck Bottleneck Bottleneck Bottleneck | "
    "Bottleneck Bottleneck Conv",
    "timm-vgg": "Conv MaxPool | Conv MaxPool | Conv MaxPool Conv Conv",
    "timm-vit-average": "PatchEmbedding TransformerBlock | TransformerBlock | TransformerBlock | TransformerBlock "
    "Module LayerNorm",
    "wide-resnet": "Conv | PreActivation PreActivation | PreActivation PreActivation | PreActivation PreActivation "
    "Norm",
    "sequential": "Conv MaxPool | Conv Module | Conv Module",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_become_layers_with_kernels(name: str) -> None:
    model = FusedHNE.from_backbone(backbone(name), [1] * len(BLOCKS[name].split(" | ")))
    got = [" ".join(type(layer.spec).__name__ for layer in block) for block in model.layers_of_blocks()]
    assert " | ".join(got) == BLOCKS[name]


def kinds(model: HNE) -> list[str]:
    return [type(layer.spec).__name__ for block in model.layers_of_blocks() for layer in block]


def test_settings_are_taken_over() -> None:
    net = torchvision_like.ResNet(torchvision_like.Bottleneck, width=4, groups=2)
    specs = [layer.spec for block in FusedHNE.from_backbone(net, (1,)).layers_of_blocks() for layer in block]
    stem, pool, first, second = specs[:4]
    assert (stem.kernel_size, stem.stride, stem.padding, stem.activation) == (7, 2, 3, "relu")
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    assert (first.middle, first.channels, first.groups, first.stride) == (4, 16, 2, 1)
    assert (second.middle, second.channels, second.groups, second.stride) == (8, 32, 2, 2)
    model = FusedHNE.from_backbone(timm_like.ResNet(squeeze=5, act=nn.SiLU), (1,))
    block = model.layers_of_blocks()[0][3].spec
    assert (block.squeeze, block.activation) == (5, "silu")
    vit = FusedHNE.from_backbone(torchvision_like.VisionTransformer(), (1,)).layers_of_blocks()[0]
    assert (vit[0].spec.patch_size, vit[0].spec.image_size, vit[0].spec.class_token) == (8, 32, True)
    assert (vit[1].spec.heads, vit[1].spec.hidden, vit[1].spec.eps) == (3, 20, 1e-6)


def set_eps(net: Any) -> None:
    net.layer2[0].bn1.eps = 1e-3


def set_momentum(net: Any) -> None:
    net.layer2[0].bn2.momentum = 0.01


def dilate(net: Any) -> None:
    net.layer2[0].conv2 = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)


def change_activation(net: Any) -> None:
    net.layer2[0].relu = nn.ELU()


def add_dropout(net: Any) -> None:
    net.layer2[0].dropout = nn.Dropout(0.1)


def add_hook(net: Any) -> None:
    net.layer2[0].conv1.register_forward_hook(lambda module, inputs, output: 2 * output)


def subclass(net: Any) -> None:
    class Doubled(torchvision_like.BasicBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    net.layer2[0].__class__ = Doubled


def same_name(net: Any) -> None:
    subclass(net)
    type(net.layer2[0]).__name__ = "BasicBlock"


def dropout_in_forward(net: Any) -> None:
    class BasicBlock(torchvision_like.BasicBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    net.layer2[0].__class__ = BasicBlock


def synchronise(net: Any) -> None:
    net.layer2[0] = nn.SyncBatchNorm.convert_sync_batchnorm(net.layer2[0])


def look_alike(net: Any) -> None:
    class BasicBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Linear(8, 16)
            self.bn1, self.conv2, self.bn2 = nn.ReLU(), nn.AvgPool2d(2), nn.ELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn2(self.conv2(self.bn1(self.conv1(x.movedim(1, 3)).movedim(3, 1))))

    net.layer2[0] = BasicBlock()


def frozen_statistics(net: Any) -> None:
    net.layer2[0].bn1.track_running_stats = False
    net.layer2[0].bn1.running_mean = net.layer2[0].bn1.running_var = None


CHANGES = {
    set_eps: "eps 0.001",
    set_momentum: "momentum 0.01",
    dilate: "dilation 2",
    change_activation: "activation",
    add_dropout: "Dropout 0.1",
    add_hook: "hooks",
    subclass: "no such layer",
    same_name: "computes something else in eval mode",
    dropout_in_forward: "computes something else in training mode",
    frozen_statistics: "running statistics",
    synchronise: "SyncBatchNorm in place of a batch norm",
    look_alike: "Linear in place of a convolution",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_block_is_taken_as_it_is(change: Any) -> None:
    """Its neighbours become layers with kernels, and the first leaf is the backbone nevertheless."""
    net = trained(torchvision_like.ResNet())
    change(net)
    net = net.double()
    model = FusedHNE.from_backbone(net, (1, 2, 2, 4))
    assert kinds(model) == ["Conv", "MaxPool", "BasicBlock", "Module", *["BasicBlock"] * 3]
    (row,) = (row for row in model.conversion if row.became == "Module")
    assert row.path == "layer2.0"
    assert CHANGES[change] in row.note
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    with torch.no_grad():
        close(model(x, num_models=1)[0], net(x))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: timm_like.ResNet(drop_path=0.1), "BasicBlock"),
        (lambda: timm_like.VisionTransformer(drop_path=0.1), "TransformerBlock"),
        (lambda: torchvision_like.VisionTransformer(dropout=0.1), "TransformerBlock"),
    ],
    ids=["resnet", "timm-vit", "torchvision-vit"],
)
def test_blocks_with_stochastic_depth_or_dropout_are_modules(make: Any, kind: str) -> None:
    model = FusedHNE.from_backbone(make(), (1, 2))
    assert kind not in kinds(model)
    assert "Module" in kinds(model)


def test_wide_resnet_with_dropout_is_taken_as_it_is() -> None:
    model = FusedHNE.from_backbone(timm_like.wide_resnet(droprate=0.3), (1, 2))
    assert "PreActivation" not in kinds(model)
    assert any("dropout" in row.note for row in model.conversion)


def test_dropout_before_the_head_stays() -> None:
    """It is drawn in training mode, and not in eval mode."""
    model = FusedHNE.from_backbone(timm_like.ResNet(drop_rate=0.5).train(), (1, 1, 1))
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))


def test_a_module_that_writes_into_its_input_does_not_disturb_other_branches() -> None:
    """Both branches of the second block read the output of the first."""

    class AddInPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    convs = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(convs[0], AddInPlace(), convs[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net = net.double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stages = [["0"], [AddInPlace(), "2"]]
    model = FusedHNE.from_backbone(net.eval(), (1, 2), stages=stages, head="5", perturb=0.0)
    with torch.no_grad():
        features = [model.blocks[1][0].copies[i](convs[0](x)) for i in range(2)]
        assert torch.equal(*features)
        close(model(x, num_models=1)[0], net(x.clone()))
        before = model(x)
        assert torch.equal(before, model(x))


def test_a_module_layer_has_the_weights_of_the_backbone_in_all_branches() -> None:
    net = trained(torchvision_like.ResNet())
    net.layer3[0].bn1.eps = 1e-4
    model = FusedHNE.from_backbone(net, (1, 1, 2, 4), perturb=0.0)
    (layer,) = (layer for block in model.layers_of_blocks() for layer in block if isinstance(layer.spec, Module))
    for copy in layer.copies:
        for name, tensor in net.layer3[0].state_dict().items():
            assert torch.equal(copy.state_dict()[name], tensor)


def test_the_cifar_resnet_with_functions_in_its_forward() -> None:
    """The activation of the stem is a function, and the pooling has a window of 4 pixels: 32x32 images."""

    class CifarResNet(torchvision_like.ResNet):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
            self.linear = self.fc
            del self.relu, self.maxpool, self.avgpool, self.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.relu(self.bn1(self.conv1(x)))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.linear(nn.functional.avg_pool2d(x, 4).view(-1, 64))

    net = trained(CifarResNet(), 32).double()
    model = FusedHNE.from_backbone(net, (1, 1, 2, 4))
    assert model.conversion.input_shape == (3, 32, 32)
    assert kinds(model)[:2] == ["Conv", "BasicBlock"]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        close(model(x, num_models=1)[0], net(x))


def close(y: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)

"""The branches of an ensemble from a backbone: copies whose symmetry is broken, new heads, a frozen trunk."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from backbones import BACKBONES, backbone, image_size, trained
from torch import Tensor
from torchvision_like import ResNet

from hne import FusedHNE, Hierarchy, Module, NaiveHNE
from hne.models import HNE


def rows(model: HNE, layer: torch.nn.Module, name: str, tensor: Tensor) -> list[Tensor]:
    """The part of each branch of a tensor of a layer."""
    branches = model.hierarchy.branches[next(i for i, b in enumerate(model.layers_of_blocks()) if layer in b)]
    return list(tensor.detach().view(branches, -1))


@pytest.mark.parametrize("name", ["torchvision-resnet-basic", "torchvision-mobilenetv2", "timm-vit", "wide-resnet"])
def test_branches_are_perturbed_copies_of_the_first(name: str) -> None:
    """Parameters differ by noise relative to their deviation; running statistics are equal, and so is the trunk."""
    perturb = 0.2
    net = backbone(name)
    model = FusedHNE.from_backbone(net, (1, 2, 4), perturb=perturb)
    ratios = []
    for block in model.layers_of_blocks():
        for layer in block:
            if isinstance(layer.spec, Module):
                continue
            for key, tensor in layer.state_dict().items():
                if tensor.dim() == 0:
                    assert tensor == 11  # num_batches_tracked
                    continue
                first, *others = rows(model, layer, key, tensor)
                for other in others:
                    if "running" in key:
                        assert torch.equal(other, first)
                    elif first.numel() > 200:
                        ratios.append(float((other - first).std() / first.std()))
                        assert not torch.equal(other, first)
    assert len(ratios) > 3
    assert all(0.75 * perturb < ratio < 1.25 * perturb for ratio in ratios)  # 5 deviations of 200 values


def test_noise_differs_between_branches_and_follows_the_seed() -> None:
    net = backbone("torchvision-resnet-basic")
    model = FusedHNE.from_backbone(net, (1, 4), seed=3)
    weight = model.blocks[1][-1].first.conv.weight.detach().view(4, -1)
    assert len({float(row.sum()) for row in weight}) == 4
    again = FusedHNE.from_backbone(net, (1, 4), seed=3)
    other = FusedHNE.from_backbone(net, (1, 4), seed=4)
    for (name, tensor), same, different in zip(
        model.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, same), name
        if name.startswith("blocks.1") and name.endswith("conv.weight"):
            assert not torch.equal(tensor, different), name


def test_copies_of_a_module_are_perturbed_as_well() -> None:
    net = trained(ResNet())
    net.layer4[0].bn1.eps = 1e-4
    model = FusedHNE.from_backbone(net, (1, 1, 1, 1, 3), perturb=0.1)
    (layer,) = (layer for layer in model.layers_of_blocks()[4] if isinstance(layer.spec, Module))
    first, second, third = layer.copies
    source = net.layer4[0].conv2.weight.detach()
    assert torch.equal(first.conv2.weight, source)
    for other in (second, third):
        assert 0.085 < float((other.conv2.weight.detach() - source).std() / source.std()) < 0.115
        assert torch.equal(other.bn1.running_mean, first.bn1.running_mean)
    assert not torch.equal(second.conv2.weight, third.conv2.weight)


def test_parameters_without_gradient_stay_so_and_have_no_noise() -> None:
    """In layers with kernels, and in modules as they are."""
    net = backbone("torchvision-resnet-basic")
    net.layer4[0].conv1.weight.requires_grad_(False)
    net.layer3[0].conv1.weight.requires_grad_(False)
    net.layer3[0].bn1.eps = 1e-4
    model = FusedHNE.from_backbone(net, (1, 1, 1, 2, 2))
    block = model.blocks[4][0]
    assert not block.first.conv.weight.requires_grad
    assert torch.equal(*block.first.conv.weight.view(2, -1))
    assert block.second.conv.weight.requires_grad
    assert not torch.equal(*block.second.conv.weight.detach().view(2, -1))
    copies = model.blocks[3][0].copies
    assert not any(module.conv1.weight.requires_grad for module in copies)
    assert torch.equal(*(module.conv1.weight for module in copies))
    assert not torch.equal(*(module.conv2.weight for module in copies))
    frozen = FusedHNE.from_backbone(net.requires_grad_(False), (1, 2))
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["head.conv.weight", "head.conv.bias"]


def test_without_noise_only_the_heads_differ() -> None:
    net = backbone("torchvision-resnet-basic")
    model = FusedHNE.from_backbone(net, (1, 2, 2, 2), perturb=0)
    for layer in model.layers_of_blocks()[1]:
        weight = layer.first.conv.weight.view(2, -1)
        assert torch.equal(*weight)
    heads = model.head.conv.weight.view(2, -1)
    assert torch.equal(heads[0], net.fc.weight.flatten())
    assert not torch.equal(*heads)


def test_several_heads_on_a_branch() -> None:
    net = backbone("torchvision-resnet-basic").double()
    model = FusedHNE.from_backbone(net, Hierarchy((1, 2, 2), num_models=6))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (6, 2, 7)
        torch.testing.assert_close(logits[0], net(x))
        assert all((logits[i] - logits[j]).abs().max() > 1e-3 for i in range(6) for j in range(i))


def test_other_classes_have_new_heads() -> None:
    """The features are those of the backbone nevertheless."""
    net = backbone("torchvision-resnet-basic")
    model = FusedHNE.from_backbone(net, (1, 2), num_classes=11)
    assert model.num_classes == 11
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model(x).shape == (2, 2, 11)
        model.head.conv.weight[:7] = net.fc.weight[:, :, None, None]
        model.head.conv.bias[:7] = net.fc.bias
        torch.testing.assert_close(model(x)[0, :, :7], net(x), rtol=1e-4, atol=1e-5)
    heads = model.head.conv.weight.detach().view(2, 11, -1)
    bound = heads.shape[2] ** -0.5  # of nn.Linear
    assert heads[1].abs().max() <= bound
    assert not torch.equal(heads[0], heads[1])


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_and_random_generator_are_unchanged(name: str) -> None:
    net = backbone(name).train()
    net.register_buffer("other", torch.randn(3))
    modes = [module.training for module in net.modules()]
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    model = FusedHNE.from_backbone(net, (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in net.modules()]
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # no memory is shared
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert not any(parameter.grad is not None for parameter in net.parameters())


def test_the_model_is_an_ordinary_one() -> None:
    """Copies, conversion to the other class, pickles, and prefix logits."""
    net = backbone("torchvision-mobilenetv2").double()
    model = FusedHNE.from_backbone(net, (1, 2, 2, 4))
    x = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        for other in (copy.deepcopy(model), model.to_naive(), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), logits)
            assert str(other.conversion) == str(model.conversion)
        torch.testing.assert_close(model.prefix_logits(x)[-1], logits.mean(0))
        for n, y in model.anytime(x):
            torch.testing.assert_close(y, logits[:n].mean(0))
    assert model.macs(1, 32) < model.macs(4, 32)


def test_equal_mode_dtype_and_class() -> None:
    net = backbone("torchvision-resnet-basic").double().train()
    model = NaiveHNE.from_backbone(net, (1, 2))
    assert type(model) is NaiveHNE
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}


class TestFreeze:
    def test_the_trunk_keeps_weights_and_statistics(self) -> None:
        net = backbone("torchvision-resnet-basic").train()
        model = FusedHNE.from_backbone(net, (1, 1, 2, 2), freeze_trunk=True)
        assert model.frozen_blocks == 2
        assert all(not p.requires_grad for block in model.blocks[:2] for p in block.parameters())
        assert all(p.requires_grad for block in model.blocks[2:] for p in block.parameters())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
            optimizer.step()
        for name, tensor in model.state_dict().items():
            frozen = name.startswith(("blocks.0", "blocks.1"))
            assert torch.equal(tensor, before[name]) == frozen, name

    def test_dropout_in_a_frozen_trunk_is_off(self) -> None:
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout(0.5), torch.nn.Conv2d(4, 4, 3), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(4, 3)
        )  # fmt: skip
        model = FusedHNE.from_backbone(net, (1, 2), freeze_trunk=True).train()
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(model(x), model(x))
        assert not torch.equal(*(y(x) for y in [model.freeze_blocks_(0)] * 2))

    def test_blocks_can_be_frozen_and_unfrozen(self) -> None:
        model = FusedHNE.from_preset("hne_tiny", num_classes=3)
        model.head.requires_grad_(False)
        model.freeze_blocks_(3)
        assert [p.requires_grad for block in model.blocks for p in block.parameters()].count(False) > 0
        assert not any(m.training for block in model.blocks[:3] for m in block.modules())
        assert all(m.training for m in model.blocks[3].modules())
        model.freeze_blocks_(1)
        assert not any(p.requires_grad for p in model.blocks[0].parameters())
        assert all(p.requires_grad for block in model.blocks[1:] for p in block.parameters())
        assert not any(p.requires_grad for p in model.head.parameters())  # frozen by somebody else
        assert all(m.training for block in model.blocks[1:] for m in block.modules())
        model.eval()
        assert not model.blocks[2].training
        assert not copy.deepcopy(model.train()).blocks[0].training

    def test_frozen_blocks_are_a_part_of_the_config(self) -> None:
        model = FusedHNE.from_preset("hne_tiny", num_classes=3)
        assert "frozen_blocks" not in model.config()
        again = FusedHNE.from_config(model.freeze_blocks_(2).config())
        assert again.frozen_blocks == 2
        assert not any(p.requires_grad for block in again.blocks[:2] for p in block.parameters())

    def test_wrong_counts(self) -> None:
        model = FusedHNE.from_preset("hne_tiny", num_classes=3)
        with pytest.raises(ValueError, match="between 0 and the number of blocks, 4, got 5"):
            model.freeze_blocks_(5)
        with pytest.raises(TypeError, match=r"count must be an int, got 1\.5"):
            model.freeze_blocks_(1.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"freeze_trunk: expected a tree whose first block has one branch.*2, 4"):
            FusedHNE.from_backbone(backbone("torchvision-resnet-basic"), (2, 4), freeze_trunk=True)


def test_images_of_another_size() -> None:
    """The size that the backbone was checked with binds only networks that it binds itself."""
    net = backbone("torchvision-resnet-basic").double()
    model = FusedHNE.from_backbone(net, (1, 2), input_size=(33, 47))
    assert model.conversion is not None
    assert model.conversion.input_shape == (3, 33, 47)
    for shape in ((1, 3, 32, 32), (2, 3, 65, 50), (0, 3, 32, 32)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(model(x, num_models=1)[0], net(x))
    vit = FusedHNE.from_backbone(backbone("torchvision-vit"), (1, 2))
    with pytest.raises(ValueError, match=r"32x32 pixels.*40x40"):
        vit(torch.randn(1, 3, 40, 40))


@pytest.mark.parametrize("name", ["timm-vit", "sequential"])
def test_image_size_is_found(name: str) -> None:
    model = FusedHNE.from_backbone(backbone(name), (1, 2))
    assert model.conversion is not None
    assert model.conversion.input_shape == (3, image_size(name), image_size(name))

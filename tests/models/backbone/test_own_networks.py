"""A single network of this package as a backbone."""

from __future__ import annotations

import pytest
import torch
from backbones import trained
from torch import nn

from hne import FusedHNE, Hierarchy, Module, NaiveHNE
from hne.errors import BackboneError
from hne.layers import Conv


def network(preset: str, width: float = 0.25, channels: int = 3) -> FusedHNE:
    tree = Hierarchy.single(5 if "resnet50_cifar" in preset else 4)
    return FusedHNE.from_preset(preset, num_classes=7, in_channels=channels, width=width, hierarchy=tree)


@pytest.mark.parametrize("preset", ["hne_resnet18_cifar", "hne_resnet50_cifar", "hne_wrn28_10", "hne_tiny"])
def test_first_leaf_is_the_network(preset: str) -> None:
    """Also where the layers of the preset's own tree have a convolution in the shortcut of a branching layer."""
    net = trained(network(preset, 0.1 if preset == "hne_wrn28_10" else 0.25), 16)
    branches = (1, 2, 2, 4) if net.hierarchy.num_blocks == 4 else (1, 2, 2, 4, 8)
    model = FusedHNE.from_backbone(net, branches)
    x = torch.randn(3, 3, 16, 16)
    for mode in (True, False):
        with torch.no_grad():
            expected = net.train(mode)(x)
            torch.testing.assert_close(model.train(mode)(x, num_models=1), expected, rtol=1e-4, atol=1e-4)
    members = model(x).flatten(1)
    assert torch.cdist(members, members).add(torch.eye(len(members))).min() > 1e-3
    assert model.macs(1, 16) == net.macs(1, 16)
    assert model.conversion is not None
    assert len(model.conversion) == sum(map(len, net.layers_of_blocks())) + 1
    assert "Module" not in {row.became for row in model.conversion}


def test_modules_take_over_the_trained_copy() -> None:
    """Not the template, which training leaves as it is."""
    template = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh())
    net = FusedHNE(Hierarchy((1, 1)), [[Conv(4)], [Module(template)]], num_classes=5)
    net = trained(net, 8)
    model = NaiveHNE.from_backbone(net, (1, 3), num_classes=2)
    x = torch.randn(2, 4, 8, 8)
    (layer,) = model.layers_of_blocks()[1]
    assert torch.equal(layer.copies[0](x), net.layers_of_blocks()[1][0].copies[0](x))
    assert not torch.equal(layer.copies[0](x), template(x))
    assert model.num_classes == 2
    assert not model.training


def test_backbone_is_not_changed() -> None:
    net = network("hne_tiny", channels=1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = FusedHNE.from_backbone(net, (1, 1, 2, 4))
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_wrong_networks_and_trees() -> None:
    net = network("hne_tiny")
    with pytest.raises(BackboneError, match=r"branches: expected a count for each of the 4 blocks .* got \(1, 2\)"):
        FusedHNE.from_backbone(net, (1, 2))
    ensemble = FusedHNE.from_preset("hne_tiny", num_classes=7)
    with pytest.raises(BackboneError, match="expected a single network, got an ensemble of 8"):
        FusedHNE.from_backbone(ensemble, (1, 1, 2, 4))
    with pytest.raises(ValueError, match="stages, head: expected none"):
        FusedHNE.from_backbone(net, (1, 1, 2, 4), head="head")
    with pytest.raises(BackboneError, match="input_size: the network computes no such images"):
        FusedHNE.from_backbone(network("hne_vit_tiny", 1.0), (1, 1, 1, 2), input_size=10)

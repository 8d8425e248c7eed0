"""The network that is exported, against the model; in float64, for every kind of layer."""

from __future__ import annotations

from typing import Any

import plain_networks
import pytest
import templates
import torch
import transformer_models
from networks import TREES, build, each_tree, images
from registries import restored_registries
from torch import Tensor, nn

from hne import Conv, Hierarchy, NaiveHNE
from hne.executors import CopyFreeNetwork, copy_free
from hne.layers import Executor, Features, Layer, LayerSpec

each_layout = pytest.mark.parametrize("separate", [False, True], ids=["grouped", "separate"])


def check(model: NaiveHNE, x: Tensor, sizes: Any, separate: bool) -> None:
    with torch.no_grad():
        for n in sizes:
            want = model(x, n)
            for mean in (True, False):
                network = CopyFreeNetwork(model, slice(0, n), x[:2], mean=mean, separate=separate).eval()
                torch.testing.assert_close(network(x), want.mean(0) if mean else want)


@each_layout
@each_tree
def test_every_tree(tree: Hierarchy, separate: bool, rng: torch.Generator) -> None:
    check(build(NaiveHNE, tree, rng), images(rng), range(1, tree.num_models + 1), separate)


@each_layout
@each_tree
def test_leaf_by_leaf_from_kept_features(tree: Hierarchy, separate: bool, rng: torch.Generator) -> None:
    """The features of each block of the latest leaf are where the next leaf starts."""
    model, x = build(NaiveHNE, tree, rng), images(rng)
    blocks = len(model.blocks)
    path = [x] + [torch.empty(0)] * blocks  # path[b] is the input of block b
    with torch.no_grad():
        for leaf, want in enumerate(model(x)):
            first, leaves = tree.first_new(leaf), slice(leaf, leaf + 1)
            options = {"first": first, "keep": range(first, blocks), "mean": False, "separate": separate}
            step = CopyFreeNetwork(model, leaves, path[first][:1], **options).eval()
            results = step(path[first])
            *features, logits = results if first < blocks else (results,)
            path[first + 1 :] = features
            torch.testing.assert_close(logits[0], want)


@each_layout
@pytest.mark.parametrize("name", plain_networks.CASES)
def test_layers(name: str, separate: bool, rng: torch.Generator) -> None:
    model = build(NaiveHNE, TREES["odd"], rng, blocks=plain_networks.CASES[name])
    check(model, images(rng, size=(13, 14)), (1, 3, 4, 5, 6), separate)


@each_layout
@pytest.mark.parametrize("name", transformer_models.TRANSFORMERS)
def test_transformers(name: str, separate: bool, rng: torch.Generator) -> None:
    model = transformer_models.build(NaiveHNE, name, TREES["odd"], rng)
    check(model, images(rng, size=transformer_models.SIZE), (1, 4, 6), separate)


@each_layout
@pytest.mark.parametrize("blocks", templates.BLOCKS)
def test_modules_of_other_classes(blocks: str, separate: bool, rng: torch.Generator) -> None:
    model = templates.network(NaiveHNE, TREES["odd"], rng, blocks)
    check(model, images(rng, size=(16, 16)), (1, 4, 6), separate)


@each_layout
def test_other_layers_compute_as_they_are(separate: bool, rng: torch.Generator) -> None:
    """A replaced convolution, a hook, and a layer without running statistics."""
    model = build(NaiveHNE, TREES["odd"], rng, blocks=[[Conv(6)], [Conv(8), Conv(7)], [Conv(5), Conv(6, stride=2)]])
    replaced, hooked, unfolded = (model.blocks[index][0].unit for index in range(3))
    replaced.conv = nn.Conv2d(3, 6, 3, padding=1, bias=True, dtype=torch.float64)
    hooked.conv.register_forward_hook(lambda module, args, y: 2 * y)
    unfolded.bn = nn.BatchNorm2d(30, track_running_stats=False, dtype=torch.float64)
    check(model, images(rng, 2), (6,), separate)


def test_every_kind_of_layer_is_exported_without_copies() -> None:
    ours = {layer for layer in Layer.modules_by_spec.values() if layer.__module__.startswith("hne.")}
    assert ours == set(copy_free._KINDS)


def test_a_layer_of_another_package(rng: torch.Generator) -> None:
    """It may do arithmetic with features, which are tensors to it."""
    with restored_registries():

        class Twice(LayerSpec):
            """Adds the features of the parent to themselves."""

        class TwiceLayer(Layer, spec=Twice):
            def __init__(self, spec: Twice, in_channels: int, branches: int, replicate: int) -> None:
                super().__init__(spec, in_channels, branches, replicate)
                self.scale = nn.Parameter(torch.randn(()))

            def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
                copies = executor.replicate(x, branches, replicate, self.spec.channels)
                return copies + self.scale * copies

            def macs(self, size: tuple[int, int]) -> int:
                return 0

            def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
                return size

        model = build(NaiveHNE, TREES["odd"], rng, blocks=[[Conv(6)], [Twice(6), Conv(6)], [Conv(5)]])
        check(model, images(rng), (1, 4, 6), separate=False)
        assert [type(layer) for layer in CopyFreeNetwork(model, slice(0, 4), images(rng)).called] == [TwiceLayer]


def test_constants_are_those_of_the_members_alone(rng: torch.Generator) -> None:
    """No weight of other members, and none of a batch norm."""
    model = build(NaiveHNE, Hierarchy((1, 2, 4)), rng, blocks=[[Conv(6)], [Conv(8)], [Conv(7)]])
    network = CopyFreeNetwork(model, slice(0, 3), images(rng))
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    assert shapes == {
        "constants.blocks_0_0_unit.0.weight": (6, 3, 3, 3),
        "constants.blocks_0_0_unit.0.bias": (6,),
        "constants.blocks_1_0_unit.0.weight": (16, 6, 3, 3),  # both children of the only parent
        "constants.blocks_1_0_unit.0.bias": (16,),
        "constants.blocks_2_0_unit.0.weight": (14, 8, 3, 3),  # both children of the first parent
        "constants.blocks_2_0_unit.0.bias": (14,),
        "constants.blocks_2_0_unit.1.weight": (7, 8, 3, 3),  # the only child of the second one
        "constants.blocks_2_0_unit.1.bias": (7,),
        "constants.head.weight": (5, 21),
        "constants.head.bias": (5,),
    }

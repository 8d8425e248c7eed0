"""The worked example of CONTRIBUTING.md: a new kind of layer, with and without a kernel path."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import each_model
from registries import restored_registries

import hne
from hne import HNE, Conv, FusedHNE, Hierarchy
from hne.executors import folding
from hne.layers import BranchLinear, Executor, Features, Layer, LayerSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> Iterator[dict[str, Any]]:
    """The names that the example's code blocks define; its registrations are undone afterwards."""
    section = re.search(r"^## Add a layer$(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert section is not None
    namespace: dict[str, Any] = {}
    with restored_registries():
        for block in re.findall(r"^```python\n(.*?)^```$", section[1], re.M | re.S):
            exec(block, namespace)
        yield namespace


@pytest.fixture
def model(example: dict[str, Any]) -> FusedHNE:
    model: FusedHNE = copy.deepcopy(example["model"]).double().train()
    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.randn(4, 3, 9, 7, dtype=torch.float64))  # updates the running statistics
    return model


@pytest.fixture
def x(rng: torch.Generator) -> torch.Tensor:
    return torch.randn(3, 3, 9, 7, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("with_kernels", [True, False], ids=["kernel path", "forward alone"])
def test_inference(
    with_kernels: bool, model: FusedHNE, x: torch.Tensor, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_kernels:
        monkeypatch.delitem(folding._KERNEL_PATHS, example["DoubleConvLayer"])
    naive = model.eval().to_naive()
    with torch.no_grad():
        want = naive(x)
        torch.testing.assert_close(model(x), want)
        torch.testing.assert_close(model(x, 3), want[:3])
        torch.testing.assert_close(model.prefix_logits(x), naive.prefix_logits(x))
        for n, y in model.anytime(x):
            torch.testing.assert_close(y, want[:n].mean(0))


def test_training(model: FusedHNE, x: torch.Tensor) -> None:
    naive = model.to_naive()
    target = torch.tensor([0, 1, 2])
    for network in (model, naive):
        hne.objective("I+HD")(network(x), target).backward()
    for got, want in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@each_model
def test_config(kind: type[HNE], model: FusedHNE) -> None:
    twin = kind.from_config(model.config())
    assert twin.config() == model.config()
    assert twin.macs(2) == model.macs(2)
    assert "double conv 8" in repr(twin)


def test_cost(model: FusedHNE) -> None:
    first, second = 9 * 3 * 8 * 81, 9 * 8 * 8 * 81
    assert model.layers_of_blocks()[0][0].macs((9, 9)) == first + second


def test_a_layer_that_only_copies_and_multiplies(rng: torch.Generator) -> None:
    """Features that a convolution at the end of the previous block has left unnormalised are copied and multiplied."""
    with restored_registries():

        class Mixing(LayerSpec):
            """A linear map of each pixel, and the identity."""

        class MixingLayer(Layer, spec=Mixing):
            def __init__(self, spec: Mixing, in_channels: int, branches: int, replicate: int) -> None:
                super().__init__(spec, in_channels, branches, replicate)
                self.mix = BranchLinear(branches, in_channels, spec.channels)

            def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
                copies = executor.replicate(x, branches, replicate, self.spec.channels)
                return copies + executor.conv(self.mix, x, branches, replicate)

            def macs(self, size: tuple[int, int]) -> int:
                return self.mix.macs(size)

            def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
                return size

        torch.manual_seed(0)
        model = FusedHNE(Hierarchy((1, 2)), [[Conv(4)], [Mixing(4)]], num_classes=3).double().train()
        x = torch.randn(3, 3, 5, 4, generator=rng, dtype=torch.float64)
        torch.testing.assert_close(model(x), copy.deepcopy(model).to_naive()(x))

"""``torch.compile`` and ``torch.export`` of a model."""

from __future__ import annotations

import copy

import networks
import pytest
import torch
from networks import build, images

from hne import Bottleneck, Conv, FusedHNE, Hierarchy, objective


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_with_inductor(rng: torch.Generator) -> None:
    model = FusedHNE(Hierarchy((1, 2)), [[Conv(4)], [Bottleneck(4, 2)]], num_classes=2).eval()
    x = images(rng, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_for_inference_in_one_graph(rng: torch.Generator, grad: bool) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng, torch.float32)
    x = images(rng, dtype=torch.float32)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # without code generation, which is slow
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x, 4), expected[:4], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.blocks[0][0].unit.conv.weight.mul_(0.5)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_for_training_in_one_graph(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng, torch.float32).train()
    twin = copy.deepcopy(model)
    x, target = images(rng, dtype=torch.float32), torch.tensor([0, 1, 2])
    for m, run in ((model, model), (twin, torch.compile(twin, fullgraph=True, backend="aot_eager"))):
        objective("I+HD")(run(x), target).backward()
        assert m.head.conv.weight.grad is not None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-3 * p.grad.abs().max() + 1e-5
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_exports_with_a_dynamic_batch(rng: torch.Generator, grad: bool) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng, torch.float32)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (images(rng, dtype=torch.float32),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        x = images(rng, size, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)

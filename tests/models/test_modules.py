"""Networks with ``hne.Module`` layers in PyTorch's tools: compilers, export, CUDA graphs, several processes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import networks
import pytest
import torch
from cuda_graphs import emulate
from networks import each_model, images
from processes import run_processes
from templates import Shuffle, network
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hne import HNE, Conv, FusedHNE, GraphedHNE, Hierarchy, Module, NaiveHNE, objective
from hne.inference import EnsembleMean, write_onnx, write_pt2
from hne.training import CapturedStep, training_step
from hne.training.captured_step import _ORDINARY_STEPS


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def convolutional(kind: type[HNE], rng: torch.Generator, dropout: float = 0.0) -> HNE:
    """A network in float32 and eval mode."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    block = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
    return kind(Hierarchy((1, 2, 4)), [[Conv(8)], [Module(Shuffle(8))], [Module(block)]], num_classes=5).eval()


@pytest.mark.usefixtures("_fresh_compiler")
@each_model
def test_compiles_for_inference_in_one_graph(kind: type[HNE], grad: bool, rng: torch.Generator) -> None:
    model = network(kind, networks.TREES["odd"], rng, dtype=torch.float32)
    x = images(rng, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x, 4), model(x, 4), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.blocks[1][0].copies[1][1].weight.mul_(0.5)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_for_training_in_one_graph(rng: torch.Generator) -> None:
    model = convolutional(FusedHNE, rng).train()
    twin = copy.deepcopy(model)
    x, target = images(rng, 4, dtype=torch.float32), torch.tensor([0, 1, 2, 3])
    for m, run in ((model, model), (twin, torch.compile(twin, fullgraph=True, backend="aot_eager"))):
        objective("I+HD")(run(x), target).backward()
        assert m.head.conv.weight.grad is not None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-3 * p.grad.abs().max() + 1e-5
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@each_model
def test_exports(kind: type[HNE], tmp_path: Path, rng: torch.Generator) -> None:
    model = convolutional(kind, rng)
    x = images(rng, 2, dtype=torch.float32)
    with torch.no_grad():
        want = model(x, 3).mean(0)
        torch.testing.assert_close(write_pt2(EnsembleMean(model, 3), x, tmp_path / "a.pt2"), want, rtol=1e-4, atol=1e-5)
        program = torch.export.load(tmp_path / "a.pt2").module()
        x = images(rng, 5, dtype=torch.float32)
        torch.testing.assert_close(program(x), model(x, 3).mean(0), rtol=1e-4, atol=1e-5)


def test_exports_to_onnx(tmp_path: Path, rng: torch.Generator) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = convolutional(NaiveHNE, rng), images(rng, 2, dtype=torch.float32)
    with torch.no_grad():
        logits = write_onnx(EnsembleMean(model, 3).eval(), x, tmp_path / "a.onnx")
        torch.testing.assert_close(logits, model(x, 3).mean(0), rtol=1e-4, atol=1e-5)


def test_torch_func(rng: torch.Generator) -> None:
    model, x = network(FusedHNE, networks.TREES["odd"], rng, "modules"), images(rng)
    with torch.no_grad():
        before = model(x)
        doubled = {name: 2 * value for name, value in model.state_dict().items() if value.is_floating_point()}
        after = torch.func.functional_call(model, doubled, (x,))
        twin = copy.deepcopy(model)
        twin.load_state_dict(doubled, strict=False)
        torch.testing.assert_close(after, twin(x))
        torch.testing.assert_close(model(x), before)


def test_inference_by_cuda_graphs(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    graphs = emulate(monkeypatch)
    model = convolutional(FusedHNE, rng)
    graphed = GraphedHNE(model)
    for _ in range(2):
        for _ in range(2):
            x = images(rng, dtype=torch.float32)
            with torch.no_grad():
                torch.testing.assert_close(graphed(x), model(x))
        with torch.no_grad():
            model.blocks[1][0].copies[0].conv.weight.mul_(2)
    assert graphs.captures >= 1
    model.blocks[1][0].copies[0].register_forward_hook(lambda *arguments: None)
    with pytest.raises(RuntimeError, match="GraphedHNE replays kernels and would not run hooks"):
        graphed(x)


def captured(model: HNE) -> tuple[CapturedStep, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.05), momentum=0.9, fused=True)
    return CapturedStep(model, lambda x, target: objective("I+HD")(model(x), target), optimizer), optimizer


def test_training_steps_by_cuda_graphs(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    graphs = emulate(monkeypatch)
    model = convolutional(FusedHNE, rng).train()
    twin = copy.deepcopy(model)
    step, _ = captured(model)
    _, optimizer = captured(twin)
    for _ in range(6):
        batch = images(rng, 4, dtype=torch.float32), torch.randint(5, (4,), generator=rng)
        loss = step(*batch)
        expected = training_step(lambda x, y: objective("I+HD")(twin(x), y), optimizer, *batch)
        torch.testing.assert_close(loss, expected)
    assert graphs.captures == 1
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_a_template_that_waits_for_the_gpu_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    class Waits(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum().item() < 1e9 else -x)

    emulate(monkeypatch)
    model = FusedHNE(Hierarchy((2,)), [[Module(Waits(3, 4, 1))]], num_classes=5).train()
    step, _ = captured(model)
    batch = images(rng, 4, dtype=torch.float32), torch.randint(5, (4,), generator=rng)
    for _ in range(_ORDINARY_STEPS):
        step(*batch)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph; nothing in it may wait for the GPU"):
        step(*batch)


# Several processes ----------------------------------------------------------------------------------------------------

PARTS = (2, 2)  # images in each process


def _steps(model: HNE, run: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits after each of two training steps, in eval mode without gradients."""
    results = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        run.train()(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            results += [model.eval()(x), model(x, 2)]
    return results


def _process(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")  # logits are a view, which nobody changes in place
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, x = torch.load(f"{folder}/input.pt", weights_only=False)
    parallel = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(parallel)
    wrapped(x.split(PARTS)[rank]).square().sum().backward()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.layers_of_blocks():
        for layer in block:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(([p.grad for p in parallel.parameters()], _steps(model, model, x)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@each_model
def test_several_processes(kind: type[HNE], tmp_path: Path, rng: torch.Generator) -> None:
    """``DistributedDataParallel`` averages the gradients, and ``fully_shard`` gathers the parameters of the copies."""
    model, x = convolutional(kind, rng).double(), images(rng, sum(PARTS))
    torch.save((model, x), tmp_path / "input.pt")
    twin = copy.deepcopy(model)
    sum(twin(part).square().sum() for part in x.split(PARTS)).div(2).backward()
    expected = _steps(model, model, x)
    run_processes(_process, tmp_path)
    for rank in range(2):
        gradients, steps = torch.load(tmp_path / f"{rank}.pt")
        for got, parameter in zip(gradients, twin.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-8, atol=1e-10)
        for got, want in zip(steps, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)

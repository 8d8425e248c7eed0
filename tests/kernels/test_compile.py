"""Under torch.compile and torch.export, ops and model are one graph with the same results."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, cast, cotangents, evaluate, representative
from torch import Tensor, nn

import hne_kernels as K
from hne import FusedHNE
from hne_kernels import dispatch

pytestmark = pytest.mark.usefixtures("one_thread", "_fresh_compiler")


_COMPILERS = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)]


@pytest.fixture
def _fresh_compiler() -> None:
    """Graphs of other tests would count against the limit of recompilations."""
    torch._dynamo.reset()


def _arguments(case: Case, rng: torch.Generator) -> tuple[dict[str, Any], list[Tensor]]:
    inputs = case.inputs(rng)
    grads = []
    if case.differentiable:
        grads = [grad.float() for grad in cotangents(case, cast(inputs, torch.float64), rng)]
    return inputs, grads


class _Compiled:
    """A case that is called through torch.compile."""

    def __init__(self, case: Case, **options: Any) -> None:
        self.op, self.differentiable = case.op, case.differentiable
        self._call = torch.compile(case.__call__, fullgraph=True, **options)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        return self._call(inputs)


def _same(got: Any, want: Any) -> None:
    for (name, one), (_, other) in zip(got.items(), want.items(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", representative(), ids=lambda case: case.label)
def test_one_graph_forwards_and_backwards(case: Case, dynamic: bool, rng: torch.Generator) -> None:
    inputs, grads = _arguments(case, rng)
    compiled = _Compiled(case, backend="aot_eager", dynamic=dynamic)
    _same(evaluate(compiled, inputs, grads), evaluate(case, inputs, grads))


@pytest.mark.skipif("triton" not in K.available_backends(), reason="the triton backend is not usable here")
@pytest.mark.parametrize("case", representative(), ids=lambda case: case.label)
def test_triton_ops_are_one_graph(case: Case, rng: torch.Generator) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, grads = _arguments(case, rng)
    inputs, grads = cast(inputs, torch.float32, device), [grad.to(device) for grad in grads]
    with K.use_backend("triton"):
        compiled = _Compiled(case, backend="aot_eager", dynamic=True)
        _same(evaluate(compiled, inputs, grads), evaluate(case, inputs, grads))


@pytest.mark.parametrize(
    "case", [c for c in representative() if "x" in c.make(torch.Generator())], ids=lambda c: c.label
)
def test_other_sizes_need_no_other_graph(case: Case, rng: torch.Generator) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = _Compiled(case, backend=count, dynamic=True)
    with torch.no_grad():
        for batch, height, width in ((7, 9, 13), (11, 12, 14), (8, 6, 6)):
            inputs = case.inputs(rng)
            branches, channels = inputs["x"].shape[0], inputs["x"].shape[-1]
            inputs["x"] = torch.randn(branches, batch, height, width, channels, generator=rng)
            if inputs.get("residual") is not None:
                channels = inputs["residual"].shape[-1]
                inputs["residual"] = torch.randn(branches, batch, height, width, channels, generator=rng)
            _same(evaluate(compiled, inputs), evaluate(case, inputs))
    assert len(graphs) == 1


def test_settings_are_looked_at_while_compiling() -> None:
    """A function that the compiler cannot trace is called once, and its result is a constant of the graph."""
    asked = []

    @dispatch._constant_when_compiled
    def answer() -> int:
        asked.append(str(object()))
        return 2

    compiled = torch.compile(lambda x: x * answer(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert compiled(torch.ones(3)).tolist() == [2, 2, 2]
    assert len(asked) == 1


def test_wrong_shapes_are_found_while_compiling() -> None:
    x, weight = torch.zeros(2, 1, 4, 4, 3), torch.zeros(2, 5, 4, 1, 1)
    compiled = torch.compile(K.branch_conv2d, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="weight: expected 3 input channels as x has, got 4"):
        compiled(x, weight)


class _EveryOp(nn.Module):
    """A network of all differentiable ops, so that the slow part of the compiler runs once."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=rng) / 3)

        self.stem = parameter(1, 6, 3, 3, 3)
        self.depthwise, self.bias = parameter(2, 6, 3, 3), parameter(2, 6)
        self.filter, self.mix = parameter(2, 6, 3, 3), parameter(2, 6, 6, 1, 1)
        self.gain, self.shift = parameter(2, 6), parameter(2, 6)
        self.branch = parameter(4, 5, 6, 1, 1)
        self.head, self.head_bias = parameter(4, 7, 5), parameter(4, 7)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = K.branch_conv2d(x, self.stem, padding=1)
        x = K.branch_depthwise_conv2d(x, self.depthwise, self.bias, padding=1, replicate=2)
        y, mean, var = K.branch_norm_conv2d(x, self.filter, padding=1)
        norm = torch.stack([mean, self.gain * var.rsqrt(), self.shift])
        y, mean, var = K.branch_norm_conv2d(y, self.mix, norm, activation="relu")
        norm = torch.stack([mean, self.gain * var.rsqrt(), self.shift])
        y = K.branch_normalize(y, norm, residual=x, activation="relu")
        y = K.branch_conv2d(y, self.branch, stride=2, replicate=2)
        member, prefix = K.prefix_logits(y.mean((2, 3)), self.head, self.head_bias)
        loss = K.hierarchical_distillation_loss(member, target)
        return loss + prefix.square().mean() + K.prefix_mean(member, [3]).mean()


@pytest.mark.skipif(not _COMPILERS, reason="the compiler's default backend needs a C++ compiler")
def test_inductor_trains_the_same(rng: torch.Generator) -> None:
    model = _EveryOp(rng)
    x = torch.randn(1, 4, 6, 6, 3, generator=rng)
    target = torch.randint(7, (4,), generator=rng)
    compiled = torch.compile(model, fullgraph=True)
    want = model(x, target)
    wanted = torch.autograd.grad(want, list(model.parameters()))
    got = compiled(x, target)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(got, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_export_keeps_our_ops(rng: torch.Generator, tmp_path: Path) -> None:
    """An exported program has one node per op, takes any batch size, and can be saved and loaded."""
    model = _EveryOp(rng)
    x = torch.randn(1, 4, 6, 6, 3, generator=rng)
    target = torch.randint(7, (4,), generator=rng)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x, target), dynamic_shapes={"x": {1: batch}, "target": {0: batch}})
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"hne.{op}.default" for op in (
        "branch_conv2d", "branch_depthwise_conv2d", "branch_norm_conv2d", "branch_normalize", "prefix_logits",
        "prefix_mean", "hierarchical_distillation_loss",
    )} <= called  # fmt: skip
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    x = torch.randn(1, 9, 6, 6, 3, generator=rng)
    target = torch.randint(7, (9,), generator=rng)
    torch.testing.assert_close(loaded(x, target), model(x, target))


# --- the model ---------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> FusedHNE:
    torch.manual_seed(0)
    model = FusedHNE.from_preset("hne_tiny", num_classes=5, width=0.5)
    with torch.no_grad():  # so that running statistics differ from those of a new model
        for _ in range(2):
            model.train()(torch.randn(8, 3, 12, 12))
    return model.eval()


def test_model_inference_is_one_graph(model: FusedHNE, rng: torch.Generator) -> None:
    x = torch.randn(3, 3, 12, 12, generator=rng)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x, num_models=3), model(x, num_models=3))
        weight = next(model.parameters())
        weight.mul_(1.5)  # a compiled model notices, too
        torch.testing.assert_close(compiled(x), model(x))


def test_model_training_is_one_graph(model: FusedHNE, rng: torch.Generator) -> None:
    x = torch.randn(4, 3, 12, 12, generator=rng)
    target = torch.randint(5, (4,), generator=rng)
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def step(network: Any) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        model.load_state_dict(state)
        loss = K.hierarchical_distillation_loss(network(x), target)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return loss, gradients, {n: b.clone() for n, b in model.named_buffers()}

    loss, gradients, buffers = step(compiled)
    want, wanted, statistics = step(model)
    torch.testing.assert_close(loss, want)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert buffers.keys() == statistics.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, statistics[name], msg=lambda m, n=name: f"{n}: {m}")


def test_model_export(model: FusedHNE, rng: torch.Generator) -> None:
    x = torch.randn(3, 3, 12, 12, generator=rng)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
        exported = program.module()
        for size in (3, 1, 7):
            x = torch.randn(size, 3, 12, 12, generator=rng)
            torch.testing.assert_close(exported(x), model(x))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "hne.fused_bottleneck.default" in called

"""Inference by CUDA graphs: same logits, one capture for each kind of call, changes of parameters are noticed.

The graphs are emulated on the CPU (cuda_graphs.py). test_gpu.py captures real ones.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import networks
import pytest
import torch
from changes import CHANGES
from cuda_graphs import Graph, emulate
from networks import build, each_model, images
from torch import Tensor

import hne
import hne_kernels as K
from hne import FusedHNE, GraphedHNE
from hne.executors import ParameterVersions, folding
from hne.inference import kernel_settings
from hne.layers import BottleneckLayer

PACKAGES = tuple(str(Path(package.__file__ or "").parent) for package in (hne, K))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    return emulate(monkeypatch)


@pytest.fixture
def model(rng: torch.Generator) -> FusedHNE:
    return build(FusedHNE, networks.TREES["odd"], rng)


def close(got: Tensor, want: Tensor) -> None:
    """Compare up to rounding, which depends on the memory layout of the images."""
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@each_model
@torch.no_grad()
def test_same_logits_as_the_model(kind: type, graphs: type[Graph], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng)
    graphed = GraphedHNE(model)
    for _ in range(2):
        x = images(rng)
        for n in (1, 4, 6, None):
            close(graphed(x, n), model(x, n))
        for sizes in ((1, 3), None):
            close(graphed.prefix_logits(x, sizes), model.prefix_logits(x, sizes))


def test_one_capture_for_each_kind_of_call(model: FusedHNE, graphs: type[Graph], rng: torch.Generator) -> None:
    graphed = GraphedHNE(model)
    x = images(rng)
    calls: list[tuple[int, Callable[[], object]]] = [
        (1, lambda: graphed(x)),
        (0, lambda: graphed(x, 6)),
        (0, lambda: graphed(x.contiguous(memory_format=torch.channels_last))),
        (1, lambda: graphed(x, 2)),
        (1, lambda: graphed(x[:2], 2)),
        (1, lambda: graphed.prefix_logits(x)),
        (0, lambda: graphed.prefix_logits(x, model.prefix_sizes)),
        (1, lambda: graphed.prefix_logits(x, [2])),
        (0, lambda: graphed(x)),
    ]
    for number, (captures, call) in enumerate(calls):
        before = graphs.captures
        call()
        assert graphs.captures - before == captures, f"call {number}"
    with K.use_backend("reference"):
        graphed(x)
    assert graphs.captures == 6


def test_settings_that_choose_kernels() -> None:
    x = torch.ones(1)
    settings = [kernel_settings(x)]
    with torch.autocast("cpu", torch.bfloat16):
        settings.append(kernel_settings(x))
    with K.use_backend("reference"):
        settings.append(kernel_settings(x))
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision
    try:
        torch.use_deterministic_algorithms(not deterministic)
        settings.append(kernel_settings(x))
        torch.backends.cuda.matmul.fp32_precision = "ieee" if precision == "tf32" else "tf32"
        settings.append(kernel_settings(x))
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cuda.matmul.fp32_precision = precision
    assert len(set(settings)) == 5


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_are_noticed(
    change: Callable[[FusedHNE], object], model: FusedHNE, graphs: type[Graph], rng: torch.Generator
) -> None:
    graphed = GraphedHNE(model)
    x = images(rng)
    before = graphed(x, 2), graphed(x)
    change(model)
    for n, old in ((2, before[0]), (6, before[1])):
        y = graphed(x, n)
        assert y.shape != old.shape or not torch.equal(y, old)
        close(y, model(x, n))


@each_model
def test_frozen_parameters(
    kind: type, graphs: type[Graph], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the block nothing is read; a change takes effect at its end. A :class:`NaiveHNE` has no folded weights
    and looks for changes in every call."""
    model = build(kind, networks.TREES["odd"], rng)
    graphed, x = GraphedHNE(model), images(rng)
    before = graphed(x)
    checks = count_checks(monkeypatch)
    with model.frozen_parameters():
        entered = len(checks)
        graphed(x), graphed(x)
        assert len(checks) - entered == (0 if kind is FusedHNE else 2)
        with torch.no_grad():
            model.head.conv.bias.add_(1)
        assert torch.equal(graphed(x), before) == (kind is FusedHNE)
    with torch.no_grad():
        close(graphed(x), model(x))
    assert not torch.allclose(graphed(x), before)
    with torch.no_grad():
        model.head.conv.bias.add_(1)
    with model.frozen_parameters(), torch.no_grad():  # a change before the block takes effect in it
        close(graphed(x), model(x))


@torch.no_grad()
def test_frozen_parameters_of_layers_without_a_kernel_path(
    model: FusedHNE, graphs: type[Graph], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such layers read their parameters in every call, and so changes are looked for in every call."""
    monkeypatch.delitem(folding._KERNEL_PATHS, BottleneckLayer)
    graphed, x = GraphedHNE(model), images(rng)
    graphed(x)
    with model.frozen_parameters():
        for folded in (model.head.conv.bias, model.blocks[0][0].unit.bn.weight):
            before = graphed(x)
            folded.add_(0.5)
            close(graphed(x), model(x))
            assert not torch.allclose(graphed(x), before)
        called = model.blocks[1][1].expand.conv.weight
        called.data = called + 0.5  # other memory, which the graph does not read
        close(graphed(x), model(x))


def test_parameters_are_read_once_per_call(
    model: FusedHNE, graphs: type[Graph], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphed, x = GraphedHNE(model), images(rng)
    graphed(x, 2), graphed(x)
    checks = count_checks(monkeypatch)
    for n in (2, None):
        graphed(x, n)
    assert len(checks) == 2


def test_hooks_are_noticed_while_parameters_are_frozen(
    model: FusedHNE, graphs: type[Graph], rng: torch.Generator
) -> None:
    graphed, x = GraphedHNE(model), images(rng)
    graphed(x)
    with model.frozen_parameters():
        graphed(x)
        model.blocks[0][0].register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="would not run hooks"):
            graphed(x)


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that gets an entry whenever parameters are compared with their record."""
    checks: list[None] = []
    is_current = ParameterVersions.is_current

    def counted(versions: ParameterVersions) -> bool:
        checks.append(None)
        return is_current(versions)

    monkeypatch.setattr(ParameterVersions, "is_current", counted)
    return checks


def test_a_replay_takes_few_steps_in_python(model: FusedHNE, graphs: type[Graph], rng: torch.Generator) -> None:
    """At batch 1 the launch of the graph has to wait for them. PyTorch's own do not count."""
    graphed, x = GraphedHNE(model), images(rng, 1)
    graphed(x)
    frames: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGES):
            frames.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        graphed(x)
    finally:
        sys.setprofile(None)
    # The ops of the emulated replay call no Python of ours below the op.
    assert len(frames) <= 18, frames


def test_results_are_in_new_memory(model: FusedHNE, graphs: type[Graph], rng: torch.Generator) -> None:
    graphed = GraphedHNE(model)
    x = images(rng)
    first = graphed(x)
    copy = first.clone()
    graphed(x + 1)
    assert torch.equal(first, copy)
    with torch.inference_mode():
        graphed(x)
    assert torch.equal(graphed(x), copy)
    assert not graphed(x.requires_grad_()).requires_grad


def test_weights_live_as_long_as_their_graph(model: FusedHNE, graphs: type[Graph], rng: torch.Generator) -> None:
    graphed = GraphedHNE(model)
    for scale in (1.0, 1.5):
        with torch.no_grad():
            model.blocks[0][0].unit.conv.weight.mul_(scale)
        graphed(images(rng))
        assert not model.graph_weights


@torch.no_grad()
def test_a_graph_captured_by_the_user(model: FusedHNE, graphs: type[Graph], rng: torch.Generator) -> None:
    """``torch.cuda.graph`` around the model gives right logits, with or without a call of the model before."""
    static, x = images(rng), images(rng)
    expected = model(x)
    model.eval()  # drops the folded weights
    for called_before in (False, True):
        if called_before:
            model(static)
        graph = torch.cuda.CUDAGraph()
        static.normal_()
        with torch.cuda.graph(graph):
            y = model(static)
        assert bool(model.graph_weights) == called_before
        model.eval()
        assert torch.equal(model(x), expected)
        static.copy_(x)
        graph.replay()
        assert torch.equal(y, expected)


def test_threads_take_turns(model: FusedHNE, graphs: type[Graph], rng: torch.Generator) -> None:
    graphed = GraphedHNE(model)
    work = [images(rng) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x, 3) for x in work]
    right = [False] * len(work)

    def run(index: int) -> None:
        right[index] = all(torch.equal(graphed(work[index], 3), expected[index]) for _ in range(5))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * len(work)
    assert graphs.captures == 1


def test_bad_arguments_are_explained(model: FusedHNE, graphs: type[Graph], rng: torch.Generator) -> None:
    x = images(rng)
    graphed = GraphedHNE(model)
    for bad, error, text in (
        (x[0], ValueError, "x must have 4 dimensions"),
        (x[:, :2], ValueError, "x must have 3 channels"),
        (x.float(), TypeError, "x must have the dtype of the model"),
        (x.to("meta"), ValueError, "x must be on the device of the model"),
    ):
        with pytest.raises(error, match=text):
            graphed(bad)
    with pytest.raises(ValueError, match="num_models must lie between 1 and 6, got 7"):
        graphed(x, 7)
    with pytest.raises(ValueError, match="sizes must rise"):
        graphed.prefix_logits(x, (2, 1))
    model.train()
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        graphed(x)
    with pytest.raises(TypeError, match="model must be an HNE, got Linear"):
        GraphedHNE(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with torch.inference_mode():
        unversioned = build(FusedHNE, networks.TREES["odd"], rng)
    with pytest.raises(RuntimeError, match=r"made under torch\.inference_mode\(\)"):
        GraphedHNE(unversioned)


def test_a_model_on_the_cpu_is_refused(model: FusedHNE) -> None:
    with pytest.raises(ValueError, match="model must be on a GPU to be captured in CUDA graphs, got cpu"):
        GraphedHNE(model)

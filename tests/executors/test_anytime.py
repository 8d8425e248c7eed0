"""Anytime inference: the answers are right, and no node of the tree is computed twice."""

from __future__ import annotations

from typing import Any

import networks
import pytest
import torch
from networks import build, each_model, each_tree, images
from placements import Placement
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hne_kernels as K
from hne import HNE, FusedHNE, Hierarchy, NaiveHNE

SIZE = (9, 12)


@each_tree
@pytest.mark.parametrize("grad", [True, False])
def test_answers_are_ensemble_means(tree: Hierarchy, grad: bool, double: Placement, rng: torch.Generator) -> None:
    model = build(FusedHNE, tree, rng)
    x = images(rng)
    with torch.set_grad_enabled(grad):
        leaves = model(x)
        answers = list(model.anytime(x))
        assert [n for n, _ in answers] == list(range(1, tree.num_models + 1))
        for n, y in answers:
            torch.testing.assert_close(y, leaves[:n].mean(0))


@each_tree
def test_steps_in_plain_pytorch_compute_only_new_nodes(tree: Hierarchy, rng: torch.Generator) -> None:
    model = build(NaiveHNE, tree, rng)
    answers = model.anytime(images(rng, 1, SIZE))
    done = 0
    for n in range(1, tree.num_models + 1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert next(answers)[0] == n
        done += counter.get_total_flops() // 2
        assert done == model.macs(n, SIZE)


OPS = ("branch_conv2d", "branch_depthwise_conv2d", "fused_conv2d", "fused_bottleneck")


class Calls:
    """Counts the multiply-adds of the kernels, and lists the addresses of the weights of each computed branch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.macs = 0
        self.weights: list[int] = []
        implementation = K.dispatch.implementation

        def counted(op: str, tensor: Tensor, *late_check: Any) -> Any:
            function = implementation(op, tensor, *late_check)
            return self._counted(op, function) if op in OPS else function

        monkeypatch.setattr(K.dispatch, "implementation", counted)
        monkeypatch.setattr(K.FusedLayers, "_reaches_library", lambda *_: False)  # it calls the layers in turn

    def _counted(self, name: str, op: Any) -> Any:
        def call(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
            y = op(x, weight, *args, **options)
            _, batch, rows, columns, out = y.shape
            branch = weight.stride(0) * weight.element_size()
            self.weights += [weight.data_ptr() + g * branch for g in range(len(weight))]
            if name == "fused_bottleneck":
                bias, depthwise, _, _, _, shortcut, *_ = args
                middle, kernel = bias.shape[1], depthwise.shape[1]
                expand = x[0, ..., 0].numel() * x.shape[4] * middle
                inputs = middle + (x.shape[4] if shortcut is not None else 0)
                each = expand + batch * rows * columns * (middle * kernel**2 + out * inputs)
                self.macs += len(weight) * each
            else:
                taps = weight[0, 0, ..., 0].numel() if name == "fused_conv2d" else weight[0, 0].numel()
                self.macs += y.numel() * taps
            return y

        return call


@each_tree
@pytest.mark.parametrize("grad", [True, False])
def test_no_kernel_computes_a_node_twice(
    tree: Hierarchy, grad: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(FusedHNE, tree, rng)
    x = images(rng, 1, SIZE)
    calls = Calls(monkeypatch)
    with torch.set_grad_enabled(grad):
        for n, _ in model.anytime(x):
            assert calls.macs == model.macs(n, SIZE)
        step_by_step = sorted(calls.weights)
        assert len(set(step_by_step)) == len(step_by_step)
        calls.weights.clear()
        model(x)
    assert sorted(calls.weights) == step_by_step


@each_model
def test_iterators_do_not_disturb_each_other(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng)
    x = images(rng)
    first, second = model.anytime(x), model.anytime(x)
    next(first)
    list(second)
    torch.testing.assert_close(next(first)[1], model(x, 2).mean(0))


@each_tree
@pytest.mark.parametrize("grad", [True, False])
@each_model
def test_select_continues_with_some_samples(kind: type[HNE], grad: bool, tree: Hierarchy, rng: torch.Generator) -> None:
    model = build(kind, tree, rng)
    x = images(rng, 5)
    samples = torch.arange(5)
    with torch.set_grad_enabled(grad):
        leaves = model(x)
        steps = model.anytime(x)
        for n, y in steps:
            torch.testing.assert_close(y, leaves[:n, samples].mean(0))
            torch.testing.assert_close(steps.member, leaves[n - 1, samples])
            choice = torch.tensor([[1, 3, 4], [0, 2], [1]][n - 1] if n < 4 else [0])
            steps.select(choice)
            samples = samples[choice]


def test_select_before_the_first_answer_is_refused(rng: torch.Generator) -> None:
    steps = build(FusedHNE, networks.TREES["odd"], rng).anytime(images(rng))
    with pytest.raises(RuntimeError, match="ask for the first one before"):
        steps.select(torch.tensor([0]))


@pytest.mark.parametrize(
    "choice",
    [
        torch.tensor([True, False, True, False, False]),
        torch.tensor([False] * 5),
        torch.tensor([4, 0, 4]),
        torch.tensor([2], dtype=torch.int16),
        torch.zeros(0, dtype=torch.long),
    ],
    ids=["mask", "empty mask", "twice", "int16", "empty"],
)
@pytest.mark.parametrize("grad", [False, True])
@each_model
def test_select_by_mask_or_indices(kind: type[HNE], grad: bool, choice: Tensor, rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng)
    x = images(rng, 5)
    samples = torch.arange(5)[choice if choice.dtype == torch.bool else choice.long()]
    with torch.set_grad_enabled(grad):
        leaves = model(x)
        steps = model.anytime(x)
        next(steps)
        steps.select(choice)
        rest = list(steps)
    assert [n for n, _ in rest] == list(range(2, model.num_models + 1))
    for n, y in rest:
        torch.testing.assert_close(y, leaves[:n, samples].mean(0))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (torch.tensor([True, False]), r"samples: expected a mask of shape \(5,\), got \(2,\)"),
        (torch.ones(5, 1, dtype=torch.bool), r"samples: expected a mask of shape \(5,\), got \(5, 1\)"),
        (torch.tensor([0, 5]), "samples: expected indices from 0 to 4, got 5"),
        (torch.tensor([-1, 2]), "samples: expected indices from 0 to 4, got -1"),
        (torch.tensor([[0, 1]]), r"samples: expected indices of shape \(K,\), got \(1, 2\)"),
        (torch.tensor(2), r"samples: expected indices of shape \(K,\), got \(\)"),
        (torch.tensor([0.0]), "samples: expected int64 indices or a mask of bool, got torch.float32"),
        (torch.tensor([1, 0], dtype=torch.uint8), "samples: expected int64 indices or a mask of bool, got torch.uint8"),
        ([0, 1], "samples: expected a tensor of indices or a mask, got list"),
    ],
)
@each_model
def test_a_refused_choice_changes_nothing(kind: type[HNE], choice: Any, message: str, rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng)
    x = images(rng, 5)
    with torch.no_grad():
        leaves = model(x)
        steps = model.anytime(x)
        next(steps)
        with pytest.raises((TypeError, ValueError), match=message):
            steps.select(choice)
        for n, y in steps:
            torch.testing.assert_close(y, leaves[:n].mean(0))


@each_model
def test_training_mode_is_refused(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng).train()
    with pytest.raises(RuntimeError, match=r"anytime\(\) is for inference: call model.eval\(\) first"):
        model.anytime(images(rng))

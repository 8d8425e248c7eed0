"""Training steps by CUDA graphs: the result of ordinary steps bit for bit, and changes are noticed.

The graphs are emulated on the CPU (cuda_graphs.py): a capture records the ops of forward, backward and optimiser and
undoes them, a replay calls them again on the same memory. That shows which memory and numbers a graph holds on to. It
cannot show the order of work on streams, the memory that graphs share, the state of the GPU's random generator, or ops
that a GPU cannot capture; test_gpu.py captures real graphs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from cuda_graphs import Graph, emulate
from training_task import OPTIMISER, Task, assert_equal, batch, warm_up

import hne.executors.parameter_versions
import hne_kernels as K
from hne import GraphedHNE
from hne.training.captured_step import _ORDINARY_STEPS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    return emulate(monkeypatch)


@pytest.fixture
def task(rng: torch.Generator, graphs: type[Graph]) -> Task:
    return Task(rng)


def test_batches_of_other_shapes(task: Task, graphs: type[Graph], rng: torch.Generator) -> None:
    """An incomplete last batch takes ordinary steps, then has a graph of its own; so has another memory layout."""
    other, step = task.copy(), task.captured()
    captures = []
    for epoch in range(6):
        for size in (4, 4, 4, 3):
            x, target = batch(rng, size)
            if epoch == 5:
                x = x.contiguous(memory_format=torch.channels_last)
            assert torch.equal(step(x, target), other.step(x, target))
        captures.append(graphs.captures)
        assert_equal(task, other)
    assert captures == [0, 1, 1, 2, 2, 2]


def test_schedules_of_pytorch(task: Task, graphs: type[Graph], rng: torch.Generator) -> None:
    other, step = task.copy(), task.captured()
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(t.optimizer, 8) for t in (task, other)]
    rates = []
    for _ in range(8):
        work = batch(rng)
        assert torch.equal(step(*work), other.step(*work))
        for schedule in schedules:
            schedule.step()
        rates.append(task.optimizer.param_groups[0]["lr"].item())
    assert_equal(task, other)
    assert graphs.captures == 1
    assert len(set(rates)) == 8


def test_dropout_draws_new_numbers(graphs: type[Graph], rng: torch.Generator) -> None:
    """In the emulation they come from the CPU's generator, whose state a capture leaves as it was."""
    task = Task(rng, dropout=0.5)
    other, step, work = task.copy(), task.captured(), batch(rng)
    losses = []
    for take in (step, other.step):
        torch.manual_seed(3)
        losses.append([take(*work).item() for _ in range(8)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 8
    assert_equal(task, other)


def test_losses_are_in_new_memory_and_gradients_dropped(task: Task, rng: torch.Generator) -> None:
    step = task.captured()
    losses = [step(*batch(rng)) for _ in range(_ORDINARY_STEPS + 3)]
    assert len({loss.data_ptr() for loss in losses}) == len(losses)
    assert len({loss.item() for loss in losses}) == len(losses)
    assert not any(loss.requires_grad for loss in losses)
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_settings_that_choose_kernels(task: Task, graphs: type[Graph], rng: torch.Generator) -> None:
    other, step, work = task.copy(), task.captured(), batch(rng)
    warm_up(step, work)
    with K.use_backend("reference"):
        step(*work)
    assert graphs.captures == 1, "an ordinary step"
    replays = graphs.replays
    step(*work)
    assert (graphs.captures, graphs.replays) == (1, replays + 1)
    for _ in range(_ORDINARY_STEPS + 2):
        other.step(*work)
    with K.use_backend("reference"):
        other.step(*work)
    other.step(*work)
    assert_equal(task, other)


# Changes between steps ----------------------------------------------------------------------------------------------


def freeze(task: Task) -> None:
    task.model.blocks[0][0].unit.conv.weight.requires_grad_(False)


def replace_parameter_data(task: Task) -> None:
    weight = task.model.blocks[1][0].expand.conv.weight
    weight.data = weight.data * 1.5


def replace_module(task: Task) -> None:
    """The optimiser keeps the old parameters, which get no more gradients."""
    task.model.blocks[0][1].unit.bn = copy.deepcopy(task.model.blocks[0][1].unit.bn)


def evaluate(task: Task) -> None:
    task.model.eval()


def set_eps(task: Task) -> None:
    task.model.blocks[0][1].unit.bn.eps = 0.5


def set_momentum(task: Task) -> None:
    task.optimizer.param_groups[0]["momentum"] = 0.5


def load_optimizer(task: Task) -> None:
    """Replaces the state's tensors, and keeps the learning rate a tensor."""
    task.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict()))


RECAPTURED = [freeze, replace_parameter_data, replace_module, evaluate, set_eps, set_momentum, load_optimizer]


@pytest.mark.parametrize("change", RECAPTURED, ids=lambda change: change.__name__)
def test_changes_are_noticed(
    change: Callable[[Task], None], task: Task, graphs: type[Graph], rng: torch.Generator
) -> None:
    other, step = task.copy(), task.captured()
    for changed in (False, True):
        if changed:
            change(task)
            change(other)
        for _ in range(_ORDINARY_STEPS + 2):
            work = batch(rng)
            assert torch.equal(step(*work), other.step(*work))
        assert_equal(task, other)
    assert graphs.captures == 2


@torch.no_grad()
def add_to_values(task: Task) -> None:
    for tensor in itertools.chain(task.model.parameters(), task.model.buffers()):
        tensor.add_(1)


def load_values(task: Task) -> None:
    task.model.load_state_dict({name: 0.9 * value for name, value in task.model.state_dict().items()})


def visit_eval(task: Task) -> None:
    task.model.eval()
    with torch.no_grad():
        task.model(torch.randn(2, 3, 8, 8))
    task.model.train()


@pytest.mark.parametrize("change", [add_to_values, load_values, visit_eval], ids=lambda change: change.__name__)
def test_values_are_read_anew(
    change: Callable[[Task], None], task: Task, graphs: type[Graph], rng: torch.Generator
) -> None:
    other, step, work = task.copy(), task.captured(), batch(rng)
    for _ in range(_ORDINARY_STEPS + 2):
        assert torch.equal(step(*work), other.step(*work))
    change(task)
    change(other)
    assert torch.equal(step(*work), other.step(*work))
    assert_equal(task, other)
    assert graphs.captures == 1


def test_folded_weights_are_dropped(
    task: Task, graphs: type[Graph], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay changes parameters without a new version. On a GPU no memory is compared, and so it is here."""
    monkeypatch.setattr(hne.executors.parameter_versions, "_readable_bytes", lambda tensor: 0)
    task.model.eval()  # a fine-tuning with the running statistics: no call of train() drops the folded weights
    step, work = task.captured(), batch(rng)
    warm_up(step, work)
    graphed, x = GraphedHNE(task.model), work[0]
    with torch.no_grad():
        before = task.model(x), graphed(x)
    replays = graphs.replays
    step(*work)
    assert graphs.replays == replays + 1
    with torch.no_grad():
        want = task.copy().model.eval()(x)
        for old, new in zip(before, (task.model(x), graphed(x)), strict=True):
            assert not torch.allclose(old, new, rtol=1e-3)
            torch.testing.assert_close(new, want)


def test_evaluation_between_steps_has_the_new_weights(task: Task, rng: torch.Generator) -> None:
    step, work = task.captured(), batch(rng)
    for _ in range(_ORDINARY_STEPS + 3):
        step(*work)
        with torch.no_grad():
            logits = task.model.eval()(work[0])
            torch.testing.assert_close(logits, task.copy().model(work[0]))
        task.model.train()


def test_pruned_weights_train(task: Task, graphs: type[Graph], rng: torch.Generator) -> None:
    torch.nn.utils.prune.random_unstructured(task.model.blocks[1][0].expand.conv, "weight", 0.5)
    with torch.no_grad():
        task.model(batch(rng)[0])
    task.optimizer = torch.optim.SGD(task.model.parameters(), **{**OPTIMISER, "lr": torch.tensor(0.05)})
    other = Task.__new__(Task)
    other.model = copy.deepcopy(task.model)
    other.optimizer = torch.optim.SGD(other.model.parameters(), **{**OPTIMISER, "lr": torch.tensor(0.05)})
    step = task.captured()
    for _ in range(_ORDINARY_STEPS + 3):
        work = batch(rng)
        assert torch.equal(step(*work), other.step(*work))
    assert graphs.captures == 1
    assert_equal(task, other)

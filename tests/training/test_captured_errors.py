"""Training steps that cannot be captured in a CUDA graph: each has an error that says why.

The graphs are emulated on the CPU (cuda_graphs.py). Of the ops that a GPU cannot capture, the emulation knows those
that wait for a result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_graphs import Graph, emulate
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from training_task import Task, batch, warm_up

from hne.training import CapturedStep
from hne.training.captured_step import _ORDINARY_STEPS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    return emulate(monkeypatch)


@pytest.fixture
def task(rng: torch.Generator, graphs: type[Graph]) -> Task:
    return Task(rng)


def test_a_model_on_the_cpu_is_refused(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="all parameters must be on one GPU for a captured step, got cpu"):
        Task(rng).captured()


def test_bad_arguments_are_explained(task: Task, rng: torch.Generator) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        CapturedStep(lambda x: x, task.loss, task.optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got float"):
        CapturedStep(task.model, task.loss, 0.1)  # type: ignore[arg-type]
    step, (x, target) = task.captured(), batch(rng)
    with pytest.raises(ValueError, match="expected tensors on cpu that require no gradient, got meta"):
        step(x.to("meta"), target)
    with pytest.raises(ValueError, match="expected tensors on cpu that require no gradient, got cpu"):
        step(x.requires_grad_(), target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)), r"make it by SGD\(\.\.\., fused=True\)"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), r"make it by AdamW\(\.\.\., capturable=True\)"),
        (lambda p: torch.optim.SGD(p, lr=0.1, fused=True), r"lr of optimizer must be a tensor on cpu, .* got 0\.1"),
    ],
)
def test_optimisers_that_cannot_be_captured(make: Any, message: str, task: Task) -> None:
    with pytest.raises(ValueError, match=message):
        CapturedStep(task.model, task.loss, make(task.model.parameters()))


def test_a_number_as_learning_rate_is_noticed(task: Task, rng: torch.Generator) -> None:
    step, work = task.captured(), batch(rng)
    warm_up(step, work)
    task.optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(
        ValueError, match=r"lr of optimizer must be a tensor on cpu, which a graph reads anew, got 0\.01"
    ):
        step(*work)


@pytest.mark.parametrize("captured", [False, True])
def test_gradients_are_not_accumulated(captured: bool, task: Task, rng: torch.Generator) -> None:
    step, work = task.captured(), batch(rng)
    if captured:
        warm_up(step, work)
    task.loss(*work).backward()
    with pytest.raises(RuntimeError, match=r"does not accumulate gradients, .* call zero_grad\(\) first"):
        step(*work)
    task.optimizer.zero_grad()
    step(*work)


def test_autocast_belongs_in_the_loss(task: Task, rng: torch.Generator) -> None:
    step = task.captured()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"enter torch\.autocast in compute_loss"),
    ):
        step(*batch(rng))


HOOKS: dict[str, Callable[[Task], Any]] = {
    "layer": lambda task: task.model.blocks[0][0].register_forward_hook(lambda *_: None),
    "gradient": lambda task: task.model.head.conv.weight.register_hook(lambda grad: grad),
    "accumulated": lambda task: task.model.head.conv.weight.register_post_accumulate_grad_hook(lambda p: None),
    "optimiser": lambda task: task.optimizer.register_step_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_are_refused(register: Callable[[Task], Any], task: Task) -> None:
    handle = register(task)
    with pytest.raises(RuntimeError, match="would not run hooks: remove those of the model"):
        task.captured()
    handle.remove()
    task.captured()


def test_a_later_hook_is_noticed(task: Task, rng: torch.Generator) -> None:
    step, work = task.captured(), batch(rng)
    warm_up(step, work)
    HOOKS["layer"](task)
    with pytest.raises(RuntimeError, match="would not run hooks"):
        step(*work)


def test_steps_that_wait_for_the_gpu(task: Task, graphs: type[Graph], rng: torch.Generator) -> None:
    """A step that reads a result fails in the capture and changes nothing; ordinary steps go on."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        value = task.loss(x, target)
        return value * (1 if value.item() > 0 else 2)

    step, work = CapturedStep(task.model, loss, task.optimizer), batch(rng)
    for _ in range(_ORDINARY_STEPS):
        step(*work)
    before = {name: tensor.clone() for name, tensor in task.state().items()}
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"cannot be captured in a CUDA graph; nothing in it may wait for the GPU"
        ):
            step(*work)
    assert [name for name, tensor in task.state().items() if not torch.equal(tensor, before[name])] == []
    task.step(*work)


def test_averages_over_all_batches_cannot_be_captured(task: Task, rng: torch.Generator) -> None:
    """With ``momentum=None`` a batch norm reads its counter of batches."""
    task.model.blocks[0][0].unit.bn.momentum = None
    step, work = task.captured(), batch(rng)
    for _ in range(_ORDINARY_STEPS):
        step(*work)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        step(*work)


def test_several_processes_are_refused(
    task: Task, graphs: type[Graph], rng: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "get_world_size", lambda group=None: 2)
            with pytest.raises(RuntimeError, match="a captured step is one of a single process, got 2 processes"):
                task.captured()
        parallel = nn.parallel.DistributedDataParallel(task.model)
        with pytest.raises(RuntimeError, match="single process: give the model without its wrapper"):
            CapturedStep(parallel, task.loss, task.optimizer)
        sharded = Task(rng)
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(sharded.model, mesh=mesh)
        sharded.optimizer = torch.optim.SGD(sharded.model.parameters(), lr=torch.tensor(0.1), fused=True)
        with pytest.raises(RuntimeError, match="fully_shard is not supported"):
            sharded.captured()
    finally:
        distributed.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"single GPU: give the model without nn\.DataParallel"):
        CapturedStep(nn.DataParallel(task.model), task.loss, task.optimizer)

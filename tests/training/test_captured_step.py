"""Training steps by CUDA graphs: the result of ordinary steps bit for bit, changes are noticed, errors are explained.

The graphs are emulated on the CPU (cuda_graphs.py): a capture records the ops of forward, backward and optimiser and
undoes them, a replay calls them again on the same memory. That shows which memory and numbers a graph holds on to. It
cannot show the order of work on streams, the memory that graphs share, the state of the GPU's random generator, or ops
that a GPU cannot capture; test_gpu.py captures real graphs.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from cuda_graphs import Graph, emulate
from networks import NUM_CLASSES, build, images
from students import DIGITS, HERE, heads, random_outputs
from torch import Tensor, distributed, nn

import hne.executors.parameter_versions
import hne.training.captured_step
import hne_kernels as K
from hne import FusedHNE, GraphedHNE
from hne.data import load_dataset
from hne.distributed import World
from hne.errors import CheckpointError, TrainingError
from hne.losses import OBJECTIVES, objective
from hne.models import checkpoint
from hne.training import (
    CapturedStep,
    DistillationTrainer,
    TrainConfig,
    Trainer,
    online_teacher,
    tabulated_teacher,
    training_step,
)
from hne.training.captured_step import _ORDINARY_STEPS

SMALL: dict[str, Any] = {"limit_train": 64, "limit_test": 40, "batch_size": 16, "width": 0.5, "num_models": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    return emulate(monkeypatch)


def start(**options: Any) -> Trainer:
    config = TrainConfig.of(**{**SMALL, "epochs": 2, **options})
    data = load_dataset(config.data, limit_train=config.limit_train, limit_test=config.limit_test)
    return Trainer(config, data, HERE)


def uncaptured(trainer: Trainer) -> Trainer:
    """Let a trainer of captured steps take ordinary ones, with the same optimiser."""
    trainer.config = replace(trainer.config, cuda_graph=False)
    trainer._step = trainer._make_step()
    trainer.config = replace(trainer.config, cuda_graph=True)
    assert not isinstance(trainer._step, CapturedStep)
    return trainer


def state_of(trainer: Trainer, path: Path) -> tuple[dict[str, Tensor], Any]:
    """All tensors of a checkpoint, and the config with the figures of every epoch."""
    trainer.save(path)
    tensors, config = checkpoint.load(path)
    for row in config["history"]:
        del row["seconds"], row["images_per_second"]
    return tensors, config


def assert_same_run(one: Trainer, other: Trainer, folder: Path) -> None:
    (a, config), (b, other_config) = state_of(one, folder / "one"), state_of(other, folder / "other")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert config == other_config


class Task:
    """A network, its loss and an optimiser, with momentum and weight decay."""

    def __init__(self, rng: torch.Generator, *, dropout: float = 0.0, **options: Any) -> None:
        network = build(FusedHNE, networks.TREES["odd"], rng, torch.float32).train()
        self.model: Any = nn.Sequential(nn.Dropout(dropout), network) if dropout else network
        self.optimizer = torch.optim.SGD(self.model.parameters(), **{**OPTIMISER, "lr": torch.tensor(0.05), **options})

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        return objective("I+HD")(self.model(x), target)

    def captured(self, **options: Any) -> CapturedStep:
        return CapturedStep(self.model, self.loss, self.optimizer, **options)

    def step(self, *batch: Tensor) -> Tensor:
        return training_step(self.loss, self.optimizer, *batch)

    def copy(self) -> Task:
        return copy.deepcopy(self)

    def state(self) -> dict[str, Tensor]:
        buffers = {f"momentum {i}": s["momentum_buffer"] for i, s in enumerate(self.optimizer.state.values())}
        return {**self.model.state_dict(), **buffers}


OPTIMISER = {"momentum": 0.9, "weight_decay": 1e-3, "fused": True}


@pytest.fixture
def task(rng: torch.Generator, graphs: type[Graph]) -> Task:
    return Task(rng)


def batch(rng: torch.Generator, size: int = 4) -> tuple[Tensor, Tensor]:
    return images(rng, size, dtype=torch.float32), torch.randint(NUM_CLASSES, (size,), generator=rng)


def assert_equal(one: Task, other: Task) -> None:
    a, b = one.state(), other.state()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def warm_up(step: CapturedStep, work: tuple[Tensor, Tensor]) -> None:
    """Ordinary steps, the capture and a replay."""
    for _ in range(_ORDINARY_STEPS + 2):
        step(*work)


# The trainer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"objective": name} for name in OBJECTIVES),
        {"naive": True},
        {"amp": True},
        {"momentum": 0.0},
        {"clip_grad_norm": 0.5},
        {"channels_last": False},
        {"schedule": "halving", "lr": 0.1},
        {"data": "diabetes", "limit_train": 96, "num_models": None, "width": 1.0},
    ],
    ids=str,
)
def test_a_run_is_the_same_bit_for_bit(options: dict[str, Any], graphs: type[Graph], tmp_path: Path) -> None:
    captured, ordinary = start(cuda_graph=True, **options), uncaptured(start(cuda_graph=True, **options))
    list(captured.train())
    steps = 2 * captured.steps_per_epoch
    assert steps > _ORDINARY_STEPS + 1
    assert (graphs.captures, graphs.replays) == (1, steps - _ORDINARY_STEPS)
    list(ordinary.train())
    assert graphs.captures == 1
    assert_same_run(captured, ordinary, tmp_path)


@pytest.mark.parametrize("online", [False, True])
def test_distillation_is_the_same_bit_for_bit(online: bool, graphs: type[Graph], tmp_path: Path) -> None:
    teacher = tabulated_teacher(random_outputs())
    if online:
        torch.manual_seed(5)
        teacher = online_teacher(heads(3, epochs=1).build_model(DIGITS))
    runs = [DistillationTrainer(heads(cuda_graph=True), DIGITS, HERE, teacher) for _ in range(2)]
    uncaptured(runs[1])
    for run in runs:
        list(run.train())
    assert graphs.captures == 1
    assert_same_run(*runs, tmp_path)


def test_resumed_run_is_the_same_bit_for_bit(graphs: type[Graph], tmp_path: Path) -> None:
    whole, first, second = (start(cuda_graph=True, epochs=4) for _ in range(3))
    list(whole.train())
    interrupted = first.train()
    for _ in range(2):
        next(interrupted)
    first.save(tmp_path / "half")
    next(interrupted)  # work that is lost
    torch.manual_seed(99)
    second.restore(tmp_path / "half")
    list(second.train())
    assert_same_run(whole, second, tmp_path)


def test_a_trainer_restored_after_a_capture(graphs: type[Graph], tmp_path: Path) -> None:
    """The graph holds on to momentum buffers that ``restore`` replaces."""
    trainer = start(cuda_graph=True, epochs=3)
    run = trainer.train()
    next(run)
    trainer.save(tmp_path / "first")
    list(run)
    whole = state_of(trainer, tmp_path / "whole")
    trainer.restore(tmp_path / "first")
    list(trainer.train())
    again = state_of(trainer, tmp_path / "again")
    assert [name for name in whole[0] if not torch.equal(whole[0][name], again[0][name])] == []
    assert graphs.captures == 2


def test_the_config_is_kept(graphs: type[Graph], tmp_path: Path) -> None:
    trainer = start(cuda_graph=True, epochs=1)
    list(trainer.train())
    trainer.save(tmp_path / "run")
    stored = checkpoint.load(tmp_path / "run")[1]["recipe"]
    assert TrainConfig.from_dict(stored) == trainer.config
    with pytest.raises(CheckpointError, match="option cuda_graph was True, now it is False"):
        start(epochs=1).restore(tmp_path / "run")


def test_runs_of_earlier_versions_are_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = start(epochs=1)
    earlier = trainer.config.to_dict()
    del earlier["cuda_graph"]
    assert TrainConfig.from_dict(json.loads(json.dumps(earlier))) == trainer.config
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "to_dict", lambda config: earlier)
        trainer.save(tmp_path / "run")
    start(epochs=1).restore(tmp_path / "run")


def test_divergence_is_an_error(graphs: type[Graph]) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch \d: try a smaller lr than 1e\+20"):
        list(start(cuda_graph=True, lr=1e20, epochs=4).train())


def test_runs_that_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="cuda_graph: needs a GPU, got cpu"):
        start(cuda_graph=True)
    emulate(monkeypatch)
    config = TrainConfig.of(**SMALL, cuda_graph=True)
    with pytest.raises(TrainingError, match="cuda_graph: captures the step of a single process, got 2 processes"):
        Trainer(config, DIGITS, World(torch.device("cpu"), size=2))
    with pytest.raises(ValueError, match="cuda_graph: expected True or False, got 1"):
        TrainConfig.of(cuda_graph=1)


# Steps --------------------------------------------------------------------------------------------------------------


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


# Errors -------------------------------------------------------------------------------------------------------------


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
    from torch.distributed.fsdp import fully_shard

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

"""Training of models and data that were made in Python, and teachers of any kind."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import IN_CHANNELS, NUM_CLASSES, build
from students import DIGITS, HERE
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hne import HNE, FusedHNE, Hierarchy
from hne.cli import main
from hne.data import Dataset, load_dataset
from hne.errors import CheckpointError, DataError, TrainingError
from hne.losses import average_teacher, hydra_loss
from hne.models import checkpoint
from hne.training import CHECKPOINT, DistillationTrainer, StudentConfig, TrainConfig, Trainer, train_into
from hne.training.distillation import HINTON, HYDRA

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(rng: torch.Generator, tree: str = "odd") -> FusedHNE:
    return build(FusedHNE, networks.TREES[tree], rng, torch.float32)


def pair(rng: torch.Generator, count: int = 24, size: tuple[int, int] = (9, 12)) -> tuple[TensorDataset, TensorDataset]:
    """Images whose brightness tells their class."""
    sets = []
    for _ in range(2):
        labels = torch.arange(count) % NUM_CLASSES
        noise = torch.rand(count, IN_CHANNELS, *size, generator=rng)
        sets.append(TensorDataset(noise + labels[:, None, None, None], labels))
    return sets[0], sets[1]


def config_of(**options: Any) -> TrainConfig:
    return TrainConfig.of(**{"epochs": 2, "batch_size": 8, "lr": 0.02, **options})


def parameters_of(model: HNE) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


# Models and data sets -----------------------------------------------------------------------------------------------


def test_a_model_and_a_pair_of_data_sets(rng: torch.Generator) -> None:
    model = model_of(rng)
    trainer = Trainer(model, pair(rng, count=60), config_of(epochs=10, lr=0.05, objective="I"))
    assert trainer.model is model
    records = list(trainer.train(eval_every=10))
    assert records[-1].loss < 0.7 * records[0].loss
    evaluation = records[-1].evaluation
    assert evaluation is not None
    assert evaluation.images == 60
    assert [row.num_models for row in evaluation.ensembles] == [1, 2, 4, 6]
    assert evaluation.ensembles[-1].macs == model.macs(input_size=(9, 12))


def test_a_given_model_trains_as_that_of_the_config() -> None:
    config = TrainConfig.of(width=0.5, num_models=4, epochs=2, batch_size=16)
    built = Trainer.from_config(config, DIGITS, HERE)
    torch.manual_seed(config.seed)
    given = Trainer(
        FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1, width=0.5, num_models=4), DIGITS, config
    )
    assert built.config == config
    assert given.config == replace(config, preset="custom")
    for one, other in zip(built.train(), given.train(), strict=True):
        assert one.loss == other.loss
        assert one.evaluation == other.evaluation
    assert all(map(torch.equal, parameters_of(built.model), parameters_of(given.model)))


def test_the_images_of_a_pair_are_those_of_memory(rng: torch.Generator) -> None:
    """The same order of the same images as from memory: the same result."""
    config = TrainConfig.of(width=0.5, num_models=2, epochs=2, batch_size=16, augment=False)
    splits = (TensorDataset(s.images.permute(0, 3, 1, 2), s.labels) for s in (DIGITS.train, DIGITS.test))
    ours = Dataset.from_torch(*splits, classes=10, mean=DIGITS.input.mean, std=DIGITS.input.std)
    for one, other in zip(
        Trainer.from_config(config, DIGITS, HERE).train(), Trainer.from_config(config, ours, HERE).train(), strict=True
    ):
        assert one.loss == other.loss
        assert one.evaluation == other.evaluation


def test_frozen_parameters_stay(rng: torch.Generator) -> None:
    model = model_of(rng)
    model.blocks[0].requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    list(Trainer(model, pair(rng), config_of(epochs=1)).train())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("blocks.0.")}
    with pytest.raises(TrainingError, match="model: no parameter requires a gradient"):
        Trainer(model.requires_grad_(False), pair(rng), config_of())


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_the_same_bit_for_bit(workers: int, rng: torch.Generator, tmp_path: Path) -> None:
    train, val = pair(rng)
    dataset = Dataset.from_torch(
        train, val, classes=NUM_CLASSES, transform=lambda x: x + torch.rand(()) * random.random(), workers=workers
    )
    model = model_of(rng)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def start() -> Trainer:
        fresh = FusedHNE.from_config(model.config())
        fresh.load_state_dict(state)
        return Trainer(fresh, dataset, config_of(epochs=3))

    whole, first, second = start(), start(), start()
    list(whole.train())
    halfway = first.train()
    next(halfway)
    first.save(tmp_path / "half")
    torch.manual_seed(99)
    random.seed(99)
    second.restore(tmp_path / "half")
    list(second.train())
    assert all(map(torch.equal, parameters_of(whole.model), parameters_of(second.model)))
    assert [record.loss for record in whole.history] == [record.loss for record in second.history]
    other = Trainer(model, replace(dataset, name="other"), config_of(epochs=3))
    with pytest.raises(CheckpointError, match="of another run: option data was 'custom', now it is 'other'"):
        other.restore(tmp_path / "half")


def test_the_folder_of_a_run(rng: torch.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(model_of(rng), pair(rng), config_of())
    list(train_into(tmp_path, trainer, quiet=True))
    loaded, stored = checkpoint.load_model(tmp_path / CHECKPOINT)
    assert all(map(torch.equal, parameters_of(trainer.model), parameters_of(loaded)))
    assert stored["data"]["classes"] == ["0", "1", "2", "3", "4"]
    assert json.loads((tmp_path / "summary.json").read_text())["recipe"]["preset"] == "custom"
    assert main(["eval", str(tmp_path)]) == 2
    assert "trained on custom, a data set that was made in Python: --data names one" in capsys.readouterr().err
    assert main(["distill", str(tmp_path), "--data", "digits"]) == 2
    assert "--preset: expected the student's, since the network of" in capsys.readouterr().err


def test_bad_arguments(rng: torch.Generator) -> None:
    model, data = model_of(rng), pair(rng)
    for arguments, error, message in (
        (
            (config_of(), DIGITS, HERE),
            TypeError,
            r"got a config: Trainer.from_config\(config, dataset\) builds its model",
        ),
        ((nn.Linear(1, 1), data, config_of()), TypeError, "model must be an HNE .* got Linear"),
        ((model, data, HERE), TypeError, "config must be a TrainConfig, got World"),
        (
            (model, data[0], config_of()),
            TypeError,
            "dataset must be an hne.data.Dataset or a pair .* got TensorDataset",
        ),
        ((model, (*data, data[0]), config_of()), TypeError, "dataset must be .* got 3 values"),
        ((model, DIGITS, config_of()), ValueError, "expected num_classes=10 for the data set digits, got 5"),
        ((model, (data[0], []), config_of()), DataError, "val: expected at least one item"),
    ):
        with pytest.raises(error, match=message):
            Trainer(*arguments)
    grey = TensorDataset(torch.rand(20, 1, 9, 9), torch.arange(20) % 5)
    with pytest.raises(ValueError, match="model: expected in_channels=1 for the data set custom, got 3"):
        Trainer(model, (grey, grey), config_of())
    more = TensorDataset(torch.rand(20, 3, 9, 9), torch.arange(20))
    with pytest.raises(DataError, match=r"train\[\d+\]: expected a label from 0 to 4, got \d+"):
        list(Trainer(model, (more, more), config_of()).train())


# Teachers -----------------------------------------------------------------------------------------------------------


class Members(nn.Module):
    """An ensemble of linear networks, with dropout."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(IN_CHANNELS * 9 * 12, NUM_CLASSES))
            for _ in range(count)
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members])


def distill(rng: torch.Generator, teacher: Any, tree: str = "multi-head", **options: Any) -> DistillationTrainer:
    return DistillationTrainer(model_of(rng, tree), pair(rng), config_of(**options), teacher=teacher)


def test_any_module_is_a_teacher(rng: torch.Generator) -> None:
    teacher = Members(4)
    before = parameters_of(teacher)  # type: ignore[arg-type]
    trainer = distill(rng, teacher, epochs=4, lr=0.05)
    assert trainer.config.objective == HYDRA
    assert not teacher.training, "without dropout"
    images, logits = torch.rand(3, IN_CHANNELS, 9, 12, generator=rng), torch.randn(4, 3, NUM_CLASSES, generator=rng)
    loss = trainer._loss(logits.requires_grad_(), images, torch.arange(3))
    torch.testing.assert_close(loss, hydra_loss(logits, teacher(images), 2.0))
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    records = list(trainer.train())
    assert records[-1].loss < records[0].loss
    assert all(map(torch.equal, before, parameters_of(teacher)))  # type: ignore[arg-type]


@pytest.mark.parametrize("members", [1, 3])
def test_one_head_learns_from_any_number_of_members(members: int, rng: torch.Generator) -> None:
    outputs = torch.randn(members, 3, NUM_CLASSES, generator=rng)
    trainer = distill(rng, lambda images: outputs if members > 1 else outputs[0], "single", temperature=3.0)
    assert trainer.config.objective == HINTON
    images, logits = torch.rand(3, IN_CHANNELS, 9, 12, generator=rng), torch.randn(1, 3, NUM_CLASSES, generator=rng)
    loss = trainer._loss(logits, images, torch.arange(3))
    torch.testing.assert_close(loss, hydra_loss(logits, average_teacher(outputs, 3.0), 3.0))


def test_teachers_of_inference_mode_and_low_precision(rng: torch.Generator) -> None:
    teacher = Members(4).eval()

    @torch.inference_mode()
    def ask(images: Tensor) -> Tensor:
        return teacher(images).bfloat16()

    assert [record.loss > 0 for record in distill(rng, ask).train()] == [True, True]


def test_known_outputs_are_looked_up(rng: torch.Generator) -> None:
    outputs = torch.randn(4, 24, NUM_CLASSES, generator=rng)
    trainer = distill(rng, outputs, augment=False)
    images, logits = torch.rand(3, IN_CHANNELS, 9, 12, generator=rng), torch.randn(4, 3, NUM_CLASSES, generator=rng)
    indices = torch.tensor([20, 3, 7])
    torch.testing.assert_close(trainer._loss(logits, images, indices), hydra_loss(logits, outputs[:, indices], 2.0))
    list(trainer.train())


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda x: x.shape, TypeError, "expected a function that returns a tensor, got Size"),
        (lambda x: torch.zeros(4, len(x), 5).long(), TypeError, "expected floating-point logits, got torch.int64"),
        (lambda x: torch.zeros(4, 5), ValueError, r"\[members, batch, classes\] = \[M, 8, 5\], got \(1, 4, 5\)"),
        (lambda x: torch.zeros(4, len(x), 6), ValueError, r"= \[M, 8, 5\], got \(4, 8, 6\)"),
        (lambda x: torch.zeros(len(x)), ValueError, r"= \[M, 8, 5\], got \(8,\)"),
        (lambda x: torch.zeros(0, len(x), 5), ValueError, r"= \[M, 8, 5\], got \(0, 8, 5\)"),
        (lambda x: torch.zeros(3, len(x), 5), ValueError, "logits of 4 members, one for each head .* got 3"),
        (lambda x: torch.zeros(len(x), 5), ValueError, "logits of 4 members, one for each head .* got 1"),
        (lambda x: torch.zeros(4, len(x), 5).log(), ValueError, "expected finite logits, got NaN or infinity"),
        (lambda x: torch.zeros(4, len(x), 5, device="meta"), ValueError, "on the device of the images, cpu, got meta"),
    ],
)
def test_bad_answers_of_a_teacher(answer: Any, error: type[Exception], message: str, rng: torch.Generator) -> None:
    trainer = distill(rng, answer)
    with pytest.raises(error, match=f"^teacher: .*{message}"):
        list(trainer.train())


@pytest.mark.parametrize(
    ("teacher", "options", "error", "message"),
    [
        ("runs/teacher", {}, TypeError, "expected a function of images or a tensor of outputs, got str"),
        (torch.zeros(4, 24, 5), {"augment": True}, ValueError, "outputs known in advance are for images without"),
        (torch.zeros(4, 23, 5), {}, ValueError, r"\[members, images, classes\] = \[M, 24, 5\], got \(4, 23, 5\)"),
        (torch.zeros(4, 24, 5) / 0, {}, ValueError, "expected finite logits, got NaN or infinity"),
        (torch.zeros(4, 24, 5).int(), {}, TypeError, "expected floating-point logits, got torch.int32"),
    ],
)
def test_bad_teachers(
    teacher: Any, options: dict[str, Any], error: type[Exception], message: str, rng: torch.Generator
) -> None:
    with pytest.raises(error, match=f"^teacher: .*{message}"):
        distill(rng, teacher, **{"augment": False, **options})


def test_the_name_of_a_teacher_is_kept(rng: torch.Generator, tmp_path: Path) -> None:
    def start(name: str) -> DistillationTrainer:
        config = StudentConfig.of(epochs=1, batch_size=8, teacher=name)
        return DistillationTrainer(model_of(rng, "multi-head"), pair(rng), config, teacher=Members(4))

    start("resnet").save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="option teacher was 'resnet', now it is 'vit'"):
        start("vit").restore(tmp_path / "run")


def test_a_student_of_named_data(rng: torch.Generator) -> None:
    tree = Hierarchy.multi_head(4, 3)
    student = FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1, hierarchy=tree, width=0.5)
    dataset = load_dataset("digits", limit_train=32, limit_test=20)
    trainer = DistillationTrainer(student, dataset, config_of(epochs=1), teacher=lambda x: x.new_zeros(3, len(x), 10))
    (record,) = trainer.train()
    assert record.evaluation is not None
    assert trainer.config.data == "digits"

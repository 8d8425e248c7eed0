"""Training by Lightning, with the real package: the same steps as by hand, and the metrics of evaluate()."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from hne import OBJECTIVES, FusedHNE, NaiveHNE, objective
from hne.data import Dataset
from hne.evaluation import evaluate
from hne.losses import gaussian_objective, hydra_loss

pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from hne.integrations.lightning import EnsembleMetrics, HNEModule

Data = tuple[Tensor, Tensor]


@pytest.fixture
def data(rng: torch.Generator) -> Data:
    return torch.randn(24, 3, 8, 8, generator=rng), torch.randint(5, (24,), generator=rng)


def small(kind: type[FusedHNE | NaiveHNE] = FusedHNE, classes: int = 5) -> Any:
    return kind.from_preset("hne_tiny", num_classes=classes, width=0.25, num_models=4)


def loader(data: Data, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(*data), batch_size=batch_size)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **{**quiet, **options})


def by_hand(model: Any, data: Data, loss_of: Any, epochs: int, accumulated: int = 1) -> Any:
    """Train as HNEModule does, in a loop."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, 0.9, weight_decay=5e-4)
    steps = epochs * len(loader(data)) // accumulated
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index, (images, target) in enumerate(loader(data), 1):
            (loss_of(model(images), target) / accumulated).backward()
            if index % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model


def assert_equal_weights(found: Any, expected: Any) -> None:
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", [FusedHNE, NaiveHNE])
def test_steps_are_those_of_a_loop(kind: Any, name: str, data: Data, tmp_path: Path) -> None:
    model = small(kind)
    expected = by_hand(copy.deepcopy(model), data, objective(name, 0.3, 1.5), 2)
    module = HNEModule(model, name, alpha=0.3, temperature=1.5)
    trainer(tmp_path, max_epochs=2).fit(module, loader(data))
    assert_equal_weights(module.model, expected)


@pytest.mark.filterwarnings("ignore")
def test_accumulated_gradients(data: Data, tmp_path: Path) -> None:
    model = small()
    expected = by_hand(copy.deepcopy(model), data, objective("I+HD"), 2, accumulated=3)
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=3).fit(HNEModule(model), loader(data))
    assert_equal_weights(model, expected)


@pytest.mark.filterwarnings("ignore")
def test_other_objectives_and_schedules(data: Data, rng: torch.Generator, tmp_path: Path) -> None:
    teacher = data[0], torch.randn(24, 4, 5, generator=rng)
    hydra = HNEModule(small(), lambda logits, teacher: hydra_loss(logits, teacher.transpose(0, 1), 2.0))
    regression = HNEModule(small(classes=2), gaussian_objective(lambda y: y))
    for module, pairs in ((hydra, teacher), (regression, (data[0], torch.randn(24, generator=rng)))):
        before = module.objective(module(pairs[0]), pairs[1]).item()
        fitted = trainer(tmp_path, max_epochs=4)
        fitted.fit(module, loader(pairs))
        module.train()
        assert fitted.callback_metrics["train_loss"] < before

    class Adam(HNEModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    module = Adam(small())
    trainer(tmp_path, max_epochs=1).fit(module, loader(data))
    assert isinstance(module.optimizers().optimizer, torch.optim.AdamW)
    endless = trainer(tmp_path, max_epochs=-1, max_time={"seconds": 1}, limit_train_batches=1)
    endless.fit(HNEModule(small(), lr=0.01), loader(data))
    assert endless.optimizers[0].param_groups[0]["lr"] == 0.01, "without an end there is no schedule"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_metrics_are_those_of_evaluate(average: str, data: Data, tmp_path: Path) -> None:
    module = HNEModule(small())
    metrics = EnsembleMetrics(sizes=(1, 3, 4), average=average)
    logger = CSVLogger(tmp_path)
    fitted = trainer(tmp_path, max_epochs=2, callbacks=[metrics], logger=logger, log_every_n_steps=1)
    fitted.fit(module, loader(data), loader(data, 5))
    dataset = Dataset.from_torch(*(TensorDataset(*data),) * 2, classes=5)
    (found,) = metrics.evaluations
    expected = evaluate(module.model, dataset, sizes=(1, 3, 4), average=average, batch_size=5)
    logged = fitted.callback_metrics
    for one, other in zip(found.ensembles, expected.ensembles, strict=True):
        assert (one.num_models, one.macs) == (other.num_models, other.macs)
        for metric in ("accuracy", "nll", "ece", "mutual_information"):
            assert getattr(one, metric) == pytest.approx(getattr(other, metric), rel=1e-4, abs=1e-5)
        for metric in ("accuracy", "nll", "ece"):
            assert logged[f"val_{metric}_{one.num_models}"] == pytest.approx(getattr(one, metric), rel=1e-5)
    assert found.average == average
    assert {"train_loss", "val_member_accuracy", "val_diversity"} <= logged.keys()
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "val_nll_4" in text.splitlines()[0]
    (tested,) = trainer(tmp_path, callbacks=[metrics]).test(module, loader(data, 5), verbose=False)
    assert tested["test_nll_4"] == pytest.approx(expected.ensembles[-1].nll, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_several_loaders_and_other_modules(data: Data, tmp_path: Path) -> None:
    class Other(LightningModule):
        def validation_step(self, batch: Data, batch_idx: int, dataloader_idx: int = 0) -> Any:
            images, target = batch
            return {"logits": images.flatten(1)[:, :10].reshape(-1, 2, 5).transpose(0, 1), "target": target}

    metrics, halves = EnsembleMetrics(), [(data[0][:12], data[1][:12]), (data[0][12:], data[1][12:])]
    loaders = [loader(half) for half in halves]
    results = trainer(tmp_path, callbacks=[metrics]).validate(Other(), loaders, verbose=False)
    logged = {name: value for result in results for name, value in result.items()}
    for index, (images, target) in enumerate(halves):
        members = images.flatten(1)[:, :10].reshape(-1, 2, 5).transpose(0, 1)
        accuracy = (members.mean(0).argmax(-1) == target).double().mean().item()
        assert logged[f"val_accuracy_2/dataloader_idx_{index}"] == pytest.approx(accuracy)
        assert metrics.evaluations[index].images == 12


@pytest.mark.filterwarnings("ignore")
def test_steps_that_return_something_else(data: Data, tmp_path: Path) -> None:
    outputs: Any = None

    class Other(LightningModule):
        def validation_step(self, batch: Data, batch_idx: int) -> Any:
            return outputs

    def validate() -> None:
        trainer(tmp_path, callbacks=[EnsembleMetrics()]).validate(Other(), loader(data), verbose=False)

    outputs = {"loss": torch.zeros(())}
    with pytest.raises(TypeError, match=r"a step that returns a dict with logits and target, got \['loss'\]"):
        validate()
    outputs = {"logits": torch.zeros(8, 5), "target": torch.zeros(8, dtype=torch.long)}
    with pytest.raises(
        ValueError, match=r"expected logits \[members, batch, classes\] and classes \[batch\], got \[8, 5\]"
    ):
        validate()


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_predictions_and_precision(data: Data, tmp_path: Path) -> None:
    module = HNEModule(small(), "I", lr=0.02)
    best = ModelCheckpoint(tmp_path, monitor="val_nll_4")
    fitted = trainer(
        tmp_path, max_epochs=2, callbacks=[EnsembleMetrics(), best], enable_checkpointing=True, precision="bf16-mixed"
    )
    fitted.fit(module, loader(data), loader(data))
    assert math.isfinite(fitted.callback_metrics["val_nll_4"])
    loaded = HNEModule.load_from_checkpoint(best.best_model_path, model=small())
    assert (loaded.hparams["objective"], loaded.hparams["lr"]) == ("I", 0.02)
    for batches in (loader(data), DataLoader(data[0], batch_size=8)):
        predicted = torch.cat(trainer(tmp_path).predict(loaded, batches))
        with torch.no_grad():
            torch.testing.assert_close(predicted, loaded.model.eval()(data[0]).mean(0), rtol=1e-4, atol=1e-5)


def test_unknown_objective() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="objective must be one of"):
            HNEModule(small(), "J")

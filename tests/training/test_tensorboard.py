"""Scalars for TensorBoard: which are written, and that the real package reads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hne.cli import main
from hne.data import load_dataset
from hne.training import EpochRecord, TrainConfig, Trainer, check_tensorboard, train_into, write_scalars
from hne.training import tensorboard as module


def trained(data: str, **options: object) -> EpochRecord:
    """The record of an epoch."""
    dataset = load_dataset(data, limit_train=64, limit_test=40)
    config = TrainConfig.of(data=data, epochs=1, batch_size=32, width=0.5, limit_train=64, limit_test=40)
    (record,) = Trainer.from_config(config, dataset).train(quiet=True)
    return record


@pytest.mark.parametrize(("data", "metrics"), [("digits", ("accuracy", "nll", "ece")), ("diabetes", ("rmse", "nll"))])
def test_each_ensemble_size_has_scalars(data: str, metrics: tuple[str, ...]) -> None:
    record = trained(data)
    scalars: dict[str, float] = {}

    def add(name: str, value: float, step: int) -> None:
        assert step == record.epoch
        assert name not in scalars
        scalars[name] = value

    write_scalars(add, record)
    evaluation = record.evaluation
    assert evaluation is not None
    for ensemble in evaluation.ensembles:
        for metric in metrics:
            assert scalars.pop(f"{metric}/{ensemble.num_models}") == getattr(ensemble, metric)
    member = "member_accuracy" if data == "digits" else "member_rmse"
    assert scalars.pop(f"ensemble/{member}") == evaluation.columns()[member]
    assert scalars.pop("ensemble/diversity") == evaluation.ensembles[-1].diversity
    assert scalars == {f"train/{name}": getattr(record, name) for name in ("loss", "lr", "images_per_second")}


def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("hne.extras.find_spec", lambda name: None if name == "tensorboard" else found(name))
    assert main(["train", "--tensorboard", "--out", str(tmp_path / "run"), "--epochs", "1"]) != 0
    assert "tensorboard is not installed: pip install 'hne-kernels[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModuleNotFoundError):
        check_tensorboard()


def test_files_are_read_by_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small = ("--limit-train", "64", "--limit-test", "40", "--batch-size", "32", "--width", "0.5", "--threads", "1")
    common = ("train", "--out", str(tmp_path), "--quiet", "--tensorboard", "--eval-every", "2", *small)
    assert main([*common, "--epochs", "3"]) == 0

    def read() -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(tmp_path / module.FOLDER)).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    found = read()
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert [step for step, _ in found["accuracy/8"]] == [2, 3]
    assert {f"{metric}/{n}" for metric in ("accuracy", "nll", "ece") for n in (1, 2, 4, 8)} <= found.keys()
    assert main([*common, "--epochs", "2", "--overwrite"]) == 0
    assert [step for step, _ in read()["train/loss"]] == [1, 2], "of the new run only"
    dataset = load_dataset("digits", limit_train=64, limit_test=40)
    config = TrainConfig.of(epochs=1, batch_size=32, width=0.5)
    list(train_into(tmp_path / "python", Trainer.from_config(config, dataset), quiet=True, tensorboard=True))
    assert list((tmp_path / "python" / module.FOLDER).iterdir())

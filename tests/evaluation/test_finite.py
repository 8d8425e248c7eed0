"""Results that are not finite are errors, not figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hne import FusedHNE
from hne.data import Dataset, load_dataset
from hne.errors import CheckpointError, ResultError
from hne.evaluation import evaluate, evaluate_ood, evaluate_regression, measure_anytime, seconds_per_call
from hne.experiments import read_run_state
from hne.training import SUMMARY, TrainConfig


def diverged(dataset: Dataset, preset: str) -> FusedHNE:
    channels = dataset.input.channels
    model = FusedHNE.from_preset(preset, num_classes=dataset.outputs, in_channels=channels, width=0.25)
    with torch.no_grad():
        model.head.conv.bias.fill_(float("nan"))
    return model


def test_classification() -> None:
    dataset = load_dataset("digits", limit_test=20)
    model = diverged(dataset, "hne_tiny")
    with pytest.raises(ResultError, match=r"the evaluation gives ensembles\[0\]\.nll = nan"):
        evaluate(model, dataset)
    with pytest.raises(ValueError, match="must be finite scores"):
        evaluate_ood(model, dataset, dataset.test)
    with pytest.raises(ResultError, match="the logits are not finite"):
        measure_anytime(model, dataset)


def test_regression() -> None:
    dataset = load_dataset("diabetes")
    with pytest.raises(ResultError, match=r"the evaluation gives ensembles\[0\]\.rmse = nan"):
        evaluate_regression(diverged(dataset, "hne_mlp"), dataset)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_timings_end(seconds: float) -> None:
    with pytest.raises(ValueError, match="min_seconds: expected a finite number above 0"):
        seconds_per_call(lambda: None, seconds)


def test_summary_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / SUMMARY).write_text('{"evaluation": {"ensembles": [{"nll": NaN}]}}')
    with pytest.raises(CheckpointError, match="NaN among the results: the training diverged"):
        read_run_state(tmp_path, TrainConfig.of(), load_dataset("digits"))

"""Regression: Gaussians of leaves, their mixture, and what a run on a data set of numbers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch.distributions import Normal, kl_divergence

from hne.cli import main
from hne.data import TargetFormat, load_dataset
from hne.distributed import World
from hne.errors import TrainingError
from hne.evaluation.regression import (
    RegressionEvaluation,
    evaluate_regression,
    gaussian_divergence,
    gaussians,
    likelihood_objective,
)
from hne.training.config import Recipe
from hne.training.trainer import CHECKPOINT, Run

pytestmark = pytest.mark.usefixtures("one_thread")


def start(**options: Any) -> Run:
    recipe = Recipe.of(**{"data": "diabetes", "num_models": 4, "epochs": 2, **options})
    return Run(recipe, load_dataset("diabetes"), World(torch.device("cpu")))


# Gaussians ----------------------------------------------------------------------------------------------------------


def test_variances_are_positive() -> None:
    outputs = torch.tensor([[3.0, -1e4], [-2.0, 0.0], [0.0, 1e4]])
    mean, variance = gaussians(outputs)
    assert mean.tolist() == [3, -2, 0]
    assert variance.min() >= 1e-4
    assert variance.isfinite().all()
    assert gaussians(outputs.bfloat16())[1].dtype == torch.float32


def test_likelihood(rng: torch.Generator) -> None:
    outputs = torch.randn(3, 6, 2, generator=rng, dtype=torch.float64).requires_grad_()
    target = 50 + 9 * torch.randn(6, generator=rng, dtype=torch.float64)
    mean, variance = gaussians(outputs)
    density = Normal(mean, variance.sqrt()).log_prob((target - 50) / 9)
    loss = likelihood_objective(TargetFormat(50, 9))(outputs, target)
    torch.testing.assert_close(loss, -density.mean(1).sum(), msg="sum over the leaves, mean over the batch")
    assert torch.autograd.gradcheck(lambda y: likelihood_objective(TargetFormat(50, 9))(y, target), outputs)


def test_divergence(rng: torch.Generator) -> None:
    student, teacher = (torch.randn(3, 6, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    a, b = ((mean, variance.sqrt()) for mean, variance in (gaussians(teacher), gaussians(student)))
    expected = kl_divergence(Normal(*a), Normal(*b)).mean()
    torch.testing.assert_close(gaussian_divergence(gaussians(student), gaussians(teacher)), expected)
    assert gaussian_divergence(gaussians(student), gaussians(student)).abs() < 1e-12


# Data and runs ------------------------------------------------------------------------------------------------------


def test_diabetes() -> None:
    dataset = load_dataset("diabetes")
    assert (len(dataset.train), len(dataset.test)) == (295, 147)
    assert dataset.outputs == 2
    assert dataset.target is not None
    inputs = dataset.input.normalise(dataset.train.pixels(torch.arange(295)))
    assert inputs.shape == (295, 10, 1, 1)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(10), atol=1e-4, rtol=0)
    target = dataset.target.normalise(dataset.train.labels)
    assert abs(target.mean()) < 1e-5
    assert target.std(correction=0).item() == pytest.approx(1)
    raw = sklearn.datasets.load_diabetes(scaled=False)
    np.testing.assert_allclose(dataset.test.images[3, 0, 0], raw.data[11], rtol=1e-6)
    assert dataset.test.labels[3] == raw.target[11]


def test_evaluation_agrees_with_its_definition() -> None:
    run = start(num_models=8)
    list(run.train())
    found = evaluate_regression(run.model, run.dataset, batch_size=40)
    with torch.no_grad():
        outputs = run.model(run.dataset.input.normalise(run.dataset.test.pixels(torch.arange(147)))).double()
    assert run.dataset.target is not None
    mean, variance = gaussians(outputs)
    mean = mean * run.dataset.target.std + run.dataset.target.mean
    variance = variance * run.dataset.target.std**2
    target = run.dataset.test.labels
    assert [e.num_models for e in found.ensembles] == [1, 2, 4, 8]
    for ensemble in found.ensembles:
        n = ensemble.num_models
        centre = mean[:n].mean(0)
        spread = (variance[:n] + mean[:n] ** 2).mean(0) - centre**2
        assert ensemble.rmse == pytest.approx((centre - target).square().mean().sqrt().item(), rel=1e-4)
        density = Normal(centre, spread.sqrt()).log_prob(target.double())
        assert ensemble.nll == pytest.approx(-density.mean().item(), rel=1e-4)
        assert ensemble.diversity == pytest.approx(mean[:n].std(0, correction=0).mean().item(), rel=1e-4)
        assert ensemble.macs == run.model.macs(n, 1)
    assert found.member_rmse == pytest.approx((mean - target).square().mean(1).sqrt().tolist(), rel=1e-4)
    assert RegressionEvaluation.from_dict(found.to_dict()) == found


def test_it_learns() -> None:
    run = start(epochs=15)
    rows = list(run.train(eval_every=15))
    assert rows[-1].loss < 0.9 * rows[0].loss
    evaluation = rows[-1].evaluation
    assert isinstance(evaluation, RegressionEvaluation)
    assert evaluation.ensembles[-1].rmse < 0.9 * run.dataset.test.labels.std()


def test_resumed_run_is_the_same(tmp_path: Path) -> None:
    whole, first, second = (start(epochs=4) for _ in range(3))
    list(whole.train())
    halfway = first.train()
    for _ in range(2):
        next(halfway)
    first.save(tmp_path / "half")
    second.restore(tmp_path / "half")
    list(second.train())
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert [row.evaluation for row in second.history] == [row.evaluation for row in whole.history]


def test_only_likelihood_is_trained() -> None:
    with pytest.raises(TrainingError, match=r"objective: expected I .* as diabetes is, got I\+HD"):
        start(objective="I+HD")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", "diabetes", "--epochs", "1", "--out", str(out), "--quiet"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINT, "log.csv", "summary.json"]
    assert "RMSE" in capsys.readouterr().out
    assert main(["eval", str(out), "--json", str(tmp_path / "figures.json")]) == 0
    assert "147 samples" in capsys.readouterr().out
    for argv, message in (
        (["eval", str(out), "--ood", "digits"], "diabetes has none"),
        (["eval", str(out), "--data", "digits"], "does not fit digits"),
        (["anytime", str(out)], "expected a network that names classes, got a regression of diabetes"),
        (["study", "figure4", "--data", "diabetes"], "expected a data set with classes"),
    ):
        assert main(argv) == 2
        assert message in capsys.readouterr().err

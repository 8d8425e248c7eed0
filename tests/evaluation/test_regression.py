"""Regression: evaluation of ensembles of Gaussians, training runs, and commands on a regression data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from hne.cli import main
from hne.data import load_dataset, ood_samples
from hne.distributed import World
from hne.evaluation import RegressionEvaluation, evaluate_regression, evaluate_regression_ood
from hne.losses import OBJECTIVES, gaussians
from hne.training import CHECKPOINT, TrainConfig, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def start(**options: Any) -> Trainer:
    config = TrainConfig.of(**{"data": "diabetes", "num_models": 4, "epochs": 2, **options})
    return Trainer.from_config(config, load_dataset("diabetes"), World(torch.device("cpu")))


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
        chance = Normal(centre, spread.sqrt()).cdf(target.double())  # uniform if calibrated
        gaps = [((chance - 0.5).abs() <= k / 40).double().mean() - k / 20 for k in range(1, 20)]
        assert ensemble.coverage_error == pytest.approx(torch.stack(gaps).abs().mean().item(), abs=1e-6)
    assert found.member_rmse == pytest.approx((mean - target).square().mean(1).sqrt().tolist(), rel=1e-4)
    assert RegressionEvaluation.from_dict(found.to_dict()) == found
    earlier = found.to_dict()
    for ensemble in earlier["ensembles"]:
        del ensemble["coverage_error"]  # as files of earlier versions
    assert RegressionEvaluation.from_dict(earlier).ensembles[-1].rmse == found.ensembles[-1].rmse


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


def test_every_objective_learns() -> None:
    """And distillation into each member draws their means together."""
    diversity = {}
    for objective in OBJECTIVES:
        run = start(epochs=15, objective=objective)
        evaluation = list(run.train(eval_every=15))[-1].evaluation
        assert isinstance(evaluation, RegressionEvaluation)
        assert evaluation.ensembles[-1].rmse < 0.9 * run.dataset.test.labels.std()
        diversity[objective] = evaluation.ensembles[-1].diversity
    assert min(diversity, key=lambda objective: diversity[objective]) == "I+D"


def test_ood_evaluation_agrees_with_its_definition() -> None:
    run = start(num_models=8)
    list(run.train())
    samples = ood_samples("scaled", run.dataset)
    found = evaluate_regression_ood(run.model, run.dataset, samples, batch_size=40)
    assert run.dataset.target is not None
    scores = []
    for images in (run.dataset.test, samples):
        with torch.no_grad():
            outputs = run.model(run.dataset.input.normalise(images.pixels(torch.arange(147)))).double()
        mean, variance = gaussians(outputs)
        spread = [(variance[:n] + mean[:n] ** 2).mean(0) - mean[:n].mean(0) ** 2 for n in (1, 2, 4, 8)]
        deviations = [mean[:n].std(0, correction=0) for n in (1, 2, 4, 8)]
        scores.append(run.dataset.target.std * torch.stack([torch.stack(spread).sqrt(), torch.stack(deviations)]))
    for i, ood in enumerate(found):
        assert ood.num_models == 2**i
        assert ood.deviation == pytest.approx(scores[1][0, i].mean().item(), rel=1e-4)
        assert ood.diversity == pytest.approx(scores[1][1, i].mean().item(), rel=1e-4, abs=1e-6)
        for name, kind in (("by_deviation", 0), ("by_diversity", 1)):
            inside, outside = scores[0][kind, i], scores[1][kind, i]
            above = (outside[:, None] > inside).double() + (outside[:, None] == inside).double() / 2
            assert getattr(ood, name).auroc == pytest.approx(above.mean().item(), abs=1e-3), (name, i)
    assert found[-1].by_diversity.auroc > 0.7, "members disagree about samples that are far away"


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", "diabetes", "--epochs", "1", "--out", str(out), "--quiet"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINT, "log.csv", "summary.json"]
    assert "RMSE" in capsys.readouterr().out
    figures = tmp_path / "figures.json"
    assert main(["eval", str(out), "--ood", "permuted", "--json", str(figures)]) == 0
    text = capsys.readouterr().out
    assert "147 samples" in text
    assert "147 OOD samples, permuted, against those of diabetes" in text
    assert [e["num_models"] for e in json.loads(figures.read_text())["ood"]["ensembles"]] == [1, 2, 4, 8]
    for argv, message in (
        (["eval", str(out), "--ood", "digits"], "expected permuted or scaled for diabetes, got 'digits'"),
        (["eval", str(out), "--data", "digits"], "does not fit digits"),
        (["anytime", str(out)], "expected a classifier, got a regression of diabetes"),
        (["study", "figure4", "--data", "diabetes"], "expected a data set with classes"),
    ):
        assert main(argv) == 2
        assert message in capsys.readouterr().err

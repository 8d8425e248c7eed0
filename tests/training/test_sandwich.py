"""Training of a slimmable model: the sandwich rule, calibration, resumed runs, and results over widths."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hne import HNE, FusedHNE, Hierarchy
from hne.cli import main
from hne.data import load_dataset
from hne.errors import TrainingError
from hne.evaluation import EnsembleMetrics, Evaluation, by_width, evaluate_widths, pareto_front
from hne.experiments.runs import run_name
from hne.layers import Bottleneck, Conv
from hne.losses import OBJECTIVES, narrow_objective, objective
from hne.models import checkpoint
from hne.training import SandwichStep, TrainConfig, Trainer

OPTIONS = {
    "epochs": 2,
    "batch_size": 16,
    "width": 0.2,
    "limit_train": 48,
    "limit_test": 40,
    "branches": (1, 1, 2, 2),
    "widths": (0.5, 0.75, 1.0),
}


@pytest.fixture(scope="module")
def digits() -> object:
    return load_dataset("digits", limit_train=48, limit_test=40)


def small_model(tree: Hierarchy, rng: torch.Generator) -> HNE:
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    blocks = [[Conv(4)], [Bottleneck(6, 4, stride=2)]]
    return FusedHNE(tree, blocks, num_classes=3).double().set_widths_([0.5])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_narrow_objective(name: str, rng: torch.Generator) -> None:
    """Against sums that are written out; and no gradient flows into the teacher."""
    y, full = (torch.randn(3, 5, 7, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(2))
    alpha, temperature = 0.3, 2.5
    teacher = (full[0] + full[1] + full[2]) / 3
    ensembles = [y[0], (y[0] + y[1]) / 2, (y[0] + y[1] + y[2]) / 3]

    def entropies(students: list[torch.Tensor], t: float) -> torch.Tensor:
        return sum(t * t * F.cross_entropy(one / t, (teacher.detach() / t).softmax(-1)) for one in students)

    terms = {
        "I": entropies([*y], 1),
        "H": entropies(ensembles, 1),
        "D": entropies([*y], temperature),
        "HD": entropies(ensembles[:2], temperature),
    }
    first, _, second = name.partition("+")
    want = (1 - alpha) * terms[first] + alpha * terms[second] if second else terms[first]
    got = narrow_objective(name, alpha, temperature)(y, full)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(want, y)
    got.backward()
    torch.testing.assert_close(y.grad, gradient)
    assert full.grad is None


def test_a_step_of_a_single_network_is_that_of_a_us_net(rng: torch.Generator) -> None:
    """Gradients of: labels at full width, its soft predictions at the others."""
    model = small_model(Hierarchy((1, 1)), rng).train()
    other = copy.deepcopy(model)
    x = torch.randn(6, 3, 8, 8, generator=rng, dtype=torch.float64)
    target = torch.randint(3, (6,), generator=rng)
    alpha = 0.25
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    step = SandwichStep(model, model, objective("I+HD", alpha), narrow_objective("I+HD", alpha), optimizer)
    torch.manual_seed(5)
    total = step(x, target)
    torch.manual_seed(5)
    widths = step.narrow_widths()
    assert widths[0] == 0.5
    assert len(set(widths)) == 3
    assert all(0.5 < width < 1 for width in widths[1:])
    logits = other(x)[0]
    loss = F.cross_entropy(logits, target)
    for width in widths:
        loss = loss + F.cross_entropy(other(x, width=width)[0], logits.detach().softmax(-1))
    ((1 - alpha) * loss).backward()
    torch.testing.assert_close(total, (1 - alpha) * loss.detach())
    for (name, parameter), copied in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad, msg=name)


def test_width_one_alone_is_ordinary_training(rng: torch.Generator) -> None:
    model = small_model(Hierarchy((1, 2)), rng).set_widths_([1.0])
    step = SandwichStep(model, model, objective("I"), narrow_objective("I"), torch.optim.SGD(model.parameters(), 0.1))
    assert step.narrow_widths() == []


def test_resumed_run(digits: object, tmp_path: Path) -> None:
    config = TrainConfig.of(**OPTIONS)

    def trained(stop: int | None = None) -> Trainer:
        trainer = Trainer.from_config(config, digits)
        for record in trainer.train(quiet=True):
            if record.epoch == stop:
                break
        return trainer

    whole, half = trained(), trained(stop=1)
    half.save(tmp_path / "half.safetensors")
    resumed = Trainer.from_config(config, digits)
    resumed.restore(tmp_path / "half.safetensors")
    assert resumed.model.widths == (0.5, 0.75, 1)
    for _ in resumed.train(quiet=True):
        pass
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    first, second = (trainer.history[-1].evaluation for trainer in (whole, resumed))
    assert first == second
    assert [at.width for at in by_width(first)] == [0.5, 0.75, 1]
    resumed.save(tmp_path / "whole.safetensors")
    loaded, _ = checkpoint.load_model(tmp_path / "whole.safetensors")
    evaluation = evaluate_widths(loaded, digits)
    assert evaluation == first
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation


def test_evaluation_is_that_of_each_width(digits: object) -> None:
    trainer = Trainer.from_config(TrainConfig.of(**{**OPTIONS, "epochs": 1}), digits)
    (record,) = trainer.train(quiet=True)
    model = trainer.model.eval()
    images = next(iter(torch.utils.data.DataLoader(digits.test.images, 40)))
    x = digits.input.normalise(images)
    for at in by_width(record.evaluation):
        with torch.no_grad():
            logits = model.prefix_logits(x, width=at.width)
        for n, ensemble in enumerate(at.ensembles):
            right = (logits[n].argmax(-1) == digits.test.labels).double().mean().item()
            assert ensemble.accuracy == pytest.approx(right)
            assert ensemble.macs == model.macs(ensemble.num_models, digits.input.size, width=at.width)


def test_pareto_front(rng: torch.Generator) -> None:
    """Against all pairs of choices."""
    for _ in range(20):
        costs, quality = torch.randint(6, (2, 3, 4), generator=rng).tolist()
        evaluation = Evaluation((), (), 1)
        narrower = []
        for width, row, accuracies in zip((0.2, 0.5, 1.0), costs, quality, strict=True):
            ensembles = tuple(
                EnsembleMetrics(n, macs, accuracy / 6, *[0.0] * 7)
                for n, macs, accuracy in zip((1, 2, 4, 8), row, accuracies, strict=True)
            )
            narrower.append(replace(evaluation, ensembles=ensembles, width=width))
        evaluation = replace(narrower[-1], narrower=tuple(narrower[:-1]))
        points = {(at.width, e.num_models): (e.macs, e.accuracy) for at in by_width(evaluation) for e in at.ensembles}
        front = pareto_front(evaluation)
        for choice, (macs, accuracy) in points.items():
            beaten = any(a >= accuracy and m <= macs and (m, a) != (macs, accuracy) for m, a in points.values())
            equal = any(points[other] == (macs, accuracy) for other in front)
            assert accuracy == 0 or equal != beaten, choice


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ["train", "--epochs", "1", "--width", "0.2", "--limit-train", "32", "--limit-test", "24"]
    words += ["--branches", "1,1,1,1", "--widths", "0.5,1", "--quiet", "--out", str(folder)]
    assert main(words) == 0
    assert "at each width" in capsys.readouterr().out
    assert (folder / "accuracy.png").stat().st_size > 10_000
    assert "accuracy_1_width_0.5" in (folder / "log.csv").read_text().splitlines()[0]
    assert main(["eval", str(folder), "--quiet", "--json", str(tmp_path / "figures.json")]) == 0
    assert "Pareto" in capsys.readouterr().out
    (narrow,) = json.loads((tmp_path / "figures.json").read_text())["evaluation"]["narrower"]
    assert narrow["width"] == 0.5


def test_options() -> None:
    ordinary, slimmable = TrainConfig.of(), TrainConfig.of(widths=(0.5, 1.0))
    assert run_name(replace(slimmable, widths=None)) == run_name(ordinary) != run_name(slimmable)
    before = {name: value for name, value in ordinary.to_dict().items() if name != "widths"}
    assert TrainConfig.from_dict(before) == ordinary
    assert TrainConfig.from_dict(json.loads(json.dumps(slimmable.to_dict()))) == slimmable
    for widths, message in (
        ((0.5, 0.5), "widths: expected different widths, one at least below 1"),
        ((1.0,), "widths: expected different widths, one at least below 1"),
        ((), "widths: expected different widths, one at least below 1"),
        ((2.0,), "widths: expected numbers above 0 and at most 1, got 2.0"),
        (("0.5",), "widths: expected a number, got '0.5'"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig.of(widths=widths)
    with pytest.raises(TrainingError, match="widths: smaller widths learn probabilities, which diabetes"):
        Trainer.from_config(TrainConfig.of(data="diabetes", widths=(0.5,)), load_dataset("diabetes"))

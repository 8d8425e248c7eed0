"""Results of studies: estimates over the seeds, tables, figures and reports."""

from __future__ import annotations

import csv
import itertools
import statistics
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hne.evaluation import EnsembleMetrics, Evaluation
from hne.experiments import (
    STUDIES,
    CurveResult,
    Estimate,
    PanelResult,
    Result,
    StudySettings,
    collect_results,
    study_panels,
    write_report,
)
from hne.experiments.figures import FIGURES, _spread
from hne.experiments.tables import TABLES
from hne.training import TrainConfig

PAPER = StudySettings(TrainConfig.of(data="cifar100"))


def evaluation(accuracy: list[float], macs: list[int], members: list[float]) -> Evaluation:
    others = [field.name for field in fields(EnsembleMetrics) if field.name not in ("num_models", "macs", "accuracy")]
    ensembles = [
        EnsembleMetrics(num_models=2**index, macs=cost, accuracy=value, **dict.fromkeys(others, 0.25 * index))
        for index, (value, cost) in enumerate(zip(accuracy, macs, strict=True))
    ]
    return Evaluation(ensembles=tuple(ensembles), member_accuracy=tuple(members), images=100)


def result(label: str, shift: float = 0.0, costs: tuple[int, ...] = (10, 15), **options: Any) -> Result:
    runs = [
        evaluation(
            [0.5 + shift + noise, 0.6 - shift][: len(costs)], [c * 10**6 for c in costs], [0.5, 0.4][: len(costs)]
        )
        for noise in (0.0, 0.02, 0.04)
    ]
    times = tuple(Estimate.of([0.1 * cost]) for cost in costs)
    return Result(label, TrainConfig.of(**options), tuple(runs), {"milliseconds": times})


@pytest.fixture
def objectives() -> PanelResult:
    """Networks of the same cost."""
    better = result("I+HD", 0.05)
    return PanelResult(1.0, (CurveResult("I", "I", (result("I"),)), CurveResult("I+HD", "I+HD", (better,))))


@pytest.fixture
def systems() -> PanelResult:
    """Networks of different costs, one of them without an ensemble."""
    single = CurveResult("single", "one network", tuple(result(f"width {w}", costs=(4 * w,)) for w in (1, 2)))
    return PanelResult(0.5, (CurveResult("HNE", "HNE", (result("HNE"),)), single))


def test_estimates() -> None:
    values = [0.5, 0.55, 0.75]
    assert Estimate.of(values) == Estimate(statistics.mean(values), statistics.stdev(values))
    assert Estimate.of(values).format(1, 100) == "60.0 ± 13.2"
    assert Estimate.of([0.5]).format(3) == "0.500"


def test_results_are_over_the_seeds(objectives: PanelResult) -> None:
    one, two = objectives.results[1].of_ensembles("accuracy")
    assert (one.mean, one.deviation) == pytest.approx((0.57, 0.02))
    assert (two.mean, two.deviation) == pytest.approx((0.55, 0.0))
    assert [e.mean for e in objectives.results[1].of_members()] == pytest.approx([0.5, 0.4])


def test_only_what_is_finished_is_collected() -> None:
    finished = {0: evaluation([0.5], [1], [0.5]), 2: evaluation([0.7], [1], [0.7])}
    table1 = study_panels(STUDIES["table1"], PAPER, [1.0])
    (panel,) = collect_results(table1, 3, lambda config: finished.get(config.seed) if config.objective == "H" else None)
    (curve,) = panel.curves
    assert curve.label == "H"
    assert curve.results[0].of_ensembles("accuracy")[0].mean == pytest.approx(0.6)


def test_table_of_the_same_costs(objectives: PanelResult) -> None:
    table = TABLES["accuracy"](objectives.results)
    assert table.columns == ("", "n = 1", "n = 2")
    assert table.rows == (("I", "52.00 ± 2.00", "60.00 ± 0.00"), ("I+HD", "57.00 ± 2.00", "55.00 ± 0.00"))
    assert table.markdown().splitlines() == [
        "|  | n = 1 | n = 2 |",
        "|---|---:|---:|",
        "| I | 52.00 ± 2.00 | **60.00 ± 0.00** |",
        "| I+HD | **57.00 ± 2.00** | 55.00 ± 0.00 |",
    ]
    assert TABLES["macs"](objectives.results).rows == (("all", "10.00", "15.00"),)
    assert TABLES["members"](objectives.results).rows[0] == ("I", "50.00 ± 0.00", "40.00 ± 0.00")


def test_table_of_different_costs(systems: PanelResult) -> None:
    table = TABLES["accuracy"](systems.results)
    assert table.rows[1] == ("width 1", "52.00 ± 2.00", "")
    assert not table.best, "the costs of a column differ"
    assert TABLES["diversity"](systems.results).rows == (("HNE", "", "0.250 ± 0.000"),)
    assert TABLES["macs"](systems.results).rows[2] == ("width 2", "8.00", "")


@pytest.mark.parametrize("name", list(STUDIES))
def test_reports(name: str, objectives: PanelResult, systems: PanelResult, tmp_path: Path) -> None:
    study = STUDIES[name]
    compared = [systems, replace(objectives, scale=0.5)] if study.figure in ("cost", "cost and time") else [objectives]
    written = write_report(tmp_path, name, study, compared, "so", "Three seeds.")
    assert [path.suffix for path in written] == [".md", ".csv", *((".png", ".svg") if study.figure else ())]
    text = written[0].read_text()
    assert text.startswith(f"# {study.title}: so\n\nThree seeds.\n")
    assert text.count("**Accuracy (%)**") == len(compared)
    assert ("## Width 0.5" in text) == (len(compared) > 1)
    with open(written[1]) as file:
        row = next(r for r in csv.DictReader(file) if (r["label"], r["quantity"], r["index"]) == ("I", "accuracy", "1"))
    assert (row["mean"], row["deviation"], row["seeds"], row["macs"]) == ("0.52", "0.02", "3", "10000000")
    for path in written[2:3]:
        with Image.open(path) as image:
            assert min(image.size) > 500
            assert len(image.convert("RGB").getcolors(10**6)) > 50, "something is drawn"


def test_same_results_give_the_same_files(objectives: PanelResult, tmp_path: Path) -> None:
    files = [write_report(tmp_path / sub, "figure9", STUDIES["figure9"], [objectives], "so", "") for sub in "ab"]
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("kind", list(FIGURES))
def test_figure_of_one_seed_and_one_network(kind: str, tmp_path: Path) -> None:
    alone = replace(result("I", costs=(3,)), evaluations=result("I", costs=(3,)).evaluations[:1])
    FIGURES[kind]([PanelResult(1.0, (CurveResult("I", "I", (alone,)),))], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_labels_are_spread() -> None:
    heights = [50.0, 51.0, 10.0, 52.0, 99.0]
    placed = _spread(heights, gap=10, top=100)
    assert placed[2] == 10
    assert max(placed) <= 100
    assert sorted(range(5), key=placed.__getitem__) == sorted(range(5), key=heights.__getitem__)
    ordered = sorted(placed)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 9.5

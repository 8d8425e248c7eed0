"""The paper's experiments: what they compare, their runs, and what is made of these."""

from __future__ import annotations

import csv
import itertools
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hne import OBJECTIVES
from hne.cli import main
from hne.cli import study as command
from hne.data import load_dataset
from hne.errors import CheckpointError, TrainingError
from hne.evaluation import EnsembleMetrics, Evaluation
from hne.experiments import STUDIES, CurveResult, Estimate, PanelResult, Result, collect, panels, recipes
from hne.experiments.designs import Choices
from hne.experiments.figures import FIGURES, _spread
from hne.experiments.report import write_report
from hne.experiments.runs import Progress, claimed, progress, run_name
from hne.experiments.tables import TABLES
from hne.training.config import Recipe
from hne.training.run_directory import SUMMARY
from hne.training.trainer import CHECKPOINT

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = Choices(Recipe.of(data="cifar100"))
SMALL = ["--limit-train", "24", "--limit-test", "30", "--batch-size", "8", "--scale", "0.25", "--threads", "1"]
SMALL += ["--num-models", "2", "--epochs", "2"]
FEW = ["--alphas", "0.5", "--widths", "1", "--seeds", "2"]


def curves(name: str, choices: Choices = PAPER, scale: float = 1.0) -> dict[str, tuple[Recipe, ...]]:
    (panel,) = panels(STUDIES[name], choices, [scale])
    return {curve.label: curve.recipes for curve in panel.curves}


# What is compared ---------------------------------------------------------------------------------------------------


def test_objectives_of_table1() -> None:
    found = curves("table1")
    assert tuple(found) == OBJECTIVES
    for objective, (recipe,) in found.items():
        usual = replace(PAPER.base, objective=objective, branches=(1, 2, 4, 8, 16), num_models=16)
        assert recipe == usual


def test_distillations_of_figure4() -> None:
    found = curves("figure4", replace(PAPER, alphas=(0.1, 0.5)))
    assert [(r.objective, r.alpha) for (r,) in found.values()] == [
        ("I", 0.5),
        ("I+D", 0.1),
        ("I+D", 0.5),
        ("I+HD", 0.5),
    ]
    assert "I+D, alpha 0.1" in found


def test_systems_of_figure5() -> None:
    found = curves("figure5", scale=0.5)
    assert {label: some[0].branches for label, some in found.items()} == {
        "HNE": (1, 2, 4, 8, 16),
        "independent networks": (16,) * 5,
        "multi-branch": (1, 1, 1, 16, 16),
        "one network": (1,) * 5,
    }
    assert [recipe.width for recipe in found["one network"]] == [0.25, 0.5, 1.0]
    assert {recipe.objective for recipe in found["one network"]} == {"I"}
    assert {recipe.objective for recipe in found["HNE"]} == {"I+HD"}


def test_studies_share_runs() -> None:
    hne = curves("figure5")["HNE"]
    assert curves("table1")["I+HD"] == curves("figure4")["I+HD"] == curves("figure9")["I+HD"] == hne
    assert curves("table1")["I+D"] == curves("figure4")["I+D, alpha 0.5"]
    everything = [panel for study in STUDIES.values() for panel in panels(study, PAPER, [1.0, 0.5])]
    needed = recipes(everything, 3)
    assert len(needed) == len(set(needed)) == 3 * (2 * (5 + 2 + 2) + 4), "one network: widths 0.25, 0.5, 1, 2"
    assert [recipe.seed for recipe in needed] == sorted(recipe.seed for recipe in needed)


def test_another_number_of_models() -> None:
    small = Choices(Recipe.of(data="digits", num_models=4))
    assert curves("table1", small)["I"][0].branches == (1, 1, 2, 4)
    assert curves("figure5", small)["multi-branch"][0].branches == (1, 1, 4, 4)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *({"data": "fashion-mnist"}, {"preset": "hne_small_resnet50_cifar"}, {"epochs": 3}, {"lr": 0.1}, {"seed": 1}),
        *({"alpha": 0.4}, {"temperature": 1.0}, {"width": 0.5}, {"width": 1.0000001}, {"num_models": 4}),
        *({"branches": (1, 1, 2, 4)}, {"limit_train": 9}, {"limit_test": 9}, {"amp": True}, {"augment": False}),
    ],
)
def test_every_option_changes_the_name(change: dict[str, Any]) -> None:
    recipe = Recipe.of()
    assert run_name(replace(recipe, **change)) != run_name(recipe)


def test_names_are_for_people_and_stay() -> None:
    recipe = Recipe.of(data="cifar100", branches=(1, 2, 4, 8, 16), objective="I+D", width=0.5, seed=2)
    assert run_name(recipe) == "cifar100-hne_resnet50_cifar-x0.5-1.2.4.8.16-I+D-alpha0.5-200ep-seed2-856d92db"


def test_progress_of_what_is_not_there(tmp_path: Path) -> None:
    assert progress(tmp_path / "none", Recipe.of(), load_dataset("digits")) == Progress(0)


def test_claim(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with claimed(folder), pytest.raises(TrainingError, match="another process trains here"), claimed(folder):
        pass
    with claimed(folder):
        pass


# Results ------------------------------------------------------------------------------------------------------------


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
    return Result(label, Recipe.of(**options), tuple(runs))


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
    compared = panels(STUDIES["table1"], PAPER, [1.0])
    (panel,) = collect(compared, 3, lambda recipe: finished.get(recipe.seed) if recipe.objective == "H" else None)
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
    compared = [systems, replace(objectives, scale=0.5)] if study.figure == "cost" else [objectives]
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


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two finished studies."""
    out = tmp_path_factory.mktemp("study")
    assert main(["study", "figure4", "figure5", "--out", str(out), "--quiet", *SMALL, *FEW]) == 0
    return out


def test_study_leaves_everything(done: Path) -> None:
    names = {path.name for path in done.iterdir()}
    assert names == {"runs", *(f"figure{number}.{kind}" for number in (4, 5) for kind in ("md", "csv", "png", "svg"))}
    assert len(list((done / "runs").glob("*/checkpoint.safetensors"))) == 2 * 6
    text = (done / "figure4.md").read_text()
    (line,) = re.findall(r"^hne study figure4 .*$", text, re.M)
    given = [*SMALL[: SMALL.index("--threads")], *SMALL[-4:], *FEW]
    assert sorted(line.split()[3:]) == sorted(given), "the command that makes it, without what changes nothing"
    assert "Preliminary" not in text


def test_report_agrees_with_the_runs(done: Path) -> None:
    with open(done / "figure5.csv") as file:
        rows = [row for row in csv.DictReader(file) if (row["label"], row["quantity"]) == ("multi-branch", "diversity")]
    summaries = [json.loads(path.read_text()) for path in (done / "runs").glob("*-1.1.2.2-I+HD*/summary.json")]
    assert len(summaries) == 2
    for index, row in enumerate(rows):
        values = [summary["evaluation"]["ensembles"][index]["diversity"] for summary in summaries]
        assert float(row["mean"]) == pytest.approx(statistics.mean(values), rel=1e-4)
        assert float(row["deviation"]) == pytest.approx(statistics.stdev(values), rel=1e-4)
        assert row["macs"] == str(summaries[0]["evaluation"]["ensembles"][index]["macs"])


def test_nothing_is_trained_twice(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").glob("digits*/*")}
    runs = ["--runs", str(done / "runs"), "--out", str(tmp_path)]
    assert main(["study", "figure4", "figure5", "figure9", *runs, *SMALL, *FEW]) == 0
    out = capsys.readouterr().out
    assert "12 runs: 12 finished, 0 begun, 0 to start" in out
    assert "epoch" not in out.partition("results in")[2]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for path in done.glob("figure*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert "Accuracy of each network by itself" in (tmp_path / "figure9.md").read_text()


def test_dry_run(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = ["study", "table1", "--dry-run", "--out", str(tmp_path), *SMALL, *FEW]
    assert main([*dry, "--runs", str(done / "runs")]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r" 2/2 +finished +0\.000 T", out)) == 6
    assert len(re.findall(r" 0/2 +to start ", out)) == 4
    assert "Preliminary: 4 of 10 runs are missing." in (tmp_path / "table1.md").read_text()
    assert main(dry) == 0
    assert "table1: nothing is finished yet" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_interrupted_study_goes_on(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_into = command.train_into

    def cut(folder: Path, *args: Any, **options: Any) -> Iterator[Any]:
        for row in train_into(folder, *args, **options):
            yield row
            if "I+D" in folder.name:
                raise KeyboardInterrupt

    monkeypatch.setattr(command, "train_into", cut)
    study = ["study", "figure9", "--out", str(tmp_path), *SMALL, "--seeds", "1"]
    assert main(study) == 130
    monkeypatch.setattr(command, "train_into", train_into)
    capsys.readouterr()
    assert main(study) == 0
    out = capsys.readouterr().out
    assert "3 runs: 1 finished, 1 begun, 1 to start" in out
    assert re.search(r"^run 1/2 .*I\+D.*\n  epoch 2/2  loss .* img/s  \d+ s left$", out, re.M)
    for path in (tmp_path / "runs").glob("digits*"):
        evaluations = [json.loads((f / SUMMARY).read_text())["evaluation"] for f in (path, done / "runs" / path.name)]
        assert evaluations[0] == evaluations[1], "as without the interruption"


def test_failed_runs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "figure9", "--out", str(tmp_path), *SMALL, "--seeds", "1", "--lr", "1e20"]) == 2
    out, err = capsys.readouterr()
    assert out.count("  failed: the loss is ") == 3
    assert "figure9: nothing is finished yet" in out
    assert err.startswith("hne: error: 3 of 3 runs failed: digits-hne_tiny-x0.25-1.1.1.2-I-2ep-seed0-")


def test_foreign_runs_are_refused(done: Path, tmp_path: Path) -> None:
    dataset = load_dataset("digits", limit_train=24, limit_test=30)
    (folder,) = (done / "runs").glob("*1.1.1.2-I-2ep-seed0*")
    recipe = Recipe.from_dict(json.loads((folder / SUMMARY).read_text())["recipe"])
    assert progress(folder, recipe, dataset).evaluation is not None
    with pytest.raises(CheckpointError, match=r"of another run: recipe lr was 0\.05, now it is 0\.2"):
        progress(folder, replace(recipe, lr=0.2), dataset)
    with pytest.raises(CheckpointError, match="of another run: data train was 24, now it is 20"):
        progress(folder, recipe, load_dataset("digits", limit_train=20, limit_test=30))
    (tmp_path / CHECKPOINT).write_bytes((folder / CHECKPOINT).read_bytes())
    assert progress(tmp_path, recipe, dataset) == Progress(2)
    with pytest.raises(CheckpointError, match="of another run: recipe seed was 0, now it is 1"):
        progress(tmp_path, replace(recipe, seed=1), dataset)
    (tmp_path / SUMMARY).write_text('{"recipe": {}}')
    with pytest.raises(
        CheckpointError, match=rf"written by another version of hne .*; remove {tmp_path} to train anew"
    ):
        progress(tmp_path, recipe, dataset)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alphas", "0.5,2"], "alpha must lie between 0 and 1, got 2.0"),
        (["--scale", "0"], "width must be a positive number, got 0.0"),
        (["--num-models", "3"], "a power of two of at most 8 models, got num_models = 3"),
        (["--temperature", "0"], "temperature must be a positive number, got 0.0"),
    ],
)
def test_bad_options_are_told_at_once(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "figure4", "--out", str(tmp_path / "new"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["table2"], "invalid choice: 'table2'"),
        (["table1", "--scale", "1,one"], "expected different numbers with commas between them, got '1,one'"),
        (["table1", "--scale", "1,1.0"], "expected different numbers with commas between them, got '1,1.0'"),
        (["table1", "--alphas", "nan"], "expected different numbers with commas between them, got 'nan'"),
        ([], "required: STUDY"),
    ],
)
def test_bad_usage(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["study", *flags])
    assert message in capsys.readouterr().err

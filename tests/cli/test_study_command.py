"""``hne study``: reports, shared and interrupted runs, and errors."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hne.cli import main, training_runs
from hne.data import load_dataset
from hne.errors import CheckpointError
from hne.experiments import RunState, read_run_state
from hne.files import lock_folder
from hne.training import CHECKPOINT, SUMMARY, TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--limit-train", "24", "--limit-test", "30", "--batch-size", "8", "--scale", "0.25", "--threads", "1"]
SMALL += ["--num-models", "2", "--epochs", "2"]
FEW = ["--alphas", "0.5", "--widths", "1", "--seeds", "2"]


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


def test_some_objectives_on_images_that_are_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run needs no more than its summary, and says which images it was tested on."""
    command = ["study", "table1", "--objectives", "I,I+H", "--val-share", "0.1", "--out", str(tmp_path), *SMALL]
    command += ["--seeds", "1", "--quiet"]
    assert main(command) == 0
    text = (tmp_path / "table1.md").read_text()
    assert re.findall(r"^\| (I\S*) \|", text, re.M) == ["I", "I+H"]
    assert "30 test images (held out: 0.1 of each class, split seed 0)" in text
    assert "--objectives I,I+H" in text
    assert "--val-share 0.1" in text
    for checkpoint in (tmp_path / "runs").glob(f"*/{CHECKPOINT}"):
        checkpoint.unlink()
    capsys.readouterr()
    assert main(command[:-1]) == 0
    assert "2 runs: 2 finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["study", "table1", "--objectives", "I,HD"])
    assert "expected different objectives of I, H, I+H, I+D, I+HD" in capsys.readouterr().err


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
    train_into = training_runs.train_into

    def cut(folder: Path, *args: Any, **options: Any) -> Iterator[Any]:
        for row in train_into(folder, *args, **options):
            yield row
            if "I+D" in folder.name:
                raise KeyboardInterrupt

    monkeypatch.setattr(training_runs, "train_into", cut)
    study = ["study", "figure9", "--out", str(tmp_path), *SMALL, "--seeds", "1"]
    assert main(study) == 130
    monkeypatch.setattr(training_runs, "train_into", train_into)
    capsys.readouterr()
    assert main(study) == 0
    out = capsys.readouterr().out
    assert "3 runs: 1 finished, 1 begun, 1 to start" in out
    assert re.search(r"^run 1/2 .*I\+D.*\n  epoch 2/2  loss .* img/s  \d+ s left$", out, re.M)
    for path in (tmp_path / "runs").glob("digits*"):
        evaluations = [json.loads((f / SUMMARY).read_text())["evaluation"] for f in (path, done / "runs" / path.name)]
        assert evaluations[0] == evaluations[1], "as without the interruption"


def test_studies_at_once_share_the_runs(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that another process trains is left to it, and one that another has finished meanwhile is not repeated."""
    train_into = training_runs.train_into
    trained: list[str] = []

    def meanwhile(folder: Path, *args: Any, **options: Any) -> Iterator[Any]:
        if not trained:
            finished = next((done / "runs").glob("*-1.1.1.2-I+HD-*-seed0-*"))
            shutil.copytree(finished, folder.parent / finished.name)
        for row in train_into(folder, *args, **options):
            trained.append(folder.name)
            yield row

    monkeypatch.setattr(training_runs, "train_into", meanwhile)
    study = ["study", "figure9", "--out", str(tmp_path), *SMALL, "--seeds", "1"]
    other = next((done / "runs").glob("*-1.1.1.2-I+D-*-seed0-*")).name
    with lock_folder(tmp_path / "runs" / other):
        assert main(study) == 0
    out = capsys.readouterr().out
    assert {name.partition("1.1.1.2-")[2].partition("-")[0] for name in trained} == {"I"}
    assert f"left to another process: {other}\n" in out
    assert re.search(r"^run 2/3  .*-I\+HD-.*: finished$", out, re.M)
    assert "1 run(s) left to other processes" in out
    assert "Preliminary: 1 of 3 runs are missing." in (tmp_path / "figure9.md").read_text()
    assert main(study) == 0
    assert "Preliminary" not in (tmp_path / "figure9.md").read_text()


def test_failed_runs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "figure9", "--out", str(tmp_path), *SMALL, "--seeds", "1", "--lr", "1e20"]) == 2
    out, err = capsys.readouterr()
    assert out.count("  failed: the loss is ") == 3
    assert "figure9: nothing is finished yet" in out
    assert err.startswith("hne: error: 3 of 3 runs failed: digits-hne_tiny-x0.25-1.1.1.2-I-2ep-seed0-")


def test_other_runs_are_refused(done: Path, tmp_path: Path) -> None:
    dataset = load_dataset("digits", limit_train=24, limit_test=30)
    (folder,) = (done / "runs").glob("*1.1.1.2-I-2ep-seed0*")
    config = TrainConfig.from_dict(json.loads((folder / SUMMARY).read_text())["recipe"])
    assert read_run_state(folder, config, dataset).evaluation is not None
    with pytest.raises(CheckpointError, match=r"of another run: option lr was 0\.05, now it is 0\.2"):
        read_run_state(folder, replace(config, lr=0.2), dataset)
    with pytest.raises(CheckpointError, match="of another run: data train was 24, now it is 20"):
        read_run_state(folder, config, load_dataset("digits", limit_train=20, limit_test=30))
    (tmp_path / CHECKPOINT).write_bytes((folder / CHECKPOINT).read_bytes())
    assert read_run_state(tmp_path, config, dataset) == RunState(2)
    with pytest.raises(CheckpointError, match="of another run: option seed was 0, now it is 1"):
        read_run_state(tmp_path, replace(config, seed=1), dataset)
    (tmp_path / SUMMARY).write_text('{"recipe": {}}')
    with pytest.raises(
        CheckpointError, match=rf"written by another version of hne .*; remove {tmp_path} to train anew"
    ):
        read_run_state(tmp_path, config, dataset)


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


def test_rivals_are_trained_timed_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "figure6", "--out", str(tmp_path), *SMALL, "--widths", "1", "--seeds", "1", "--rounds", "1"]
    assert main([*command, "--quiet"]) == 0
    first = capsys.readouterr().out
    with open(tmp_path / "figure6.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] in ("accuracy", "milliseconds")]
    points = {(row["label"], row["index"]) for row in rows}
    assert len(rows) == 2 * len(points), "every point has an accuracy and a time"
    systems = {label.split(",")[0]: sum(other == label for other, _ in points) for label, _ in points}
    assert systems == {"HNE": 2, "early exits": 4, "MSDNet": 7, "slimmable": 1, "one network": 1}
    assert {label for label, _ in points if label.startswith("slim")} == {
        f"slimmable, width {0.25 * width:g}" for width in (0.25, 0.5, 0.75, 1)
    }
    assert all(float(row["mean"]) > 0 for row in rows if row["quantity"] == "milliseconds")
    assert main(command) == 0
    assert "7 runs: 7 finished" in capsys.readouterr().out
    assert "Time of a call for one image (ms)" in first

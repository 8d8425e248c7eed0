"""``hne compare``: reports, repeated and interrupted comparisons, and errors."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hne.cli import main, training_runs
from hne.experiments import comparison
from hne.models import checkpoint
from hne.training import CHECKPOINT, SUMMARY

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--limit-train", "24", "--limit-test", "30", "--batch-size", "8", "--width", "0.25", "--num-models", "4"]
SMALL += ["--epochs", "4", "--fine-tune-epochs", "2", "--rounds", "2"]
REPEATED = ["--seeds", "2", "--ood", "fashion-mnist"]
LABELS = [
    "one network",
    "HNE of 4 from it",
    "one network, trained on",
    "deep ensemble of 4",
    "deep ensemble of 2",
    "MC dropout",
]


def values(folder: Path) -> dict[tuple[str, str, int], dict[str, str]]:
    """The rows of the CSV by label, quantity and ensemble size."""
    with open(folder / "compare.csv") as file:
        return {(row["label"], row["quantity"], int(row["index"])): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison."""
    out = tmp_path_factory.mktemp("compare")
    assert main(["compare", "--out", str(out), "--quiet", *SMALL, *REPEATED, "--threads", "1"]) == 0
    return out


def test_report(done: Path) -> None:
    names = {path.name for path in done.iterdir()}
    assert names == {"runs", *(f"compare.{kind}" for kind in ("md", "csv", "png", "svg"))}
    assert len(list((done / "runs").glob("*/checkpoint.safetensors"))) == 2 * len(LABELS)
    text = (done / "compare.md").read_text()
    (line,) = re.findall(r"^hne compare .*$", text, re.M)
    given = [word for word in (*SMALL, *REPEATED) if word != "2" and word != "--fine-tune-epochs"]  # 2 is the default
    assert sorted(word for word in line.split()[2:] if word != "2") == sorted(given), "what makes it, and no more"
    for title in ("Accuracy", "Negative log-likelihood", "Expected calibration error", "AUROC", "Cost", "Milliseconds"):
        assert f"\n**{title}" in text
    assert text.count("\n| MC dropout | ") == 8
    with Image.open(done / "compare.png") as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 50, "something is drawn"


def test_all_systems_and_sizes(done: Path) -> None:
    rows = values(done)
    sizes = {label: [n for found, quantity, n in rows if (found, quantity) == (label, "nll")] for label in LABELS}
    assert list(sizes.values()) == [[1], [1, 2, 3, 4], [1], [1, 2, 3, 4], [1, 2], [1, 2, 3, 4]]
    for quantity in ("accuracy", "nll", "ece", "auroc", "milliseconds_1", "milliseconds_64"):
        row = rows["HNE of 4 from it", quantity, 3]
        assert float(row["mean"]) > 0
        assert row["seeds"] == ("1" if "milliseconds" in quantity else "2")
    macs = {label: int(rows[label, "nll", 1]["macs"]) for label in LABELS}
    assert len(set(macs.values())) == 1
    for label, n in (("deep ensemble of 4", 4), ("deep ensemble of 2", 2), ("MC dropout", 3)):
        assert int(rows[label, "nll", n]["macs"]) == n * macs[label]


def test_it_agrees_with_the_runs(done: Path) -> None:
    """Mean logits of an HNE, and single networks: as in the summaries."""
    rows = values(done)
    for label, pattern, sizes in (
        ("HNE of 4 from it", "*-1.1.2.4-I+HD*", (1, 2, 4)),
        ("deep ensemble of 2", "*-2.2.2.2-I*", (1,)),
    ):
        summaries = [json.loads(path.read_text()) for path in (done / "runs").glob(f"{pattern}/{SUMMARY}")]
        assert len(summaries) == 2
        for index, n in enumerate(sizes):
            found = [summary["evaluation"]["ensembles"][index]["nll"] for summary in summaries]
            assert float(rows[label, "nll", n]["mean"]) == pytest.approx(statistics.mean(found), rel=1e-4)
            assert float(rows[label, "nll", n]["deviation"]) == pytest.approx(statistics.stdev(found), rel=1e-4)


def test_nothing_is_trained_twice(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All results but the times are repeated, those of dropout, too."""
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").glob("digits*/checkpoint*")}
    assert main(["compare", "--out", str(tmp_path), "--runs", str(done / "runs"), *SMALL, *REPEATED]) == 0
    out = capsys.readouterr().out
    assert out.count(": finished") == 2 * len(LABELS)
    assert "epoch 1" not in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    one, two = values(done), values(tmp_path)
    assert one.keys() == two.keys()
    assert all(one[key] == two[key] for key in one if "milliseconds" not in key[1])


def test_interrupted_comparison_goes_on(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the fine-tuning, to the same networks."""
    train_into = training_runs.train_into

    def cut(folder: Path, *args: Any, **options: Any) -> Iterator[Any]:
        for row in train_into(folder, *args, **options):
            yield row
            if "I+HD" in folder.name:
                raise KeyboardInterrupt

    command = ["compare", "--out", str(tmp_path), "--threads", "1", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(training_runs, "train_into", cut)
        assert main(command) == 130
    assert "the same command, given again, continues after the last saved epoch" in capsys.readouterr().err
    assert not (tmp_path / "compare.md").exists()
    assert main(command) == 0
    assert "epoch 2/2" in capsys.readouterr().out
    runs = list((tmp_path / "runs").glob("*/" + CHECKPOINT))
    assert len(runs) == len(LABELS)
    for path in runs:
        same = checkpoint.load(done / "runs" / path.parent.name / CHECKPOINT)[0]
        tensors = checkpoint.load(path)[0]
        assert tensors.keys() == same.keys()
        assert all(bool((tensors[name] == same[name]).all()) for name in same), path
    assert "AUROC" not in (tmp_path / "compare.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "diabetes"], "data: expected a data set with classes, got diabetes"),
        (["--dropout", "1"], "dropout: expected a number above 0 and below 1, got 1.0"),
        (["--num-models", "1"], "num_models: expected at least 2"),
        (["--num-models", "6"], "doubling tree"),
        (["--ood", "nowhere"], "nowhere"),
    ],
)
def test_errors_come_before_the_training(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob(CHECKPOINT))


def test_times_are_positive_and_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        comparison, "alternating_seconds", lambda given, *_: [calls.append(call()) or 0.5 for call in given]
    )
    from hne import FusedHNE
    from hne.data import load_dataset

    model = FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1, width=0.25, num_models=2)
    (times,) = comparison.measure_times([model], load_dataset("digits", limit_test=5), rounds=1)
    assert {name: [e.mean for e in found] for name, found in times.items()} == {
        "milliseconds_1": [500, 500],
        "milliseconds_64": [500, 500],
    }
    assert [tuple(logits.shape) for logits in calls] == [(1, 1, 10), (2, 1, 10), (1, 64, 10), (2, 64, 10)]

"""``hne distill``: students of a checkpoint, of a file of logits and of a regression, and their comparison."""

from __future__ import annotations

import csv
import json
import re
import timeit
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from students import DIGITS, random_outputs

from hne import Hierarchy
from hne.cli import main
from hne.models import checkpoint
from hne.reporting import comparison
from hne.training import CHECKPOINT
from hne.training.distillation import HYDRA

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_FLAGS = ["--limit-train", "64", "--limit-test", "40", "--batch-size", "16", "--width", "0.5", "--quiet"]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are taken from one call."""
    monkeypatch.setattr(comparison, "seconds_per_call", lambda call, at_least: timeit.timeit(call, number=1))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of independent networks."""
    out = tmp_path_factory.mktemp("teacher")
    tree = ["--branches", "3,3,3,3", "--objective", "I", "--epochs", "1"]
    assert main(["train", "--out", str(out), *tree, *SMALL_FLAGS]) == 0
    return out


def table_of(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "comparison.csv") as file:
        return {row["system"]: row for row in csv.DictReader(file)}


@pytest.mark.usefixtures("_quick")
def test_command(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["distill", str(teacher), "--out", str(tmp_path), "--epochs", "2", "--first-phase", "1", "--compare"]
    flags += ["--ood", "digits", *SMALL_FLAGS]
    assert main(flags) == 0
    out = capsys.readouterr().out
    rows = table_of(tmp_path)
    assert list(rows) == ["teacher", "hydra", "distilled", "alone"]
    assert [row["networks"] for row in rows.values()] == ["3", "3", "1", "1"]
    values = {system["name"]: system for system in json.loads((tmp_path / "comparison.json").read_text())["systems"]}
    for name, row in rows.items():
        whole = values[name]["evaluation"]["ensembles"][-1]
        assert float(row["accuracy (%)"]) == pytest.approx(100 * whole["accuracy"], abs=0.01)
        assert float(row["MI"]) == pytest.approx(whole["mutual_information"], abs=1e-4)
        assert float(row["ms for 64"]) > 0
        assert re.search(rf"^ *{name} +{row['networks']} +{row['accuracy (%)']} ", out, re.M)
        assert row["accuracy (%)"] in (tmp_path / "comparison.md").read_text()
    assert int(rows["hydra"]["parameters"].replace(",", "")) < int(rows["teacher"]["parameters"].replace(",", ""))
    model, config = checkpoint.load_model(tmp_path / "hydra" / CHECKPOINT)
    assert model.hierarchy == Hierarchy.multi_head(4, 3)
    assert config["recipe"]["objective"] == HYDRA
    assert main(["eval", str(tmp_path / "hydra"), "--limit-test", "40", "--quiet"]) == 0

    before = {path: path.read_bytes() for path in tmp_path.rglob(CHECKPOINT)}
    assert len(before) == 4
    assert main(flags) == 2
    assert "has a run already: --resume continues it" in capsys.readouterr().err
    (tmp_path / "alone" / CHECKPOINT).unlink()
    assert main([*flags, "--resume"]) == 0
    (tmp_path / "alone" / CHECKPOINT).unlink()
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists()), "the rest stays"
    assert main([*flags, "--resume", "--lr", "0.3"]) == 2
    assert "of another run: option lr was 0.05, now it is 0.3" in capsys.readouterr().err


@pytest.mark.usefixtures("_quick")
def test_command_with_known_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "logits.safetensors"
    save_file({"train": random_outputs(), "test": random_outputs(count=40)}, path)
    flags = ["distill", str(path), "--preset", "hne_tiny", "--own-blocks", "1", "--epochs", "1", *SMALL_FLAGS]
    assert main([*flags, "--out", str(tmp_path / "a"), "--data", "digits"]) == 0
    rows = table_of(tmp_path / "a")
    assert list(rows) == ["teacher", "hydra"]
    assert rows["teacher"]["parameters"] == ""
    answers = random_outputs(count=40).mean(0).argmax(-1)
    right = (answers == DIGITS.test.labels).double().mean().item()
    assert float(rows["teacher"]["accuracy (%)"]) == pytest.approx(100 * right, abs=0.01)
    assert checkpoint.load_model(tmp_path / "a" / "hydra" / CHECKPOINT)[0].hierarchy == Hierarchy((1, 1, 1, 3))
    np.save(tmp_path / "logits.npy", random_outputs().numpy())
    flags[1] = str(tmp_path / "logits.npy")
    assert main([*flags, "--out", str(tmp_path / "b"), "--data", "digits"]) == 0
    assert list(table_of(tmp_path / "b")) == ["hydra"]
    capsys.readouterr()
    for change, message in (
        ([], "--data: expected the data set that the logits are for"),
        (["--data", "digits", "--limit-train", "50"], "expected the outputs for the 50 images of digits"),
        (["--data", "digits", "--own-blocks", "9"], "own_blocks: expected 0 to 3"),
    ):
        assert main([*flags, "--out", str(tmp_path / "c"), *change]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("_quick")
def test_command_of_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--epochs", "1", "--quiet", "--threads", "1"]
    assert main(["train", "--data", "diabetes", "--branches", "2,2,2,2", "--out", str(tmp_path / "t"), *common]) == 0
    distill = ["distill", str(tmp_path / "t"), "--out", str(tmp_path / "h"), "--compare", *common]
    assert main(distill) == 0
    rows = table_of(tmp_path / "h")
    assert list(rows) == ["teacher", "hydra", "distilled", "alone"]
    assert all(float(row["RMSE"]) > 30 and float(row["NLL"]) > 4 for row in rows.values())
    assert "accuracy (%)" not in rows["hydra"]
    capsys.readouterr()
    assert main([*distill, "--overwrite", "--ood", "digits"]) == 2
    assert "expected permuted or scaled for diabetes, got 'digits'" in capsys.readouterr().err
    assert main([*distill, "--resume", "--ood", "scaled"]) == 0
    assert "OOD: scaled measurements" in (tmp_path / "h" / "comparison.md").read_text()
    values = {
        system["name"]: system for system in json.loads((tmp_path / "h" / "comparison.json").read_text())["systems"]
    }
    for name, row in table_of(tmp_path / "h").items():
        evaluation, ood = values[name]["evaluation"]["ensembles"][-1], values[name]["ood"]
        assert float(row["coverage error"]) == pytest.approx(evaluation["coverage_error"], abs=1e-4)
        assert float(row["AUROC (%)"]) == pytest.approx(100 * ood["by_deviation"]["auroc"], abs=0.01)
        assert float(row["AUROC of diversity (%)"]) == pytest.approx(100 * ood["by_diversity"]["auroc"], abs=0.01)


def test_command_errors(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ([str(tmp_path / "none")], "no such file: expected a run of `hne train`, or a file of logits"),
        ([str(tmp_path)], "no such checkpoint"),
        ([str(teacher), "--data", "diabetes"], "does not fit diabetes"),
        ([str(teacher), "--epochs", "2", "--first-phase", "2"], "first_phase: expected less than the 2 epochs"),
    ):
        assert main(["distill", *argv, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""The command line: every command on a small run, and what it says when something is wrong."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_graphs import emulate
from PIL import Image

import hne
from hne import AnytimePredictor
from hne.cli import main
from hne.data import CORRUPTIONS, load_dataset
from hne.evaluation import InferenceSides
from hne.inference import engines, export
from hne.models.checkpoint import load_model
from hne.training import CHECKPOINT

COMMANDS = (
    "train",
    "study",
    "compare",
    "distill",
    "eval",
    "calibrate",
    "quantize",
    "anytime",
    "bench",
    "info",
    "export",
)
SMALL = ("--limit-train", "64", "--limit-test", "40", "--batch-size", "32", "--width", "0.5", "--threads", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run")
    assert main(["train", "--out", str(out), "--epochs", "2", "--eval-every", "2", "--quiet", *SMALL]) == 0
    return out


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that fails: one line, after which the exit code is 2."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("hne: error: ")
    assert err.count("\n") == 1
    return err


# Help ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"hne {command}" in text
    assert "examples:" in text


def test_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "hne", "--help"], capture_output=True, text=True, check=True)
    assert all(re.search(rf"^ +{command} ", result.stdout, re.M) for command in COMMANDS)
    assert "start here" in result.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--objective", "J"], "invalid choice: 'J'"),
        (["train", "--epochs", "0"], "argument --epochs: expected a whole number above 0, got '0'"),
        (["train", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["train", "--resume", "--overwrite"], "not allowed with argument --resume"),
        (["anytime", "run", "--deadline-ms", "0"], "expected a number above 0, got '0'"),
        (["anytime", "run", "--confidence", "sure"], "expected a number above 0, got 'sure'"),
        (["bench", "--batch-sizes", "1,two"], "expected a whole number above 0, got 'two'"),
        (["bench", "--against", "eager,numpy"], "expected names of eager, compile, onnxruntime, openvino, got 'numpy'"),
    ],
)
def test_bad_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


# Train --------------------------------------------------------------------------------------------------------------


def test_train_leaves_everything(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == ["accuracy.png", CHECKPOINT, "log.csv", "summary.json"]
    with open(run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[0]["accuracy_8"] == ""
    assert 0 <= float(rows[1]["accuracy_8"]) <= 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["recipe"]["limit_train"] == 64
    assert [e["num_models"] for e in summary["evaluation"]["ensembles"]] == [1, 2, 4, 8]
    with Image.open(run / "accuracy.png") as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(10**6)) > 50, "something is drawn"


def test_train_by_cuda_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The graphs are emulated. A resumed run keeps the option, and needs a GPU as well."""
    flags = ["train", "--out", str(tmp_path / "run"), "--quiet", "--device", "cpu"]
    options = ["--epochs", "2", "--cuda-graph", *SMALL]
    assert error_of(capsys, *flags, *options) == "hne: error: cuda_graph: needs a GPU, got cpu\n"
    assert not (tmp_path / "run").exists()
    with pytest.MonkeyPatch.context() as patch:
        graphs = emulate(patch)
        assert main([*flags, *options]) == 0
        assert graphs.captures == 1
        assert main([*flags, "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["recipe"]["cuda_graph"] is True
    assert "cuda_graph: needs a GPU" in error_of(capsys, *flags, "--resume")


def test_train_talks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path), "--epochs", "2", "--eval-every", "1", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert err == "", "no progress bar where there is no terminal"
    assert "hne_tiny: 8 models" in out
    assert "digits: 64 training and 40 test images, 10 classes" in out
    assert re.search(r"^epoch 1/2  loss [\d.]+  lr 0\.05  \d+ img/s$", out, re.M)
    assert len(re.findall(r"^ *n +MACs +accuracy +NLL *$", out, re.M)) == 2
    assert len(re.findall(r"^ *(1|2|4|8) +[\d.]+ M +[\d.]+% +[\d.]+ *$", out, re.M)) == 8


def test_terminal_gets_a_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    flags = ["--epochs", "1", "--overwrite", "--out", str(tmp_path), *SMALL]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", *flags]) == 0
    assert "epoch 1/1" in terminal.getvalue()
    assert "img/s" in terminal.getvalue()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", "--quiet", *flags]) == 0
    assert terminal.getvalue() == ""


def test_finished_run_resumes_to_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["train", "--out", str(run), "--resume", "--threads", "1"]) == 0
    assert "resumed after epoch 2" in capsys.readouterr().out
    for name in (CHECKPOINT, "log.csv"):
        assert (run / name).read_bytes() == before[name]


def test_nothing_to_resume_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "new"), "--resume", "--epochs", "1", *SMALL]) == 0
    assert "nothing to resume yet" in capsys.readouterr().out


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        assert main(["train", "--out", str(tmp_path), "--overwrite", "--seed", seed, "--epochs", "1", *SMALL]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["recipe"]["seed"] == 2


def test_train_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has a run already: --resume continues it" in error_of(capsys, "train", "--out", str(run))
    resume = ("train", "--out", str(run), "--resume")
    assert "the run has lr = 0.05, got 0.7" in error_of(capsys, *resume, "--lr", "0.7")
    assert "the run has naive = False, got True" in error_of(capsys, *resume, "--naive")
    new = ("train", "--out", str(tmp_path / "new"))
    assert "found none of" in error_of(capsys, *new, "--data", "cifar10", "--data-dir", str(tmp_path))
    assert "lr: expected a number above 0, got -1.0" in error_of(capsys, *new, "--lr", "-1")
    assert "alpha must lie between 0 and 1" in error_of(capsys, *new, "--alpha", "2")
    assert "a power of two of at most 8 models" in error_of(capsys, *new, "--num-models", "16")
    assert "must divide the next" in error_of(capsys, *new, "--branches", "1,2,3,4")
    assert not (tmp_path / "new").exists()
    (run / CHECKPOINT).rename(tmp_path / "good")
    try:
        (run / CHECKPOINT).write_bytes(b"not much")
        assert "not a safetensors file" in error_of(capsys, *resume)
    finally:
        (tmp_path / "good").rename(run / CHECKPOINT)


def test_unusable_device_and_backend(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "sees no GPU" in error_of(capsys, "eval", str(run), "--device", "cuda")
    assert "backend 'cuda' is not available" in error_of(capsys, "eval", str(run), "--backend", "cuda")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lr: expected"):
        main(["train", "--out", str(tmp_path), "--lr", "-1", "--debug"])


# Eval ---------------------------------------------------------------------------------------------------------------


def test_eval_agrees_with_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((run / "summary.json").read_text())["evaluation"]["ensembles"]
    for flags in (
        ["--limit-test", "40"],
        ["--limit-test", "40", "--naive"],
        ["--limit-test", "40", "--batch-size", "7"],
    ):
        assert main(["eval", str(run), *flags]) == 0
        rows = re.findall(r"^ *(\d+) +([\d.]+) M +([\d.]+)% +([\d.]+) *$", capsys.readouterr().out, re.M)
        for row, ensemble in zip(rows, expected, strict=True):
            assert int(row[0]) == ensemble["num_models"]
            assert float(row[2]) == pytest.approx(100 * ensemble["accuracy"], abs=0.01)
            assert float(row[3]) == pytest.approx(ensemble["nll"], abs=2e-4)


def test_eval_shows_and_writes_every_figure(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(3):
        Image.new("RGB", (20, 30), (80 * index, 10, 200)).save(tmp_path / f"{index}.png")
    path = tmp_path / "figures.json"
    assert main(["eval", str(run), "--limit-test", "40", "--ood", str(tmp_path), "--json", str(path)]) == 0
    out = capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert f"3 OOD images of {tmp_path} against those of digits" in out
    for ensemble, ood in zip(figures["evaluation"]["ensembles"], figures["ood"]["ensembles"], strict=True):
        n = ensemble["num_models"]
        assert re.search(rf"^ *{n} +{ensemble['brier']:.4f} +{ensemble['ece']:.4f} ", out, re.M)
        by_entropy, by_energy = (
            f"{found['auroc']:.2%} +{found['aupr']:.2%} +{found['fpr95']:.2%}"
            for found in (ood["by_entropy"], ood["by_energy"])
        )
        assert re.search(rf"^ *{n} +entropy +{ood['entropy']:.4f} +{by_entropy} *$", out, re.M)
        assert re.search(rf"^ *energy +{by_energy} *$", out, re.M)


def test_eval_on_corrupted_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    argv = ["eval", str(run), "--limit-test", "40", "--average", "probabilities", "--json", str(path), "--corruptions"]
    assert main([*argv, "all", "--severities", "2,5"]) == 0
    out = capsys.readouterr().out
    figures = json.loads(path.read_text())
    found = figures["corruptions"]["evaluations"]
    assert [(f["corruption"], f["severity"]) for f in found] == [(name, s) for name in CORRUPTIONS for s in (2, 5)]
    for index, clean in enumerate(figures["evaluation"]["ensembles"]):
        n, errors = clean["num_models"], [1 - f["evaluation"]["ensembles"][index]["accuracy"] for f in found]
        by_severity = (f"{sum(part) / len(part):.2%}" for part in (errors[::2], errors[1::2], errors))
        cells = (f"{1 - clean['accuracy']:.2%}", *by_severity)
        assert re.search(rf"^ *{n} +{' +'.join(cells)} +[\d.]+ +[\d.]+ *$", out, re.M), out
    first = [f["evaluation"]["ensembles"][0] for f in found[:2]]
    means = [f"{(first[0][metric] + first[1][metric]) / 2:.4f}" for metric in ("nll", "ece")]
    assert re.search(rf"^ *gaussian_noise +1 +[\d.]+% +{' +'.join(means)} *$", out, re.M), out
    assert out.count("ensembles average probabilities") == 4
    np.save(tmp_path / "labels.npy", np.arange(50) % 10)
    np.save(tmp_path / "fog.npy", np.full((50, 8, 8, 1), 100, np.uint8))
    assert main([*argv, str(tmp_path)]) == 0
    assert len(json.loads(path.read_text())["corruptions"]["evaluations"]) == 5
    assert "rain: no such folder" in error_of(capsys, *argv, "rain")
    assert "severities: expected some of 1, 2, 3, 4, 5, got [7]" in error_of(capsys, *argv, "all", "--severities", "7")


def test_commands_average_logits_or_probabilities(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "figures.json", tmp_path / "run"
    shutil.copytree(run, folder)
    nll = {}
    for average in ("logits", "probabilities"):
        assert main(["eval", str(folder), "--average", average, "--limit-test", "40", "--json", str(path)]) == 0
        assert capsys.readouterr().out.count(f"ensembles average {average}") == 2
        nll[average] = [e["nll"] for e in json.loads(path.read_text())["evaluation"]["ensembles"]]
    assert nll["logits"][0] == pytest.approx(nll["probabilities"][0], rel=1e-5), "of one member"
    assert nll["logits"][-1] != nll["probabilities"][-1]
    assert main(["calibrate", str(folder), "--average", "probabilities", "--limit-test", "40"]) == 0
    assert "ensembles average probabilities" in capsys.readouterr().out
    assert hne.load(folder).metadata["calibration"]["average"] == "probabilities"
    for flags, average in (([], "probabilities"), (["--average", "logits"], "logits")):
        for limits in ([], ["--confidence", "0.9"]):
            assert main(["anytime", str(folder), "--limit-test", "9", *limits, *flags]) == 0
            assert f"ensembles average {average}" in capsys.readouterr().out


def test_eval_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such checkpoint" in error_of(capsys, "eval", str(tmp_path / "none"))
    (tmp_path / "random").write_bytes(bytes(range(100)))
    assert "not a safetensors file" in error_of(capsys, "eval", str(tmp_path / "random"))
    assert "nothing: no such folder" in error_of(capsys, "eval", str(run), "--ood", str(tmp_path / "nothing"))
    missing = error_of(capsys, "eval", str(run), "--ood", "cifar10", "--data-dir", str(tmp_path))
    assert "cifar10: found none of" in missing


def test_eval_on_data_of_other_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / split / "cat" / "a.png")
    message = error_of(capsys, "eval", str(run), "--data", "imagenet", "--data-dir", str(tmp_path))
    assert "trained on digits (10 classes, images 1x8x8), does not fit imagenet (1 classes" in message


# Calibrate ----------------------------------------------------------------------------------------------------------


def test_calibrate_keeps_temperatures_in_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    flags = ["--coverage", "0.8", "--target-macs", "1", "--threads", "1"]
    assert main(["calibrate", str(folder), *flags]) == 0
    out = capsys.readouterr().out
    assert (folder / "reliability.png").stat().st_size > 10_000
    before, after = (hne.load(path) for path in (run, folder))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    found = after.metadata["calibration"]
    assert re.findall(r"^ *\d+ +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ *$", out, re.M) == [
        f"{t:.3f}" for t in found["temperatures"]
    ]
    assert f"--confidence {found['confidence']:.4f} for `hne anytime`" in out
    assert found["conformal"]["coverage"] == 0.8
    predictor = AnytimePredictor(after, confidence=0.5)
    assert predictor.temperatures == tuple(found["temperatures"])
    assert main(["train", "--out", str(folder), "--resume", "--threads", "1"]) == 0, "the run is still one"
    assert main(["calibrate", str(folder), "--limit-test", "9"]) == 0
    assert hne.load(folder).metadata["calibration"]["images"] == 4


def test_calibrate_errors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / CHECKPOINT).read_bytes()
    assert "accuracy: at most 0." in error_of(capsys, "calibrate", str(run), "--target-accuracy", "1")
    assert "cost: a sample costs at least" in error_of(capsys, "calibrate", str(run), "--target-macs", "1e-9")
    assert "coverage: expected a number above 0 and below 1" in error_of(
        capsys, "calibrate", str(run), "--coverage", "1.2"
    )
    assert (run / CHECKPOINT).read_bytes() == before
    (run / "reliability.png").unlink(missing_ok=True)


# int8 ---------------------------------------------------------------------------------------------------------------


def test_quantize(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "int8.safetensors"
    limits = ["--limit-test", "40", "--quiet"]
    assert main(["quantize", str(run), "--calibration-images", "32", "--output", str(output), *limits]) == 0
    out = capsys.readouterr().out
    assert "40 test images; ranges of 32 training images" in out
    rows = re.findall(r"^ *(\d+) +[\d.]+ M +([\d.]+)% +([\d.]+)% +([\d.]+) +([\d.]+) *$", out, re.M)
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8]
    assert main(["eval", str(run), *limits]) == 0
    before = re.findall(r"^ *\d+ +[\d.]+ M +([\d.]+)% +([\d.]+) *$", capsys.readouterr().out, re.M)
    assert [(row[1], row[3]) for row in rows] == before
    assert main(["eval", str(output), *limits]) == 0
    after = re.findall(r"^ *\d+ +[\d.]+ M +([\d.]+)% +([\d.]+) *$", capsys.readouterr().out, re.M)
    assert [(row[2], row[4]) for row in rows] == after
    for row in rows:  # a network of two epochs, and 40 images
        assert abs(float(row[1]) - float(row[2])) <= 10
        assert abs(float(row[3]) - float(row[4])) < 0.1
    assert main(["anytime", str(output), "--deadline-ms", "1000", "--limit-test", "4", "--quiet"]) == 0
    capsys.readouterr()
    assert "in int8, for inference only" in error_of(capsys, "export", str(output))
    assert "in int8, for inference only" in error_of(capsys, "quantize", str(output))
    assert "expected cpu" in error_of(capsys, "quantize", str(run), "--device", "cuda")


# Anytime ------------------------------------------------------------------------------------------------------------


def test_anytime_curve(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "curve.png"
    anytime = ["anytime", str(run), "--limit-test", "40", "--batch-size", "16"]
    assert main([*anytime, "--plot", str(plot)]) == 0
    rows = re.findall(r"^ *(\d+) +[\d.]+ M +([\d.]+) +([\d.]+) +([\d.]+)% *$", capsys.readouterr().out, re.M)
    assert [int(row[0]) for row in rows] == list(range(1, 9))
    ready = [float(row[1]) for row in rows]
    assert ready == sorted(ready)
    assert all(float(row[2]) >= float(row[1]) for row in rows)
    expected = json.loads((run / "summary.json").read_text())["evaluation"]["ensembles"]
    for ensemble in expected:
        assert float(rows[ensemble["num_models"] - 1][3]) == pytest.approx(100 * ensemble["accuracy"], abs=0.01)
    with Image.open(plot) as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 50, "something is drawn"
    assert "--plot: expected without limits" in error_of(capsys, *anytime, "--plot", str(plot), "--agreement", "2")


def test_anytime_until_sure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anytime = ("anytime", str(run), "--limit-test", "20", "--batch-size", "8")
    assert main([*anytime, "--confidence", "0.01"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *1 +20 +100\.0% ", out, re.M), "the first answer is sure enough"
    assert "until 0.01 sure" in out
    assert main([*anytime, "--agreement", "8"]) == 0
    assert re.search(r"^ *8 +20 +100\.0% ", capsys.readouterr().out, re.M), "all are asked"
    assert "agreement: expected 2 to 8 models, got 9" in error_of(capsys, *anytime, "--agreement", "9")


def test_anytime_on_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["anytime", str(run), "--deadline-ms", "10000", "--limit-test", "20"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *8 +20 +100\.0% ", out, re.M), "there is time for all models"
    assert "all 20 answers were ready in time" in out


def test_anytime_without_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["anytime", str(run), "--deadline-ms", "0.001", "--limit-test", "6", "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *1 +6 +100\.0% ", out, re.M), "the first answer is given all the same"
    assert "6 of 6 answers were late: not even the first model was ready after 0.001 ms" in out


def test_anytime_on_pictures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = load_dataset("digits").test
    (tmp_path / "[more]").mkdir()
    for index, folder in enumerate(("", "", "[more]")):
        Image.fromarray(test.images[index, :, :, 0].numpy()).save(tmp_path / folder / f"{index}.png")
    assert main(["anytime", str(run), "--images", str(tmp_path), "--deadline-ms", "10000", "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    for name in ("0.png", "1.png", "[more]/2.png"):
        assert re.search(rf"^ *{re.escape(name)} +\d +[\d.]+% +8 +[\d.]+ *$", out, re.M)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert main(["anytime", str(run), "--images", str(tmp_path), "--deadline-ms", "0.001"]) == 1
    out, err = capsys.readouterr()
    assert "broken.png: not a complete image" in err
    assert "1 unreadable" in out
    assert out.count(" late") >= 3


def test_anytime_without_pictures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anytime = ("anytime", str(run), "--deadline-ms", "1", "--images")
    assert "found no image files" in error_of(capsys, *anytime, str(tmp_path))
    assert "no such folder" in error_of(capsys, *anytime, str(tmp_path / "none"))


# The others ---------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "reference" in out
    assert "50.82 M   65.71 M   107.17 M   201.92 M   402.36 M" in out


BENCH = ["bench", "--preset", "hne_tiny", "--width", "0.25", "--input-size", "8", "--seconds", "0.01"]


@pytest.mark.parametrize("flags", [[], ["--train"]])
def test_bench(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--against", "eager", "--batch-sizes", "2,3", *flags]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^ *[23] +([\d.]+ +){3}[\d.]+x *$", out, re.M)) == 2
    assert "hne_tiny, 8 of 8 models, 8x8: " + ("training step" if flags else "inference") in out


def test_why_a_side_is_not_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no C++\ncompiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "openvino" else "there")
    assert main([*BENCH, "--against", "compile,openvino,eager", "--batch-sizes", "2", "--num-models", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *2 +([\d.]+ +){3}[\d.]+x *$", out, re.M)
    assert "torch.compile: failed: RuntimeError: no C++ compiler" in out
    assert "OpenVINO: openvino is not installed: pip install openvino" in out
    assert main([*BENCH, "--against", "onnxruntime", "--batch-sizes", "2", "--train"]) == 0
    assert "ONNX Runtime: does not train" in capsys.readouterr().out


def test_measured_sides_must_compute_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InferenceSides, "make", _counting_sides())
    told = error_of(capsys, *BENCH, "--against", "eager", "--batch-sizes", "2")
    assert "eager PyTorch and this package compute different outputs" in told


def _counting_sides() -> Callable[..., Callable[[], torch.Tensor]]:
    """Each side has a result of its own."""
    count = itertools.count()

    def make(self: object, name: str) -> Callable[[], torch.Tensor]:
        result = torch.full((2,), float(next(count)))
        return lambda: result

    return make


def test_installed_engines_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert main([*BENCH, "--against", "onnxruntime", "--batch-sizes", "1,2", "--num-models", "3"]) == 0
    out = capsys.readouterr().out
    assert "ONNX Runtime (ms)" in out
    assert len(re.findall(r"^ *[12] +([\d.]+ +){3}[\d.]+x *$", out, re.M)) == 2


def test_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "ensemble.pt2"
    assert main(["export", str(run), "--num-models", "3", "--output", str(output)]) == 0
    assert "3 of 8 models" in capsys.readouterr().out
    images = torch.randn(5, 1, 8, 8)
    torch.save(images, tmp_path / "images")
    alone = (
        "import sys, torch\n"
        f"y = torch.export.load({str(output)!r}).module()(torch.load({str(tmp_path / 'images')!r}))\n"
        "assert not any(name.startswith('hne') for name in sys.modules)\n"
        f"torch.save(y, {str(tmp_path / 'logits')!r})\n"
    )
    subprocess.run([sys.executable, "-c", alone], check=True, cwd=tmp_path)
    model, _ = load_model(run / CHECKPOINT)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), model(images, 3).mean(0), rtol=1e-3, atol=1e-3)


def test_export_onnx(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: torch.Generator) -> None:
    """Any batch size, by an engine that knows nothing of PyTorch."""
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    pytest.importorskip("onnxscript")
    output = tmp_path / "program.onnx"
    assert main(["export", str(run), "--num-models", "3", "--format", "onnx", "--output", str(output)]) == 0
    assert "3 of 8 models" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]
    model, _ = load_model(run / CHECKPOINT)
    images = torch.randn(5, 1, 8, 8, generator=rng)
    (logits,) = evaluator(str(output)).run(None, {"images": images.numpy()})
    with torch.no_grad():
        want = model(images, 3).mean(0)
    torch.testing.assert_close(torch.from_numpy(logits), want, rtol=1e-4, atol=1e-4)


def test_export_onnx_needs_packages(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    output = tmp_path / "program.onnx"
    told = error_of(capsys, "export", str(run), "--format", "onnx", "--output", str(output))
    assert "pip install onnx onnxscript" in told
    assert not list(tmp_path.iterdir())


def test_export_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "num_models must lie between 1 and 8, got 9" in error_of(capsys, "export", str(run), "--num-models", "9")
    assert "--kernels: expected with --format pt2" in error_of(
        capsys, "export", str(run), "--kernels", "--format", "onnx"
    )

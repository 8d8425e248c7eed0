"""The commands on images in class folders, whose test images are held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hne import FusedHNE
from hne.cli import main
from hne.data import Dataset, load_dataset
from hne.models import checkpoint
from hne.training import CHECKPOINT, TrainConfig, Trainer, train_into

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ("--preset", "hne_tiny", "--width", "0.25", "--num-models", "2", "--image-size", "16", "--batch-size", "8")


@pytest.fixture(autouse=True)
def _no_data_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HNE_DATA", raising=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The folder of images of different sizes, in the class folders dark and light of ``train``."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for name, start in (("dark", 0), ("light", 128)):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(start, start + 128, (12 + number, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{number}.png")
    return folder


def test_train_resume_and_test(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "folder", "--data-dir", str(images))
    run = str(tmp_path / "run")
    split = ("--val-share", "0.25", "--split-seed", "7")
    assert main(["train", *data, *MODEL, *split, "--epochs", "2", "--out", run, "--threads", "1"]) == 0
    assert (
        "30 training and 10 test images (held out: 0.25 of each class, split seed 7), 2 classes"
        in capsys.readouterr().out
    )
    stored = checkpoint.load(tmp_path / "run" / CHECKPOINT)[1]
    assert stored["data"]["held_out"] == [0.25, 7]

    result = tmp_path / "result.json"
    assert main(["eval", run, "--data-dir", str(images), "--json", str(result)]) == 0
    evaluation = json.loads(result.read_text())["evaluation"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert evaluation["images"] == 10, "the same images are tested"
    assert evaluation["ensembles"] == [
        pytest.approx(row, rel=1e-4, abs=1e-6) for row in summary["evaluation"]["ensembles"]
    ]

    assert main(["train", *data, "--out", run, "--resume", "--quiet"]) == 0, "a finished run"
    assert main(["train", *data, "--out", run, "--resume", "--val-share", "0.5"]) == 2
    assert "the run has val_share = 0.25, got 0.5" in capsys.readouterr().err
    (images / "train" / "dark" / "0.png").unlink()
    (images / "train" / "dark" / "1.png").unlink()
    assert main(["train", *data, "--out", run, "--resume"]) == 2
    assert "of another run: data " in capsys.readouterr().err


def test_distill(images: Path, tmp_path: Path) -> None:
    """The student is tested on images that its teacher was not trained on."""
    data = ("--data-dir", str(images), "--epochs", "1", "--quiet", "--threads", "1")
    flags = ("--data", "folder", "--split-seed", "3", "--objective", "I")
    assert main(["train", *flags, *data, *MODEL, "--out", str(tmp_path / "teacher")]) == 0
    flags = ("--first-phase", "0", "--batch-size", "8")
    assert main(["distill", str(tmp_path / "teacher"), *data, *flags, "--out", str(tmp_path / "students")]) == 0
    stored = [checkpoint.load(path)[1]["data"] for path in sorted(tmp_path.rglob(CHECKPOINT))]
    assert [entry["held_out"] for entry in stored] == [[0.1, 3]] * 2
    assert [entry["train"] for entry in stored] == [36] * 2


def test_a_network_trained_in_python(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is tested on a folder in the size that it was trained on."""
    dataset = load_dataset("folder", images, image_size=24)
    items = [(dataset.train.pixels(torch.tensor([i]))[0].permute(2, 0, 1), i % 2) for i in range(16)]
    mine = Dataset.from_torch(items, items, classes=("dark", "light"), name="mine")
    model = FusedHNE.from_preset("hne_tiny", num_classes=2, width=0.25, num_models=2)
    list(train_into(tmp_path / "run", Trainer(model, mine, TrainConfig.of(epochs=1, batch_size=8)), quiet=True))
    flags = ["eval", str(tmp_path / "run"), "--quiet", "--data-dir", str(images)]
    assert main([*flags, "--data", "folder"]) == 0
    assert "on folder" in capsys.readouterr().out
    assert main(flags) == 2
    assert "trained on mine, a data set that was made in Python: --data names one to test on" in capsys.readouterr().err


def test_errors(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "run"))
    for flags, message in (
        (("--data", "digits", "--split-seed", "2"), "split_seed: chooses the images that are held out, which needs"),
        (("--data", "folder"), "folder: found none of train in any folder (none was named)"),
        (("--data", "folder", "--data-dir", str(images / "train")), f"found none of train in {images / 'train'}."),
        (
            ("--data", "folder", "--data-dir", str(images), "--val-share", "1"),
            "val_share: expected a number above 0 and",
        ),
    ):
        assert main(["train", *flags, *out]) == 2
        assert message in capsys.readouterr().err
    broken = images / "train" / "light" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    flags = ("--data", "folder", "--data-dir", str(images), "--epochs", "1", "--quiet")
    assert main(["train", *flags, *MODEL, *out]) == 2
    assert f"{broken}: not a complete image" in capsys.readouterr().err

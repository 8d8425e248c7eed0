"""``hne train --backbone``: an ensemble that starts from a trained network."""

from __future__ import annotations

import json
from pathlib import Path

import libraries
import pytest
import torch
from data_files import write_cifar
from safetensors.torch import save_file

from hne import FusedHNE
from hne.cli import main
from hne.data import load_dataset
from hne.distributed import World
from hne.models import checkpoint
from hne.training import CHECKPOINT, TrainConfig, Trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*the published file has")]

QUICK = ("--epochs", "1", "--batch-size", "10", "--lr", "0.01", "--threads", "1")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small data set, beside stand-ins for the libraries."""
    monkeypatch.chdir(tmp_path)
    libraries.install(monkeypatch)
    write_cifar(tmp_path / "data", "cifar10", zipped=False)
    return tmp_path / "data"


def train(data: Path, *flags: str) -> int:
    return main(["train", "--data", "cifar10", "--data-dir", str(data), *QUICK, *flags])


def test_train_resume_and_test(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MobileNetV2 has a Module, the dropout before its head: its template comes from the library."""
    flags = ("--backbone", "torchvision:mobilenet_v2", "--branches", "1,1,2,4", "--freeze-trunk", "--perturb", "0.2")
    assert train(data, *flags, "--epochs", "2") == 0
    out = Path("runs/cifar10-torchvision-mobilenet_v2")
    printed = capsys.readouterr().out
    assert "torchvision-mobilenet_v2: 4 models" in printed
    assert "backbone MobileNetV2: 36,199 parameters, checked with images of 64x64; 1 of 24 modules in plain" in printed
    model, stored = checkpoint.load_model(out / CHECKPOINT)
    assert model.hierarchy.branches == (1, 1, 2, 4)
    assert model.num_classes == 10
    assert model.frozen_blocks == 2
    config = TrainConfig.from_dict(stored["recipe"])
    assert (config.backbone, config.perturb) == ("torchvision:mobilenet_v2", 0.2)

    net = libraries.pretrained("torchvision", "mobilenet_v2")
    trained = FusedHNE.from_backbone(net, (1, 1, 2, 4), num_classes=10, perturb=0.2)
    for name, tensor in trained.state_dict().items():
        frozen = name.startswith(("blocks.0", "blocks.1"))
        assert torch.equal(model.state_dict()[name], tensor) == frozen, name

    assert main(["eval", str(out), "--data-dir", str(data), "--json", "result.json"]) == 0
    assert len(json.loads(Path("result.json").read_text())["evaluation"]["ensembles"]) == 3
    assert main(["train", "--data", "cifar10", "--data-dir", str(data), "--resume", "--out", str(out), "--quiet"]) == 0


def test_interrupted_runs_end_as_others(data: Path) -> None:
    flags = ("--backbone", "torchvision:resnet18", "--branches", "1,2", "--epochs", "2")
    assert train(data, *flags, "--out", "whole") == 0
    stored = checkpoint.load("whole/" + CHECKPOINT)[1]
    config = TrainConfig.from_dict(stored["recipe"])
    dataset = load_dataset("cifar10", data)
    first = Trainer.from_config(config, dataset, World(torch.device("cpu")))
    next(first.train(quiet=True))
    first.save("half.safetensors")
    second = Trainer.from_config(config, dataset, World(torch.device("cpu")))
    second.restore("half.safetensors")
    list(second.train(quiet=True))
    whole = checkpoint.load("whole/" + CHECKPOINT)[0]
    for name, tensor in checkpoint.model_tensors(second.model).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_file_of_weights(data: Path) -> None:
    save_file(libraries.pretrained("timm", "resnet18").state_dict(), "net.safetensors")
    flags = ("--backbone", "net.safetensors", "--backbone-arch", "timm:resnet18", "--branches", "1,2", "--naive")
    assert train(data, *flags) == 0
    assert (Path("runs/cifar10-net.safetensors") / CHECKPOINT).exists()


ERRORS = {
    "no branches": (("--backbone", "timm:resnet18"), "branches: expected the branches of each block of the backbone"),
    "preset": (
        ("--backbone", "timm:resnet18", "--branches", "1,2", "--preset", "hne_tiny"),
        "preset: expected none beside a backbone, got 'hne_tiny'",
    ),
    "width": (("--backbone", "timm:x", "--branches", "1,2", "--width", "0.5"), "width: a backbone keeps its channels"),
    "perturb": (
        ("--backbone", "timm:x", "--branches", "1,2", "--perturb", "-1"),
        "perturb: expected at least 0",
    ),
    "arch alone": (("--backbone-arch", "timm:resnet18"), "backbone_arch: expected only with a backbone"),
    "freeze alone": (("--freeze-trunk",), "freeze_trunk: expected only with a backbone, got True"),
    "no network": (("--backbone", "timm:resnet18", "--branches", "1,2"), "give the file as the backbone"),
    "unknown": (("--backbone", "torchvision:resnet", "--branches", "1,2"), "the nearest name is 'resnet18'"),
    "no file": (("--backbone", "weights.pth", "--branches", "1,2"), "got 'weights.pth', which is no file"),
    "too many": (
        ("--backbone", "torchvision:resnet18", "--branches", "1,1,1,1,1,2"),
        "branches: ResNet has 5 stages, got counts for 6 blocks",
    ),
    "no trunk": (
        ("--backbone", "torchvision:resnet18", "--branches", "2,4", "--freeze-trunk"),
        "freeze_trunk: expected a tree whose first block has one branch",
    ),
    "positions": (
        ("--backbone", "torchvision:vit_b_16", "--branches", "1,2", "--data", "digits"),
        "expected in_channels=1 for the data set digits, got 3",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = ERRORS[name]
    assert train(data, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert [line for line in error.splitlines() if not line.startswith("hne: warning:")] == error.splitlines()[-1:]


def test_configs_of_earlier_versions_have_no_backbone() -> None:
    values = TrainConfig.of().to_dict()
    for name in ("backbone", "backbone_arch", "perturb", "freeze_trunk"):
        del values[name]
    assert TrainConfig.from_dict(values) == TrainConfig.of()

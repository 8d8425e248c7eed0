"""Networks as folders in the layout of the Hugging Face hub, and ``hne.load``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import hub
from torch import Tensor, nn

import hne
from hne import FusedHNE, Hierarchy, Module, NaiveHNE
from hne.errors import CheckpointError, FileError, ResultError
from hne.models.pretrained import CARD, CONFIG, WEIGHTS

METADATA = {
    "data": {
        "name": "digits",
        "classes": ["zero", "one", "two"],
        "input": {"channels": 3, "size": [8, 8], "mean": [0.3, 0.3, 0.3], "std": [0.2, 0.2, 0.2], "resize": None},
        "target": None,
        "train": 900,
    },
    "recipe": {"preset": "hne_tiny", "epochs": 2, "num_models": None},
    "evaluation": {
        "ensembles": [{"num_models": 1, "macs": 457344, "accuracy": 0.25781, "nll": 2.18324, "ece": 0.10788}],
        "images": 896,
    },
}


@pytest.fixture
def model() -> FusedHNE:
    return FusedHNE.from_preset("hne_tiny", num_classes=3, width=0.25).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 8, 8)


@pytest.mark.parametrize("kind", [FusedHNE, NaiveHNE])
def test_round_trip(kind: type[hne.HNE], model: FusedHNE, images: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "new" / "folder", METADATA)
    read = kind.from_pretrained(tmp_path / "new" / "folder")
    assert type(read) is kind
    assert not read.training
    assert read.metadata == METADATA
    assert read.config() == model.config()
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    torch.testing.assert_close(read(images), model(images))
    read.save_pretrained(tmp_path / "again")  # with the metadata that were read
    for name in (CONFIG, CARD, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / "folder" / name).read_bytes()


def test_weights_are_a_plain_state_dict(model: FusedHNE, tmp_path: Path) -> None:
    from safetensors import safe_open

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert file.metadata() == {"format": "pt"}


def test_model_card(model: FusedHNE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, METADATA)
    card = (tmp_path / CARD).read_text()
    assert card.startswith("---\nlibrary_name: hne-kernels\npipeline_tag: image-classification\ntags:\n")
    assert "# hne_tiny on digits: 8 networks in one tree" in card
    assert "| 1 | 0.46 M | 25.78% | 2.1832 | 0.1079 |" in card
    assert "Classes: zero, one, two." in card
    assert '"epochs": 2' in card
    assert "num_models" not in card
    model.save_pretrained(tmp_path)  # nothing is known
    assert "8 networks in one tree" in (tmp_path / CARD).read_text()


def test_modules_need_their_templates(images: Tensor, tmp_path: Path) -> None:
    template = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = FusedHNE(Hierarchy((1, 2)), [[Module(template)], [hne.Conv(4)]], num_classes=2).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot build its network"):
        FusedHNE.from_pretrained(tmp_path)
    read = FusedHNE.from_pretrained(tmp_path, templates=[template])
    torch.testing.assert_close(read(images), model(images))


def test_load_of_a_checkpoint_and_of_a_folder(model: FusedHNE, images: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoint.safetensors"
    file.parent.mkdir()
    history = [{"epoch": 1, "evaluation": None}, {"epoch": 2, "evaluation": METADATA["evaluation"]}]
    known = {name: METADATA[name] for name in ("data", "recipe")}
    tensors = hne.models.checkpoint.model_tensors(model)
    hne.models.checkpoint.save(file, tensors, {"model": model.config(), **known, "history": history})
    for path in (file, file.parent, str(file.parent)):
        read = hne.load(path)
        assert read.metadata == METADATA
        torch.testing.assert_close(read(images), model(images))
    hne.load(file).save_pretrained(tmp_path / "shared")
    assert isinstance(hne.load(tmp_path / "shared", naive=True), NaiveHNE)
    torch.testing.assert_close(hne.load(tmp_path / "shared")(images), model(images))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        hne.load(tmp_path)


def test_what_is_no_folder_of_a_network(model: FusedHNE, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder, and no OWNER/NAME of the Hugging Face hub"):
        FusedHNE.from_pretrained(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json: no JSON file that can be read"):
        FusedHNE.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for change, message in (
        ({"format": "bert"}, "format 'hne', got 'bert'"),
        ({"version": 2}, "expected version 1, got 2: update hne-kernels"),
        ({"model": {}}, "cannot build its network"),
        ({"model": config["model"] | {"num_classes": 4}}, r"cannot build its network: .*head\.conv\.weight"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            FusedHNE.from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="not a safetensors file, or truncated or damaged"):
        FusedHNE.from_pretrained(tmp_path)


def test_failed_save_keeps_the_old_files(model: FusedHNE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, METADATA)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResultError, match=r"loss is nan, expected a finite number"):
        model.save_pretrained(tmp_path, {"loss": float("nan")})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(FileError):
        model.save_pretrained(tmp_path / "file")


_UPLOAD_AND_DOWNLOAD = """
import hne, torch
model = hne.FusedHNE.from_preset("hne_tiny", num_classes=3, width=0.25).eval()
print(model.push_to_hub("someone/tree", metadata={"recipe": {"epochs": 2}}))
x = torch.randn(2, 3, 8, 8)
for options in ({}, {"local_files_only": True}):
    read = hne.FusedHNE.from_pretrained("someone/tree", **options)
    torch.testing.assert_close(read(x), model(x))
    assert read.metadata == {"recipe": {"epochs": 2}}
try:
    hne.FusedHNE.from_pretrained("someone/other")
except OSError as error:
    print(type(error).__name__)
"""


def test_upload_to_the_hub_and_download_from_it(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with hub() as (address, repositories):
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": "hf_nobody",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", _UPLOAD_AND_DOWNLOAD]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    commit, error = ran.stdout.splitlines()
    assert commit.startswith(f"{address}/someone/tree/commit/")
    assert error == "RepositoryNotFoundError"
    assert set(repositories["someone/tree"]) == {CONFIG, CARD, WEIGHTS}


def test_hub_without_its_package_names_the_extra() -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None\nimport hne\nhne.FusedHNE.from_pretrained('someone/tree')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "huggingface_hub is not installed: pip install 'hne-kernels[hub]'" in ran.stderr

"""Files that an earlier version (commit c6eac3b) wrote can be loaded, with the same results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hne_kernels as K
from hne import FusedHNE
from hne.cli import main
from hne.models import checkpoint

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def written() -> dict[str, Tensor]:
    """Images, and the logits of the network for them, computed by the earlier version."""
    return load_file(FIXTURES / "odd_tree_logits.safetensors")


@pytest.mark.parametrize("naive", [False, True])
def test_checkpoint(naive: bool, written: dict[str, Tensor]) -> None:
    model, config = checkpoint.load_model(FIXTURES / "odd_tree.safetensors", naive=naive)
    with torch.no_grad():
        torch.testing.assert_close(model(written["images"]), written["logits"], rtol=1e-4, atol=1e-5)
    assert model.config() == config["model"]
    names = {name.removeprefix("model/") for name in load_file(FIXTURES / "odd_tree.safetensors")}
    assert names == model.state_dict().keys()


def test_config_is_written_as_before() -> None:
    _, config = checkpoint.load(FIXTURES / "odd_tree.safetensors")
    assert json.dumps(FusedHNE.from_config(config["model"]).config()) == json.dumps(config["model"])


def test_exported_program(written: dict[str, Tensor]) -> None:
    program = torch.export.load(FIXTURES / "odd_tree_first4.pt2")
    ours = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("hne.")}
    assert ours == {"hne.fused_conv2d.default", "hne.fused_bottleneck.default"}
    want = written["logits"][:4].mean(0)
    with torch.no_grad():
        with K.use_backend("reference"):  # has no effect: a program calls its ops directly
            got = program.module()(written["images"])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = FIXTURES / "digits_run"
    before = json.loads((folder / "summary.json").read_text())
    assert main(["eval", str(folder), "--json", str(tmp_path / "eval.json")]) == 0
    got = json.loads((tmp_path / "eval.json").read_text())
    for ensemble, was in zip(got["evaluation"]["ensembles"], before["evaluation"]["ensembles"], strict=True):
        assert ensemble["accuracy"] == pytest.approx(was["accuracy"], abs=1 / 360)  # rounding may change one image
        assert ensemble["nll"] == pytest.approx(was["nll"], rel=1e-3)

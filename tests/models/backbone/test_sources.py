"""Backbones by name, from files, and checkpoints of ensembles that came from them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import libraries
import pytest
import torch
from backbones import backbone, trained
from safetensors.torch import save_file
from torch import nn
from torchvision_like import ResNet

from hne import FusedHNE
from hne.errors import BackboneError, CheckpointError
from hne.models import checkpoint


@pytest.fixture
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.install(monkeypatch)


@pytest.mark.usefixtures("_libraries")
class TestByName:
    def test_with_published_weights(self) -> None:
        model = FusedHNE.from_backbone("torchvision:mobilenet_v2", (1, 1, 2, 4))
        net = libraries.pretrained("torchvision", "mobilenet_v2").eval()
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(model(x, num_models=1)[0], net(x), rtol=1e-4, atol=1e-5)
        assert model.config()["origin"] == {"architecture": "torchvision:mobilenet_v2"}

    @pytest.mark.parametrize("form", [".safetensors", ".pth", "state_dict", "module."])
    def test_with_the_weights_of_a_file(self, form: str, tmp_path: Path) -> None:
        """The number of classes is that of the file."""
        net = trained(ResNet(num_classes=4), 32)
        path = tmp_path / ("weights" + (form if form.startswith(".") else ".pt"))
        state = net.state_dict()
        if form == ".safetensors":
            save_file(state, path)
        elif form == "module.":
            torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
        else:
            torch.save({"state_dict": state, "epoch": 3} if form == "state_dict" else state, path)
        rng = torch.get_rng_state()
        model = FusedHNE.from_backbone(str(path), (1, 2), architecture="torchvision:resnet18")
        assert torch.equal(torch.get_rng_state(), rng)
        assert model.num_classes == 4
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(model(x, num_models=1)[0], net(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("source", "options", "message"),
        [
            ("torchvision:resnet19", {}, "torchvision has no model 'resnet19'; the nearest name is 'resnet18'"),
            (
                "timm:resnet18",
                {},
                "cannot get timm:resnet18: cannot reach the server of the weights. Without a",
            ),
            ("resnet18", {}, "expected torchvision:NAME, timm:NAME or a file of weights, got 'resnet18', which is no"),
            ("torchvision:resnet18", {"architecture": "timm:resnet18"}, "architecture: expected none for torchvision:"),
        ],
    )
    def test_wrong_names(self, source: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(BackboneError, match=re.escape(message)):
            FusedHNE.from_backbone(source, (1, 2), **options)

    def test_wrong_files(self, tmp_path: Path) -> None:
        def message(path: Path, architecture: str | None) -> str:
            with pytest.raises(BackboneError) as caught:
                FusedHNE.from_backbone(str(path), (1, 2), architecture=architecture)
            return str(caught.value)

        path = tmp_path / "weights.safetensors"
        path.write_bytes(b"no tensors")
        assert "holds weights without a network: name it as torchvision:NAME or timm:NAME" in message(path, None)
        assert "cannot be read as a safetensors file" in message(path, "torchvision:resnet18")
        other = path.with_suffix(".pth")
        other.write_bytes(b"no tensors")
        assert "cannot be read as a file of weights" in message(other, "torchvision:resnet18")
        torch.save([1, 2], other)
        assert "expected tensors by name" in message(other, "torchvision:resnet18")
        save_file({name: t.clone() for name, t in ResNet().state_dict().items() if name != "bn1.bias"}, path)
        text = message(path, "torchvision:resnet18")
        assert text.endswith("does not fit torchvision:resnet18: tensor bn1.bias expected (8,), found none")
        assert "architecture: expected torchvision:NAME or timm:NAME, got 'resnet18'" in message(path, "resnet18")

    def test_weights_that_would_run_code_are_refused(self, tmp_path: Path) -> None:
        class Code:
            def __reduce__(self) -> Any:
                return (print, ("run",))

        path = tmp_path / "weights.pth"
        torch.save({"a": Code()}, path)
        with pytest.raises(BackboneError, match="cannot be read as a file of weights"):
            FusedHNE.from_backbone(str(path), (1, 2), architecture="torchvision:resnet18")


def test_libraries_that_are_missing_or_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackboneError, match="timm is not installed: pip install timm"):
        FusedHNE.from_backbone("timm:resnet18", (1, 2))

    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(BackboneError, match=r"torchvision cannot be imported beside PyTorch .*nms does not exist"):
        FusedHNE.from_backbone("torchvision:resnet18", (1, 2))


class TestCheckpoint:
    def save(self, model: Any, path: Path) -> None:
        checkpoint.save(path, checkpoint.model_tensors(model), {"model": model.config()})

    def test_of_layers_alone(self, tmp_path: Path) -> None:
        """No library is needed where everything became layers with kernels."""
        model = FusedHNE.from_backbone(backbone("torchvision-resnet-basic"), (1, 2), freeze_trunk=True)
        self.save(model, tmp_path / "model")
        again, _ = checkpoint.load_model(tmp_path / "model")
        self.same(model, again)
        assert again.frozen_blocks == 1

    def test_with_templates(self, tmp_path: Path) -> None:
        model = FusedHNE.from_backbone(backbone("sequential"), (1, 2))
        self.save(model, tmp_path / "model")
        with pytest.raises(CheckpointError, match="templates: expected one for each Module of the network"):
            checkpoint.load_model(tmp_path / "model")
        fresh = FusedHNE.from_backbone(backbone("sequential"), (1, 2))
        again, _ = checkpoint.load_model(tmp_path / "model", templates=fresh.templates())
        self.same(model, again)

    @pytest.mark.parametrize("stages", [None, [["conv1", "bn1", "relu", "maxpool"], ["layer1", "layer2"], ["layer3"]]])
    def test_templates_come_from_the_library(
        self, stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also those of stages that the user has named."""

        def resnet(**options: Any) -> nn.Module:
            net = ResNet(layers=(1, 2, 1), **options)
            net.layer2[0].bn1.eps = 1e-4
            return net

        monkeypatch.setitem(libraries.MODELS["torchvision"], "resnet18", resnet)
        libraries.install(monkeypatch)
        model = FusedHNE.from_backbone("torchvision:resnet18", (1, 1, 2), stages=stages, num_classes=3, input_size=32)
        assert len(model.templates()) == 1
        self.save(model, tmp_path / "model")
        again, config = checkpoint.load_model(tmp_path / "model")
        self.same(model, again)
        assert again.config() == config["model"]
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(CheckpointError, match=r"cannot build its network .*torchvision is not installed"):
            checkpoint.load_model(tmp_path / "model")

    def same(self, model: Any, again: Any) -> None:
        x = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), again(x))


def test_the_origin_of_stages_with_functions_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are modules, which a checkpoint cannot hold."""
    libraries.install(monkeypatch)
    stages: Any = [["features", nn.AdaptiveAvgPool2d(1), nn.Flatten(), "classifier.0"]]
    model = FusedHNE.from_backbone("torchvision:mobilenet_v2", (1,), stages=stages)
    assert "origin" not in model.config()

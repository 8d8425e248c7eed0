"""Checkpoints: reading returns what was written; damaged and other files are refused; no code in a file is run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hne import FusedHNE, NaiveHNE
from hne.errors import CheckpointError, FileError, ResultError
from hne.files import remove_leftovers
from hne.models import checkpoint


@pytest.fixture
def model() -> FusedHNE:
    torch.manual_seed(0)
    return FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1, width=0.5).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


def save(model: FusedHNE, path: Path, **config: Any) -> None:
    checkpoint.save(path, checkpoint.model_tensors(model), {"model": model.config(), **config})


def test_round_trip(path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4).t(),  # not contiguous
        "b": torch.tensor(7),
        "c": torch.arange(5, dtype=torch.uint8),
        "d": torch.randn(2).bfloat16(),
        "empty": torch.zeros(0, 3),
    }
    config = {"number": 0.1 + 0.2, "nested": {"list": [1, None, "ä"]}}
    checkpoint.save(path, tensors, config)
    found, found_config = checkpoint.load(path)
    assert found_config == config
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("naive", [False, True])
def test_load_model(naive: bool, model: FusedHNE, path: Path) -> None:
    save(model, path)
    loaded, _ = checkpoint.load_model(path, naive=naive)
    assert type(loaded) is (NaiveHNE if naive else FusedHNE)
    assert not loaded.training
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


def test_missing_file(path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{path}: no such checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"\x10" + bytes(30)])
def test_not_a_safetensors_file(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{path}: not a safetensors file, or truncated or damaged"):
        checkpoint.load(path)


def test_pickles_are_not_run(path: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "run"),)

    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(path)
    torch.save(Attack(), path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(path)
    assert not (tmp_path / "run").exists()


def test_other_safetensors_files(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"but no checkpoint of an HNE .* found 'pt'"):
        checkpoint.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"but no checkpoint of an HNE .* found None"):
        checkpoint.load(path)


def test_other_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "VERSION", "2")
    checkpoint.save(path, {}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="expected version 1 of the checkpoint format, found '2'"):
        checkpoint.load(path)


def test_every_truncation_is_noticed(path: Path) -> None:
    checkpoint.save(path, {"a": torch.arange(8.0)}, {"epoch": 3})
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            checkpoint.load(path)


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    checkpoint.save(path, {"a": torch.arange(8.0)}, {"epoch": 3})
    raw = path.read_bytes()
    for position in range(len(raw)):
        for bit in (0x01, 0x20, 0x80):
            damaged = bytearray(raw)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=str(path)):
                checkpoint.load(path)


def test_network_that_cannot_be_built(model: FusedHNE, path: Path) -> None:
    checkpoint.save(path, {}, {"something": "else"})
    with pytest.raises(CheckpointError, match=rf"^{path}: cannot build its network \('model'\)"):
        checkpoint.load_model(path)
    checkpoint.save(path, {}, {"model": {**model.config(), "blocks": [[{"layer": "Attention"}]]}})
    with pytest.raises(CheckpointError, match="cannot build its network"):
        checkpoint.load_model(path)


def test_tensors_of_another_network(model: FusedHNE, path: Path) -> None:
    tensors = checkpoint.model_tensors(model)
    name = "model/head.conv.bias"
    config = {"model": model.config()}
    checkpoint.save(path, {key: value for key, value in tensors.items() if key != name}, config)
    with pytest.raises(CheckpointError, match=r"tensor head\.conv\.bias expected \(80,\), found none"):
        checkpoint.load_model(path)
    checkpoint.save(path, {**tensors, name: torch.zeros(800)}, config)
    with pytest.raises(CheckpointError, match=r"tensor head\.conv\.bias expected \(80,\), found \(800,\)"):
        checkpoint.load_model(path)
    checkpoint.save(path, {**tensors, "model/extra": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match=r"tensor extra expected not to be there, found \(1,\)"):
        checkpoint.load_model(path)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_while_writing_keeps_the_old_file(moment: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(path, {"a": torch.zeros(3)}, {"epoch": 1})

    def crash(tensors: Any, filename: Path, metadata: Any) -> None:
        if moment == "after":
            save_file(tensors, filename, metadata)
        else:
            filename.write_bytes(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"a": torch.ones(3)}, {"epoch": 2})
    tensors, config = checkpoint.load(path)
    assert config == {"epoch": 1}
    assert torch.equal(tensors["a"], torch.zeros(3))
    assert list(path.parent.iterdir()) == [path], "nothing is left behind"


def test_leftovers_of_a_kill_are_removed(path: Path) -> None:
    checkpoint.save(path, {}, {})
    code = "import os, signal, sys; from hne.files import replacing\n"
    code += "with replacing(sys.argv[1]) as half: half.write_bytes(b'half a fi'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(path)])
    assert len(list(path.parent.iterdir())) == 2
    remove_leftovers(path.parent)
    assert list(path.parent.iterdir()) == [path]


def test_mode_of_checkpoints(path: Path) -> None:
    """That of the umask for a new file, which safetensors would make readable for its owner only."""
    before = os.umask(0o022)
    try:
        checkpoint.save(path, {"a": torch.zeros(3)}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    checkpoint.save(path, {"a": torch.ones(3)}, {})
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(path, {"a": torch.zeros(3)}, {"epoch": 1})

    def fail(tensors: Any, filename: Path, metadata: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(FileError, match=rf"^{path}: cannot be written: the disk is full"):
        checkpoint.save(path, {"a": torch.ones(3)}, {"epoch": 2})
    assert checkpoint.load(path)[1] == {"epoch": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_config_that_is_no_object(text: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "to_json", lambda config, path: text)
    checkpoint.save(path, {}, {})
    with pytest.raises(CheckpointError, match=rf"^{path}: its config is"):
        checkpoint.load(path)


def test_numbers_of_a_config_are_finite(path: Path) -> None:
    with pytest.raises(ResultError, match=r"history\[0\]\.loss is nan"):
        checkpoint.save(path, {}, {"history": [{"loss": float("nan")}]})
    assert not path.exists()

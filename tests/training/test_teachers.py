"""Teachers: online and tabulated outputs, and files of outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from students import DIGITS, heads, random_outputs
from torch import Tensor

from hne.errors import DataError
from hne.training import member_outputs, read_outputs
from hne.training.teachers import ask_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


def test_known_outputs_are_those_of_the_network() -> None:
    model = heads(4).build_model(DIGITS)
    table = member_outputs(model, DIGITS.train, DIGITS.input, batch_size=20)
    indices = torch.tensor([5, 60, 2])
    batch = DIGITS.input.normalise(DIGITS.train.pixels(indices))
    asked = ask_teacher(model, batch, indices, 4, 10)
    torch.testing.assert_close(ask_teacher(table, batch, indices, 4, 10), asked, rtol=1e-4, atol=1e-5)
    assert not asked.requires_grad
    assert not asked.is_inference(), "can be part of a loss"


def test_outputs_from_files(tmp_path: Path) -> None:
    train, test = random_outputs(), random_outputs(count=40)
    np.save(tmp_path / "a.npy", train.double().numpy())
    assert torch.equal(read_outputs(tmp_path / "a.npy")["train"], train)
    save_file({"train": train, "test": test}, tmp_path / "a.safetensors")
    found = read_outputs(tmp_path / "a.safetensors")
    assert torch.equal(found["train"], train)
    assert torch.equal(found["test"], test)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"test": torch.ones(2, 3, 4)}, "expected an array train, and perhaps test, found test"),
        ({"train": torch.ones(2, 3, 4), "x": torch.ones(1)}, "expected an array train, and perhaps test, found"),
        ({"train": torch.ones(3, 4)}, r"train: expected finite .* found torch.float32 \(3, 4\)"),
        ({"train": torch.ones(2, 3, 4).int()}, "found torch.int32"),
        ({"train": torch.full((2, 3, 4), torch.nan)}, "found NaN or infinity"),
        ({"train": torch.ones(2, 3, 4), "test": torch.ones(3, 3, 4)}, "not of the same members and classes"),
    ],
)
def test_bad_outputs(arrays: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=message) as error:
        read_outputs(tmp_path / "a.safetensors")
    assert str(error.value).startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x93NUMPY\x01\x00"])
def test_files_of_another_kind(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="not a NumPy or safetensors file of outputs"):
        read_outputs(tmp_path / name)

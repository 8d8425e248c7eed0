"""Hydra: what the heads learn, from which teachers, in two phases, and the comparison with other networks."""

from __future__ import annotations

import csv
import json
import re
import timeit
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from networks import build, images
from safetensors.torch import save_file
from torch import Tensor

from hne import FusedHNE, Hierarchy
from hne.cli import main
from hne.data import load_dataset
from hne.distributed import World
from hne.errors import CheckpointError, DataError
from hne.losses import average_teacher, gaussians, hydra_loss
from hne.models import checkpoint
from hne.reporting import comparison
from hne.training.distillation import (
    HINTON,
    HYDRA,
    Distillation,
    StudentRecipe,
    Teacher,
    expand,
    online,
    read_outputs,
    students,
    tabulate,
    tabulated,
)
from hne.training.trainer import CHECKPOINT

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = World(torch.device("cpu"))
SMALL: dict[str, Any] = {"limit_train": 64, "limit_test": 40, "batch_size": 16, "width": 0.5, "teacher": "a"}
SMALL_FLAGS = ["--limit-train", "64", "--limit-test", "40", "--batch-size", "16", "--width", "0.5", "--quiet"]
DIGITS = load_dataset("digits", limit_train=64, limit_test=40)


def heads(num_models: int = 3, **options: Any) -> StudentRecipe:
    return students(StudentRecipe.of(**{**SMALL, "epochs": 2, **options}), num_models)["hydra"]


def random_outputs(num_models: int = 3, count: int = 64, outputs: int = 10) -> Tensor:
    return torch.randn(num_models, count, outputs, generator=torch.Generator().manual_seed(1))


def start(asked: Teacher | None = None, **options: Any) -> Distillation:
    return Distillation(heads(**options), DIGITS, HERE, asked or tabulated(random_outputs()))


# Objectives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_objective(temperature: float, rng: torch.Generator) -> None:
    student, teacher = (3 * torch.randn(4, 5, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    expected = 0.0
    for head, member in zip(student, teacher, strict=True):
        for y, t in zip(head, member, strict=True):
            p, q = (np.exp(v / temperature) / np.exp(v / temperature).sum() for v in (t.numpy(), y.numpy()))
            expected += temperature**2 * (p * np.log(p / q)).sum() / (4 * 5)
    assert hydra_loss(student, teacher, temperature).item() == pytest.approx(expected)
    assert hydra_loss(student, student, temperature).abs() < 1e-12
    assert hydra_loss(student.bfloat16(), teacher.bfloat16(), temperature).dtype == torch.float32
    with pytest.raises(ValueError, match=r"teacher must have the shape of logits, \(3, 5, 7\), got \(4, 5, 7\)"):
        hydra_loss(student[:3], teacher, temperature)


def test_average_of_the_members(rng: torch.Generator) -> None:
    teacher = torch.randn(4, 5, 7, generator=rng, dtype=torch.float64)
    soft = (average_teacher(teacher, 2.5) / 2.5).softmax(-1)
    torch.testing.assert_close(soft, (teacher / 2.5).softmax(-1).mean(0, keepdim=True))


# Runs ---------------------------------------------------------------------------------------------------------------


def test_students() -> None:
    base = StudentRecipe.of(**{**SMALL, "epochs": 10, "first_phase": 4})
    runs = students(base, 6, own_blocks=1, compare=True)
    assert list(runs) == ["first-phase", "hydra", "distilled", "alone"]
    assert [recipe.epochs for recipe in runs.values()] == [4, 6, 10, 10]
    assert [recipe.objective for recipe in runs.values()] == [HINTON, HYDRA, HINTON, "I"]
    models = {name: recipe.build_model(DIGITS) for name, recipe in runs.items()}
    assert models["hydra"].hierarchy == Hierarchy((1, 1, 1, 6))
    assert all(models[name].hierarchy == Hierarchy.single(4) for name in ("first-phase", "distilled", "alone"))
    assert list(students(replace(base, first_phase=0), 6)) == ["hydra"]
    assert heads(5).build_model(DIGITS).hierarchy == Hierarchy.multi_head(4, 5)
    with pytest.raises(ValueError, match="own_blocks: expected 0 to 3 of the 4 of hne_tiny, got 4"):
        students(base, 6, own_blocks=4)
    with pytest.raises(ValueError, match="first_phase: expected less than the 10 epochs of both, got 10"):
        students(replace(base, first_phase=10), 6)


def test_each_head_learns_its_member() -> None:
    run = start(epochs=15, augment=False, width=1.0)
    rows = list(run.train(eval_every=15))
    assert rows[-1].loss < 0.7 * rows[0].loss
    student = tabulate(run.model, run.dataset.train, run.dataset.input).log_softmax(-1)
    member = random_outputs().softmax(-1)
    divergence = torch.tensor([[(p * (p.log() - q)).sum(-1).mean() for p in member] for q in student])
    assert divergence.argmin(1).tolist() == [0, 1, 2], "closer to its own than to the others"


def test_one_head_learns_the_average() -> None:
    recipe = replace(heads(), objective=HINTON, num_models=1, epochs=1)
    run = Distillation(recipe, DIGITS, HERE, tabulated(random_outputs()))
    logits, indices = torch.randn(1, 5, 10), torch.tensor([3, 7, 8, 20, 63])
    wanted = (random_outputs()[:, indices] / 2).softmax(-1).mean(0)
    expected = 4 * (wanted * (wanted.log() - (logits[0] / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(run._loss(logits, torch.empty(0), indices), expected)


@pytest.mark.parametrize("objective", [HYDRA, HINTON])
def test_regression_matches_gaussians(objective: str) -> None:
    dataset = load_dataset("diabetes")
    base = StudentRecipe.of(data="diabetes", teacher="a", epochs=30)
    recipe = students(base, 3, compare=True)["hydra" if objective == HYDRA else "distilled"]
    teacher = torch.tensor([[-1.0, 0.5], [0.0, -1.0], [1.0, 1.0]])[:, None].expand(-1, 295, -1)
    run = Distillation(recipe, dataset, HERE, tabulated(teacher))
    rows = list(run.train(eval_every=30))
    assert rows[-1].loss < 0.2 * rows[0].loss
    mean, variance = gaussians(tabulate(run.model, dataset.train, dataset.input))
    wanted_mean, wanted_variance = gaussians(teacher[:, 0])
    if objective == HINTON:
        wanted_variance = (wanted_variance + wanted_mean**2).mean(0, keepdim=True)
        wanted_mean = torch.zeros(1)
    torch.testing.assert_close(mean.mean(1), wanted_mean, atol=0.15, rtol=0.15)
    torch.testing.assert_close(variance.mean(1), wanted_variance, atol=0.15, rtol=0.2)


@pytest.mark.parametrize("augment", [True, False])
def test_the_teacher_sees_what_the_student_sees(augment: bool) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def teacher(images: Tensor, indices: Tensor) -> Tensor:
        seen.append((images, indices))
        return random_outputs()[:, indices]

    list(start(teacher, epochs=1, augment=augment).train())
    assert sorted(torch.cat([indices for _, indices in seen]).tolist()) == list(range(64)), "every image once"
    same = [torch.equal(batch, DIGITS.input.normalise(DIGITS.train.pixels(indices))) for batch, indices in seen]
    assert all(same) if not augment else not any(same)


def test_known_outputs_are_those_of_the_network() -> None:
    model = heads(4).build_model(DIGITS)
    table = tabulate(model, DIGITS.train, DIGITS.input, batch_size=20)
    indices = torch.tensor([5, 60, 2])
    batch = DIGITS.input.normalise(DIGITS.train.pixels(indices))
    asked = online(model)(batch, indices)
    torch.testing.assert_close(tabulated(table)(batch, indices), asked, rtol=1e-4, atol=1e-5)
    assert not asked.requires_grad
    assert not asked.is_inference(), "can be part of a loss"


def test_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = (start(epochs=4) for _ in range(3))
    list(whole.train())
    halfway = first.train()
    for _ in range(2):
        next(halfway)
    first.save(tmp_path / "half")
    torch.manual_seed(99)
    second.restore(tmp_path / "half")
    list(second.train())
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="of another run: recipe teacher was 'a', now it is 'b'"):
        start(epochs=4, teacher="b").restore(tmp_path / "half")


def test_temperature_is_checked() -> None:
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        start(temperature=0.0)


# Two phases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [Hierarchy.multi_head(3, 4), Hierarchy((1, 1, 4)), Hierarchy((1, 2, 2), num_models=4)])
@torch.no_grad()
def test_heads_start_from_one_network(tree: Hierarchy, rng: torch.Generator) -> None:
    single, model = build(FusedHNE, networks.TREES["single"], rng), build(FusedHNE, tree, rng)
    expand(single, model)
    x = images(rng)
    if tree.branches[1] == 1:  # else a shortcut of block 1 branches: the identity but for epsilon
        torch.testing.assert_close(model(x), single(x).expand(4, -1, -1))
    else:
        torch.testing.assert_close(model(x), single(x).expand(4, -1, -1), rtol=1e-4, atol=1e-4)
    for name, tensor in single.state_dict().items():
        assert torch.equal(model.state_dict()[name].flatten()[: tensor.numel()], tensor.flatten())


def test_heads_of_another_network(rng: torch.Generator) -> None:
    single = FusedHNE(Hierarchy.single(1), networks.BLOCKS[:1], num_classes=5)
    with pytest.raises(ValueError, match="single must be a network of the same blocks as model"):
        expand(single, build(FusedHNE, networks.TREES["multi-head"], rng))


# Files of logits ----------------------------------------------------------------------------------------------------


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


# The command --------------------------------------------------------------------------------------------------------


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
    pytest.importorskip("torchmetrics")
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
    assert "has runs already: --resume continues them" in capsys.readouterr().err
    (tmp_path / "alone" / CHECKPOINT).unlink()
    assert main([*flags, "--resume"]) == 0
    (tmp_path / "alone" / CHECKPOINT).unlink()
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists()), "the rest stays"
    assert main([*flags, "--resume", "--lr", "0.3"]) == 2
    assert "of another run: recipe lr was 0.05, now it is 0.3" in capsys.readouterr().err


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
    assert "diabetes has none" in capsys.readouterr().err


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

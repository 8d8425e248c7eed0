"""Exported steps: the answers of the model, by every engine; and what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from networks import TREES, build, each_tree, images

from hne import AnytimePredictor, Conv, FusedHNE, Hierarchy
from hne.errors import CheckpointError
from hne.inference import write_anytime
from hne.inference.anytime_export import needed_later
from hne.runtime import MANIFEST, AnytimeSession

BLOCKS = [[Conv(6)], [Conv(8, stride=2)], [Conv(7)]]


def check(session: AnytimeSession, model: FusedHNE, rng: torch.Generator, batches: tuple[int, ...]) -> None:
    for batch in batches:
        x = images(rng, batch, dtype=torch.float32)
        with torch.no_grad():
            for (n, got), (want_n, want) in zip(session.anytime(x), model.anytime(x), strict=True):
                assert n == want_n
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model() -> FusedHNE:
    return build(FusedHNE, TREES["odd"], torch.Generator().manual_seed(torch.seed()), torch.float32, BLOCKS).eval()


@pytest.fixture(scope="module")
def exported(model: FusedHNE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    images_of_any_size = images(torch.Generator(), 2, dtype=torch.float32)
    write_anytime(model, folder, images_of_any_size, format="pt2", metadata={"recipe": {"lr": 0.1}})
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported steps."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@each_tree
def test_features_are_kept_as_long_as_they_are_read(tree: Hierarchy) -> None:
    """A step reads features of the leaf's own path, which an earlier step has kept."""
    stored: dict[int, int] = {}  # the leaf that has computed the features after a block
    for leaf in range(tree.num_models):
        first = tree.first_new(leaf)
        if first > 0:
            assert tree.ancestor(stored[first - 1], first - 1) == tree.ancestor(leaf, first - 1)
        stored |= dict.fromkeys(needed_later(tree, leaf), leaf)
    last = tree.num_models - 1
    assert needed_later(tree, last) == []


def test_answers_of_the_model(folder: Path, model: FusedHNE, rng: torch.Generator) -> None:
    session = AnytimeSession(folder)
    assert (session.engine, session.num_models, session.num_classes) == ("torch", 6, model.num_classes)
    assert session.metadata == {"recipe": {"lr": 0.1}}
    assert session.manifest.macs == tuple(model.macs(n, session.manifest.image[1:]) for n in range(1, 7))
    check(session, model, rng, (1, 2, 5))


def test_answers_by_onnx(rng: torch.Generator, tmp_path: Path) -> None:
    engines = [engine for engine in ("onnxruntime", "openvino") if find_spec(engine) is not None]
    if not engines or find_spec("onnxscript") is None:
        pytest.skip("no engine for ONNX is installed")
    model = build(FusedHNE, Hierarchy((1, 2)), rng, torch.float32, BLOCKS[:2]).eval()
    write_anytime(model, tmp_path, images(rng, 2, dtype=torch.float32), format="onnx")
    for engine in engines:
        check(AnytimeSession(tmp_path, engine), model, rng, (1, 3))


@pytest.mark.slow
def test_answers_of_a_compiled_package(rng: torch.Generator, tmp_path: Path) -> None:
    model = build(FusedHNE, Hierarchy((1, 2)), rng, torch.float32, BLOCKS[:2]).eval()
    write_anytime(model, tmp_path, images(rng, 2, dtype=torch.float32), format="aoti")
    check(AnytimeSession(tmp_path), model, rng, (1, 3))


@torch.no_grad()
def test_deadline_and_confidence(folder: Path, model: FusedHNE, rng: torch.Generator) -> None:
    """A session takes the place of the model: samples leave the batch, with the same answers."""
    x = images(rng, 40, dtype=torch.float32)
    confidence = model(x)[0].softmax(-1).amax(-1).median().item()
    session = AnytimeSession(folder)
    want, got = (AnytimePredictor(m, confidence=confidence)(x) for m in (model, session))
    assert len(set(want.num_models.tolist())) > 1
    same = want.num_models == got.num_models
    assert same.sum() >= 38, "but for a confidence at the threshold, up to rounding"
    torch.testing.assert_close(got.logits[same], want.logits[same], rtol=1e-4, atol=1e-4)
    assert AnytimePredictor(session, deadline_ms=60_000)(x).num_models.tolist() == [6] * 40


def test_selected_samples(folder: Path, model: FusedHNE, rng: torch.Generator) -> None:
    x = images(rng, 5, dtype=torch.float32)
    steps = AnytimeSession(folder).anytime(x)
    with pytest.raises(RuntimeError, match="ask for the first one before"):
        steps.select(torch.tensor([0]))
    next(steps)
    steps.select(torch.tensor([3, 1]))
    with torch.no_grad():
        members = model(x)
    for n, logits in steps:
        torch.testing.assert_close(logits, members[:n].mean(0)[[3, 1]], rtol=1e-4, atol=1e-4)


def test_wrong_images(folder: Path) -> None:
    session = AnytimeSession(folder)
    right = torch.zeros(2, *session.manifest.image)
    for x in (right[..., 1:], right.double(), right[0]):
        with pytest.raises(ValueError, match=r"x: expected float32 \[batch, 3, \d+, \d+\], got"):
            session.anytime(x)


def test_wrong_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: no JSON file that can be read"):
        AnytimeSession(tmp_path_factory.mktemp("empty"))
    text = (folder / MANIFEST).read_text()
    for change, message in (
        ({"format": "other"}, "not written by `hne export --anytime`"),
        ({"version": 2}, "expected version 1, got 2"),
        ({"steps": None}, "damaged"),
    ):
        (folder / MANIFEST).write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(CheckpointError, match=message):
            AnytimeSession(folder)
    (folder / MANIFEST).write_text(text)
    program = folder / "step-2.pt2"
    content = program.read_bytes()
    program.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"step-2\.pt2: damaged: .* export again"):
        AnytimeSession(folder)
    program.unlink()
    with pytest.raises(CheckpointError, match=r"step-2\.pt2: missing: export again"):
        AnytimeSession(folder)


def test_wrong_engines(folder: Path, model: FusedHNE, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine: expected one of torch, onnxruntime, openvino, got 'tvm'"):
        AnytimeSession(folder, "tvm")
    with pytest.raises(ValueError, match=r"has pt2 programs, for torch, got 'openvino'"):
        AnytimeSession(folder, "openvino")
    with pytest.raises(ValueError, match="format: expected one of onnx, pt2, aoti, got 'tflite'"):
        write_anytime(model, tmp_path, torch.zeros(2, 3, 8, 8), format="tflite")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"programs": "onnx"}))
    monkeypatch.setattr("hne.runtime.engines.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="onnxruntime is not installed: pip install onnxruntime"):
        AnytimeSession(folder)


def test_an_interrupted_export_leaves_no_manifest(
    folder: Path, model: FusedHNE, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hne.inference.anytime_export.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        write_anytime(model, folder, torch.zeros(2, 3, 8, 8), format="pt2")
    with pytest.raises(CheckpointError, match="no JSON file that can be read"):
        AnytimeSession(folder)

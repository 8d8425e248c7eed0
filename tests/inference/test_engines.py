"""Engines that run exported graphs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from networks import TREES, build, images
from torch import Tensor

from hne import NaiveHNE
from hne.inference import ENGINES, EnsembleMean, engines, load_engine, missing, write_onnx


def test_engines_compute_the_exported_graphs(tmp_path: Path, rng: torch.Generator) -> None:
    installed = [name for name in ENGINES if missing(name) is None]
    if not installed:
        pytest.skip("no inference engine is installed")
    ensemble = EnsembleMean(build(NaiveHNE, TREES["doubling"], rng, torch.float32), 2).eval()
    x = images(rng, dtype=torch.float32)
    graphs = [tmp_path / "grouped.onnx", tmp_path / "separate.onnx"]
    with torch.no_grad():
        for graph, separate in zip(graphs, (False, True), strict=True):
            write_onnx(ensemble, x[:2], graph, separate)
        for name in installed:
            for chosen in ([graphs[0]], [graphs[1]], graphs):
                call = load_engine(name, chosen, x, spin=chosen == graphs)
                torch.testing.assert_close(call(), ensemble(x), rtol=1e-4, atol=1e-4)
                x.neg_()  # a call reads the images anew
                torch.testing.assert_close(call(), ensemble(x), rtol=1e-4, atol=1e-4)


def test_the_fastest_call() -> None:
    def sleeping(seconds: float) -> Tensor:
        time.sleep(seconds)
        return torch.tensor(seconds)

    calls = [lambda: sleeping(0.02), lambda: sleeping(0.001), lambda: sleeping(0.03)]
    assert engines.fastest(calls, seconds=0.01) is calls[1]
    assert engines.fastest(calls[:1]) is calls[0]


def test_what_is_missing_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "openvino" else "there")
    assert missing("onnxruntime") is None
    assert missing("openvino") == "openvino is not installed: pip install openvino"
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert (missing("openvino") or "").startswith("openvino and onnx and onnxscript are not installed: pip install o")

"""Peers: plain PyTorch in channels-last memory, inference engines, and the frozen compiled model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import TREES, build, images

from hne import Hierarchy, NaiveHNE

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.usefixtures("_import_benchmarks")


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_channels_last_is_the_same_network(tree: Hierarchy, rng: torch.Generator) -> None:
    import channels_last

    model = build(NaiveHNE, tree, rng)
    other = channels_last.convert(model)
    x = images(rng)
    with torch.no_grad():
        for n in range(1, tree.num_models + 1):
            torch.testing.assert_close(other(x, n), model(x, n))


def test_peers_compute_the_exported_graph(tmp_path: Path, rng: torch.Generator) -> None:
    import peers
    from comparison import check_agreement

    from hne.inference import EnsembleMean, write_onnx

    installed = [name for name in peers.PEERS if peers.missing(name) is None]
    if not installed:
        pytest.skip("no inference engine is installed")
    ensemble = EnsembleMean(build(NaiveHNE, TREES["doubling"], rng, torch.float32), 2).eval()
    x = images(rng, dtype=torch.float32)
    with torch.no_grad():
        expected = ensemble(x)
        write_onnx(ensemble, x[:2], tmp_path / "graph.onnx")
    for name in installed:
        side = peers.PEERS[name](tmp_path / "graph.onnx", x)
        check_agreement(side(), expected)
        x.neg_()  # the peer reads the tensor that it was given
        with pytest.raises(AssertionError):
            check_agreement(side(), expected)
        x.neg_()


def test_what_is_missing_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "openvino" else "there")
    assert peers.missing("onnxruntime") is None
    assert peers.missing("openvino") == "openvino is not installed: pip install -e '.[peers]'"
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert (peers.missing("openvino") or "").startswith("openvino and onnx and onnxscript are not installed")


@pytest.mark.slow
def test_freezing_folds_batch_norms(rng: torch.Generator) -> None:
    import channels_last
    import peers
    from torch._inductor.utils import run_and_get_code

    model = channels_last.convert(build(NaiveHNE, TREES["single"], rng, torch.float32))
    x = images(rng, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), peers.freezing():
        result, code = run_and_get_code(torch.compile(model, dynamic=False), x)
    torch.testing.assert_close(result, model(x))
    assert "batch_norm" not in "".join(code)

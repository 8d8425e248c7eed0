"""The written programs: their operations, and their results for any batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from networks import TREES, build, images

from hne import Bottleneck, Conv, FusedHNE, MaxPool, NaiveHNE
from hne.inference import EnsembleMean, write_onnx, write_pt2

BLOCKS = [[Conv(6), MaxPool()], [Bottleneck(8, 4)], [Bottleneck(8, 5, stride=2), Bottleneck(8, 5)]]


def test_an_onnx_graph_has_no_copies_and_no_arithmetic_with_weights(tmp_path: Path, rng: torch.Generator) -> None:
    onnx = pytest.importorskip("onnx")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    pytest.importorskip("onnxscript")
    model = build(NaiveHNE, TREES["doubling"], rng, torch.float32, BLOCKS)
    x = images(rng, 4, dtype=torch.float32)
    counts = {"Conv": 12, "Relu": 10, "MaxPool": 1, "Add": 3, "ReduceMean": 1, "Reshape": 1, "Gemm": 1}
    uneven = {"Conv": 19, "Relu": 16, "Add": 5, "Split": 1, "ReduceMean": 2, "Concat": 1}  # the third leaf apart
    apart = {"Conv": 30, "Relu": 25, "Add": 8, "ReduceMean": 3, "Concat": 1}
    for n, separate, expected in ((4, False, counts), (3, False, counts | uneven), (3, True, counts | apart)):
        with torch.no_grad():
            write_onnx(EnsembleMean(model, n), x[:2], tmp_path / "graph.onnx", separate)
            want = model(x, n).mean(0)
        graph = onnx.load(tmp_path / "graph.onnx").graph
        assert Counter(node.op_type for node in graph.node) == expected
        (logits,) = evaluator(str(tmp_path / "graph.onnx")).run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("separate", [False, True], ids=["grouped", "separate"])
def test_a_pt2_program_of_plain_operations(separate: bool, tmp_path: Path, rng: torch.Generator) -> None:
    model = build(NaiveHNE, TREES["odd"], rng, torch.float32, BLOCKS)
    x = images(rng, 5, dtype=torch.float32)
    with torch.no_grad():
        write_pt2(EnsembleMean(model, 4), x[:2], tmp_path / "a.pt2", separate)
        program = torch.export.load(tmp_path / "a.pt2")
        torch.testing.assert_close(program.module()(x), model(x, 4).mean(0), rtol=1e-4, atol=1e-5)
    convolutions = sum(node.target == torch.ops.aten.conv2d.default for node in program.graph.nodes)
    assert convolutions == (37 if separate else 12)  # of 1, 2 and 4 branches
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_a_program_of_the_kernels(tmp_path: Path, rng: torch.Generator) -> None:
    model = build(FusedHNE, TREES["odd"], rng, torch.float32, BLOCKS)
    x = images(rng, 5, dtype=torch.float32)
    with torch.no_grad():
        write_pt2(EnsembleMean(model, 4), x[:2], tmp_path / "a.pt2")
        program = torch.export.load(tmp_path / "a.pt2")
        torch.testing.assert_close(program.module()(x), model(x, 4).mean(0), rtol=1e-4, atol=1e-5)
    assert any("hne" in str(node.target) for node in program.graph.nodes)

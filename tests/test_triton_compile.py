"""The Triton kernels as compilers see them. No GPU is needed for that, but the interpreter must be off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_all_kernels_compile_without_spills() -> None:
    result = _python("-m", "hne_kernels.triton.compile_table")
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith(" 0 failed")


_TRACE = """
import torch
import hne_kernels.triton as ops
from torch._dynamo.backends.common import aot_autograd

graphs = []

def keep(graph, _):
    graphs.append(graph)
    raise NotImplementedError("kept, not run")

def call(x, weight, bias, gain):
    y = ops.branch_conv2d(x, weight, bias, 1, 1, 2)
    return ops.branch_batch_norm(y, gain, gain, None, "relu", 1e-5)[0]

arguments = torch.ones(2, 2, 4, 4, 3), torch.ones(4, 5, 3, 3, 3), torch.ones(4, 5), torch.ones(4, 5)
try:
    torch.compile(call, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*arguments)
except Exception:
    pass
(graph,) = graphs
targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
print(sum("triton_kernel_wrapper" in target for target in targets), sum("hne" in target for target in targets))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run compiled in tests/test_compile.py")
def test_the_compiler_looks_into_the_ops() -> None:
    """One node for each kernel, none for an op: the compiler may fuse what lies between."""
    result = _python("-c", _TRACE)
    assert result.stdout.split() == ["4", "0"], result.stdout + result.stderr

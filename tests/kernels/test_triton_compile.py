"""The Triton kernels through Triton's compiler and torch.compile: no GPU is needed, but the interpreter must be off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


# Compiles each op, with gradients, up to the point where the graph would run. PyTorch compiles the kernels halfway to
# find the tensors that they write, so there is a driver for a GPU that does not exist.
_TRACE = """
import inspect, sys, torch, triton
sys.path[:0] = {folders!r}
from cases import representative
from torch._dynamo.backends.common import aot_autograd
import hne_kernels as K
from hne_kernels import triton as ours
from triton_resources import Driver

triton.runtime.driver.set_active(Driver(90))
graphs = []

def keep(graph, _):
    graphs.append(graph)
    raise NotImplementedError("kept, not run")

half = [case for case in representative() if case.op == "fused_bottleneck"]  # one kernel in half precision only
for case, dtype in [(case, torch.float32) for case in representative()] + [(case, torch.bfloat16) for case in half]:
    if not hasattr(ours, case.op):
        continue  # composed of other ops
    inputs = case.inputs(torch.Generator(), dtype)
    if inputs.get("sizes", 0) is None:
        inputs["sizes"] = list(K.default_sizes(len(inputs["features"])))
    for name in case.differentiable:
        inputs[name].requires_grad_()
    op = getattr(ours, case.op)
    schema = op.default._schema if hasattr(op, "default") else None  # prefix_logits is composed of ops
    names = [a.name for a in schema.arguments] if schema else inspect.signature(op).parameters
    arguments = [inputs[name] for name in names]
    graphs.clear()
    torch._dynamo.reset()  # else sizes that differ between the cases are symbols

    def call(*arguments, op=op):
        result = op(*arguments)
        return result[0] if op is ours.hierarchical_distillation_loss else result  # the other is its gradient

    try:
        torch.compile(call, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*arguments)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not graphs:
            raise
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert not any("hne" in target for target in targets), targets
    kernels = sum("triton_kernel_wrapper" in target for target in targets)
    print(case.label + "-half" * (dtype == torch.bfloat16), kernels)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run compiled in tests/test_compile.py")
def test_the_compiler_looks_into_the_ops() -> None:
    """The graph has one node per kernel and none per op, so that the compiler can fuse the code in between."""
    result = _python("-c", _TRACE.format(folders=[str(ROOT / "tests" / "helpers"), str(ROOT / "tools")]))
    kernels = dict(line.split() for line in result.stdout.splitlines())
    assert kernels == {
        "batch_norm_scale_shift": "1",
        "branch_conv2d": "1",
        "branch_depthwise_conv2d": "1",
        "branch_norm_conv2d-dense": "2",
        "branch_norm_conv2d-depthwise": "2",
        "branch_norm_conv2d-materialize": "3",
        "branch_norm_conv2d-materialize-window": "3",
        "branch_normalize": "1",
        "fused_conv2d": "1",
        "fused_conv2d-residual": "1",
        "fused_bottleneck": "4",
        "fused_bottleneck-half": "1",
        "prefix_mean": "1",
        "prefix_logits": "2",
        "hierarchical_distillation_loss": "1",
    }, result.stdout + result.stderr


# Compiles kernels to Triton's IR: in every dtype for sizes of 1, and with arguments that are the constant 1, as
# torch.compile makes them even where a kernel asks Triton not to.
_SIZES_OF_ONE = """
import sys
sys.path[:0] = {folders!r}
import torch
from cases import CASES, representative, tensors
import triton_resources

def first(case):
    return next(iter(tensors(case.inputs(torch.Generator())).values()))

jobs = triton_resources.parity_launches(90, [case for case in CASES if first(case).numel() == 1])
for job in jobs:
    triton_resources.to_ir(job)
print(len(jobs))

kernels = {{}}
for job in triton_resources.parity_launches(90, representative(), [torch.bfloat16]):
    absent = tuple(argument is None for argument in job.arguments)
    kernels.setdefault((job.name, absent, job.constants.get("TRANSPOSED")), job)
for job in kernels.values():
    sizes = [name for name, value in zip(job.kernel.arg_names, job.arguments) if type(value) is int]
    for ones in (sizes, sizes[::2], sizes[1::2]):
        multiple = job.constants.get("MULTIPLE", 1) > 1  # of the channels, which then are not 1
        chosen = [name for name in ones if not (multiple and name.endswith("channels"))]
        triton_resources.to_ir(job, **dict.fromkeys(chosen, 1))
print(*sorted({{job.name for job in kernels.values()}}))
"""


@pytest.mark.slow
def test_sizes_of_one_compile() -> None:
    """An argument of 1 is a constant to the compiler, which the interpreter does not show."""
    result = _python("-c", _SIZES_OF_ONE.format(folders=[str(ROOT / "tests" / "helpers"), str(ROOT / "tools")]))
    assert result.returncode == 0, result.stderr
    launches, kernels = result.stdout.splitlines()
    assert int(launches) > 40
    assert kernels.split() == [
        "batch_norm_scale_shift_backward_kernel",
        "batch_norm_scale_shift_kernel",
        "batch_statistics_combine_kernel",
        "branch_conv2d_kernel",
        "branch_conv2d_weight_kernel",
        "branch_depthwise_conv2d_kernel",
        "branch_depthwise_conv2d_weight_kernel",
        "branch_normalize_backward_kernel",
        "branch_normalize_kernel",
        "fused_bottleneck_kernel",
        "hierarchical_distillation_loss_kernel",
        "prefix_mean_backward_kernel",
        "prefix_mean_kernel",
    ]


# Machine code of the convolutions of 24 channels in half precision; prints the kinds of accesses to features.
_ACCESSES = """
import re, sys
sys.path[:0] = {folders!r}
import torch
import triton_resources
from hne_kernels import pack_weight

def new(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")

ops, x, y, weight = torch.ops.hne, new(2, 8, 6, 6, 24), new(2, 8, 6, 6, 72), new(2, 72, 24, 1, 1)
with triton_resources.Recorder((80,), all_configs=False) as recorder:
    ops.triton_fused_conv2d(x, pack_weight(weight), new(2, 72), 1, 0, 1, "relu6")
    ops.triton_branch_conv2d_backward_input(y, weight, 6, 6, 1, 0, 1)
    ops.triton_branch_conv2d_backward_weight(y, x, 1, 1, 0, 1)
    ops.triton_branch_depthwise_conv2d(x, new(2, 24, 1, 1), None, 1, 0, 1)
for job in recorder.found.values():
    code = job.warmup().asm["ptx"]
    stores = set(re.findall(r"st[.]global[.]\\S+", code))
    loads = set(re.findall(r"cp[.]async[.]c[ag]|ld[.]global[.]v4[.]b32", code))
    print(job.name, *sorted(stores | loads))
"""


def test_24_channels_are_read_and_written_by_16_bytes() -> None:
    """Triton itself only knows multiples of 16."""
    result = _python("-c", _ACCESSES.format(folders=[str(ROOT / "tools")]))
    assert result.returncode == 0, result.stderr
    accesses = [line.split() for line in result.stdout.splitlines()]
    assert accesses == [
        ["branch_conv2d_kernel", "cp.async.cg", "st.global.v4.b32"],
        ["branch_conv2d_kernel", "cp.async.cg", "st.global.v4.b32"],
        ["branch_conv2d_weight_kernel", "cp.async.cg", "ld.global.v4.b32", "st.global.v4.b32"],
        ["branch_depthwise_conv2d_kernel", "ld.global.v4.b32", "st.global.v4.b32"],
    ]

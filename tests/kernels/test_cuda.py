"""The CUDA kernels on an emulated GPU: their results are right, and they access only their own memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda_emulation"))
pytest.importorskip("setuptools")

import build as emulation  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels compiled for the host."""
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    return emulation.build_sanitized()


def _run(library: Path, *arguments: str, **environ: str) -> str:
    """Run Python with the emulated kernels."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "HNE_CUDA_EMULATION": str(library),
            "OMP_WAIT_POLICY": "passive",
            **emulation.sanitized_environ(),
            **environ,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def test_parity_in_emulation(library: Path) -> None:
    """Every op, forward and backward, in every dtype, against the float64 reference."""
    said = _run(
        library, "-m", "pytest", "-q", "-k", "cuda", "tests/kernels/test_parity.py", "tests/kernels/test_not_finite.py"
    )
    assert " passed" in said
    assert "skipped" not in said.splitlines()[-1]


_CASES = """
import re, sys, torch
sys.path.insert(0, "tests/helpers")
from cases import CASES, check, evaluate
import hne_kernels as K
from cases import cast, cotangents
rng = torch.Generator().manual_seed(7)

def shifted(value):
    # A copy that does not start at a multiple of 16 bytes.
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    longer = value.new_full((value.numel() + 1,), float("nan"))
    return longer[1:].view(value.shape).copy_(value)

for case in CASES:
    if re.search(sys.argv[1], str(case)):
        for dtype in (torch.float32, torch.float16):
            inputs = case.inputs(rng, dtype)
            grads = [g.to(dtype) for g in cotangents(case, cast(inputs, torch.float64), rng)]
            if "shifted" in sys.argv:
                inputs, grads = {name: shifted(value) for name, value in inputs.items()}, [*map(shifted, grads)]
            with K.use_backend("cuda"):
                outcome = evaluate(case, inputs, grads if case.differentiable else ())
            check(case, "cuda", inputs, outcome, grads if case.differentiable else ())
            print("checked", case)
"""


def test_without_room_in_shared_memory(library: Path) -> None:
    """A bottleneck is then composed of its convolutions, and the loss has its sums in device memory."""
    ops = "^(fused_bottleneck|hierarchical_distillation_loss)"
    said = _run(library, "-c", _CASES, ops, HNE_EMULATED_SHARED_MEMORY="1000")
    assert "checked fused_bottleneck" in said
    assert "checked hierarchical_distillation_loss" in said


def test_tensors_that_begin_anywhere(library: Path) -> None:
    """Channels that fill vectors of 16 bytes, at addresses that are no multiples of 16."""
    ops = "conv2d(-dense|-depthwise|-materialize.*)?-.*-16to|bottleneck-.*-16to16|normalize-1x4x9x7x64"
    ops += "|prefix_(mean|logits)-N16"
    said = _run(library, "-c", _CASES, ops, "shifted")
    for op in (
        *("branch_conv2d", "branch_depthwise_conv2d", "fused_conv2d", "fused_bottleneck", "branch_normalize"),
        *("branch_norm_conv2d-dense", "branch_norm_conv2d-depthwise", "prefix_mean", "prefix_logits"),
        *("branch_norm_conv2d-materialize", "branch_norm_conv2d-materialize-window"),
    ):
        assert f"checked {op}-" in said


_TF32 = """
import torch, hne_kernels as K
rng = torch.Generator().manual_seed(7)
for channels in (24, 5):
    x = torch.randn(2, 3, 5, 6, channels, generator=rng)
    weight = torch.randn(4, 16, channels, 3, 3, generator=rng)
    with K.use_backend("reference"):
        want = K.branch_conv2d(x.double(), weight.double(), padding=1, replicate=2)
    for precision, low, high in (("ieee", 0, 1e-6), ("tf32", 1e-5, 1e-3), ("ieee", 0, 1e-6)):
        torch.backends.cuda.matmul.fp32_precision = precision
        with K.use_backend("cuda"):
            got = K.branch_conv2d(x, weight, padding=1, replicate=2)
        error = ((got - want).norm() / want.norm()).item()
        assert low <= error < high, (channels, precision, error)
print("checked")
"""


def test_float32_is_exact_unless_torch_allows_tf32(library: Path) -> None:
    assert "checked" in _run(library, "-c", _TF32)


_STATISTICS = """
import torch, hne_kernels as K
rng = torch.Generator().manual_seed(7)
for height, width, channels in ((15, 32, 3), (8, 31, 1), (3, 70, 4)):
    x = torch.randn(1, 2, height, width, channels, generator=rng) + 100
    weight = torch.randn(70, 20, channels, 3, 3, generator=rng)
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype), weight.to(dtype), None, None, None, "none", 1, 1, 70, False
        y, mean, var, _ = torch.ops.hne.branch_norm_conv2d(*given)
        with K.use_backend("reference"):
            want = K.branch_conv2d(given[0].double(), given[1].double(), padding=1, replicate=70)
        torch.testing.assert_close(y.double(), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
        torch.testing.assert_close(mean.double(), want.mean((1, 2, 3)), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(var.double(), want.var((1, 2, 3), correction=0), rtol=1e-4, atol=1e-3)
print("checked")
"""


def test_statistics_of_few_input_channels(library: Path) -> None:
    """Tiles of all sizes, and values with a large mean."""
    assert "checked" in _run(library, "-c", _STATISTICS)


_VAST = {
    "pixels in the padding": "K.branch_depthwise_conv2d(torch.ones(1, 2**20, 1, 1, 1), one[None, None], padding=2**10)",
    "pixels": "K.branch_normalize(one.expand(1, 2**31, 1, 1, 1), one.expand(3, 1, 1))",
    "expanded channels": """K.fused_bottleneck(
        one.expand(1, 1, 1, 1, 1), one.expand(1, 2**27, 1, 1, 1, 16), one.expand(1, 2**31), one.expand(1, 1, 1, 2**31),
        one.expand(1, 2**31), one.expand(1, 1, 1, 1, 2**31, 16), one)""",
}


@pytest.mark.parametrize("what", _VAST)
def test_vast_numbers_are_an_error(what: str, library: Path) -> None:
    """The error comes before any access to memory, as these tensors are one repeated value."""
    code = f"""
import torch, hne_kernels as K
one = torch.ones(1, 1)
try:
    {_VAST[what]}
except RuntimeError as error:
    print(error)
"""
    assert "2^31" in _run(library, "-c", code)


def test_a_vast_number_of_children_is_as_many_as_there_are(library: Path) -> None:
    code = """
import torch, hne_kernels as K
x, weight, dense = torch.randn(1, 2, 5, 5, 3), torch.randn(2, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
for replicate in (2**31, 2**62):
    torch.testing.assert_close(K.branch_depthwise_conv2d(x, weight, replicate=replicate),
                               K.branch_depthwise_conv2d(x, weight, replicate=2), rtol=0, atol=0)
    torch.testing.assert_close(K.branch_conv2d(x, dense, replicate=replicate),
                               K.branch_conv2d(x, dense, replicate=2), rtol=0, atol=0)
print("checked")
"""
    assert "checked" in _run(library, "-c", code)


_STORED = """
import torch, hne_kernels
op, backward = torch.ops.hne.branch_norm_conv2d, torch.ops.hne.branch_norm_conv2d_backward
x, weight, depthwise = torch.ones(2, 1, 3, 3, 4), torch.ones(2, 4, 4, 1, 1), torch.ones(2, 4, 1, 1)
norm, statistics = torch.ones(3, 2, 4), torch.ones(2, 4)

def refused(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        assert "expected" in str(error), error
        print("refused")

options = "none", 1, 0, 1
refused(op, x, depthwise, norm, None, None, *options, True)
refused(op, x, weight, None, None, None, *options, True)
refused(op, x, weight, norm, x, None, *options, False)
refused(op, x, weight, norm, None, norm, *options, True)
gradients = x, statistics, statistics
saved = x, weight, norm
refused(backward, *gradients, x, x, statistics, x, x, depthwise, norm, None, None, *options, False, True, True)
refused(backward, *gradients, x, x, statistics, None, *saved, None, None, *options, False, True, True)
refused(backward, *gradients, None, x, statistics, None, *saved, None, None, *options, True, True, True)
refused(backward, *gradients, x, x, statistics, x, *saved, x, norm, *options, False, True, True)
assert op(x, weight, norm, None, None, *options, False)[3].numel() == 0
assert op(x, weight, norm, x, norm, *options, True)[3].shape == x.shape
for wanted in ((True, False), (False, True), (False, False)):
    results = backward(*gradients, None, x, statistics, None, *saved, None, None, *options, False, *wanted)
    assert [result.numel() > 0 for result in results] == [wanted[0], wanted[1], wanted[0], False, False]
    assert not wanted[0] or results[2].shape == norm.shape
    results = backward(*gradients, x, x, statistics, x, *saved, x, norm, *options, True, *wanted)
    assert [result.numel() > 0 for result in results] == [wanted[0], wanted[1], *[wanted[0]] * 3]
    results = backward(*gradients, x, x, statistics, x, *saved, None, None, *options, False, *wanted)
    assert [result.numel() > 0 for result in results] == [wanted[0], wanted[1], wanted[0], False, False]
"""


def test_norm_conv_stores_its_input_only_if_asked_to(library: Path) -> None:
    """Results that are not asked for are empty; arguments that do not fit together are refused."""
    assert _run(library, "-c", _STORED).split() == ["refused"] * 8


_EARLY = """
#include <cstring>

#include "cuda/device.h"

using namespace hne;

int main(int, char** arguments) {
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  alignas(16) static char memory[16];
  run_blocks(!is("usual launch"), 2, 32, 16, [&] {
    if (is("usual launch") || (is("no wait") && threadIdx.x == 31)) return;
    if (is("next kernel before the wait")) launch_next_kernel();
    if (is("copy before the wait")) copy16(shared_memory(), memory, true);
    prefetch(memory);
    wait_for_previous_kernel();
    launch_next_kernel();
    copy16(shared_memory(), memory, true);
    copy_commit();
    copy_wait<0>();
  });
}
"""


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that launches a kernel before the previous one has ended."""
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    source = tmp_path_factory.mktemp("early") / "early.cpp"
    source.write_text(_EARLY)
    return emulation.build_program(source)


@pytest.mark.parametrize(
    ("kernel", "stopped"),
    [
        ("usual launch", ""),
        ("right", ""),
        ("no wait", "a thread ended without waiting for the previous kernel"),
        ("next kernel before the wait", "the next kernel is launched before the wait for the previous one"),
        ("copy before the wait", "a copy starts before the wait for the previous kernel"),
    ],
)
def test_the_emulation_stops_kernels_that_start_too_early(kernel: str, stopped: str, early: Path) -> None:
    result = subprocess.run([early, kernel], capture_output=True, text=True, check=False)
    assert (result.returncode != 0) == bool(stopped)
    assert stopped in result.stderr

"""The choice of a backend, threads, and the instruction sets of the C++ library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from called import OpsOfOurs
from cases import CASES, LAYERS, cast, check, cotangents, evaluate, representative
from placements import PLACEMENTS, Placement
from threads import on_threads

import hne_kernels as K
from hne_kernels import dispatch, extension

NAMES = ("reference", "cpp", "cuda", "triton")


def _served_by_ours(backend: str | None = None) -> bool:
    """Whether a registered op computes prefix_mean now."""
    with OpsOfOurs() as ops:
        K.prefix_mean(torch.ones(2, 1, 1))
    return bool(ops.called)


def test_every_backend_is_usable_or_says_why_not() -> None:
    usable, unusable = K.available_backends(), K.unavailable_backends()
    assert sorted([*usable, *unusable]) == sorted(NAMES)
    assert {"reference", "cpp"} <= set(usable)
    assert all(len(reason) > 10 for reason in unusable.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_usable_backend_is_tested(name: str) -> None:
    if name in K.unavailable_backends():
        pytest.skip(K.unavailable_backends()[name])
    assert name in {place.backend for place in PLACEMENTS}


def test_left_alone_the_compiled_one_serves() -> None:
    if "HNE_BACKEND" in os.environ:
        pytest.skip("HNE_BACKEND is set")
    assert _served_by_ours()


def test_use_backend_nests_and_restores() -> None:
    before = _served_by_ours()
    with K.use_backend("reference"):
        assert not _served_by_ours()
        with K.use_backend("cpp"):
            assert _served_by_ours()
        assert not _served_by_ours()
        with pytest.raises(KeyError), K.use_backend("cpp"):
            raise KeyError
        assert not _served_by_ours()
    assert _served_by_ours() == before


@pytest.mark.parametrize("case", representative(), ids=lambda case: case.label)
def test_every_op_follows_the_choice(case: Any, rng: torch.Generator) -> None:
    inputs = case.inputs(rng)
    for name, ours in (("cpp", True), ("reference", False)):
        with K.use_backend(name), OpsOfOurs() as ops:
            case(inputs)
        assert (case.op in {name.split()[-1] for name in ops.called}) == ours


@pytest.mark.parametrize("name", ["cudnn", "", "CPP"])
def test_unknown_backend(name: str) -> None:
    expected = rf"backend: expected one of {', '.join(NAMES)}, got '{name}'"
    with pytest.raises(ValueError, match=expected), K.use_backend(name):
        pass


@pytest.mark.parametrize("name", sorted(K.unavailable_backends()))
def test_unavailable_backend_says_why(name: str) -> None:
    with (
        pytest.raises(RuntimeError, match=f"backend '{name}' is not available: .{{10}}"),
        K.use_backend(name),
    ):
        pass


def test_chosen_backend_that_cannot_serve_a_dtype() -> None:
    half = torch.ones(2, 1, 1, dtype=torch.float16)
    with (
        K.use_backend("cpp"),
        pytest.raises(RuntimeError, match=r"backend 'cpp' cannot serve this call: .*got torch.float16"),
    ):
        K.prefix_mean(half)


def test_automatic_choice_falls_back(rng: torch.Generator) -> None:
    """PyTorch serves a dtype that no kernel supports."""
    logits = torch.randn(3, 2, 4, generator=rng).half()
    want = torch.stack([logits[:1].mean(0), logits[:2].mean(0), logits.mean(0)])
    torch.testing.assert_close(K.prefix_mean(logits), want)


# --- GPUs that a backend cannot serve ----------------------------------------------------------------------

_DEFAULT_TARGETS = "sm_80 sm_90a compute_90"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Stands in for a GPU and a build: `gpu(capability, targets, triton)` returns a tensor on that GPU."""

    def stand_in(capability: tuple[int, int], targets: str = _DEFAULT_TARGETS, triton: bool = True) -> Any:
        monkeypatch.setattr(dispatch, "_DEFAULT", None)
        monkeypatch.setitem(dispatch._UNUSABLE, "cuda", None)
        monkeypatch.setitem(dispatch._UNUSABLE, "triton", None if triton else "not installed")
        monkeypatch.setattr(dispatch, "_DEVICES", {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)})
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
        monkeypatch.setattr(extension, "build_info", lambda: {"cuda_targets": targets})
        extension.gpu_refusal.cache_clear()
        dispatch._warn_once.cache_clear()
        return SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)

    yield stand_in
    extension.gpu_refusal.cache_clear()
    dispatch._warn_once.cache_clear()


@pytest.mark.parametrize(
    ("capability", "targets"),
    [
        ((8, 0), _DEFAULT_TARGETS),
        ((8, 6), _DEFAULT_TARGETS),
        ((8, 9), _DEFAULT_TARGETS),
        ((9, 0), _DEFAULT_TARGETS),
        ((10, 0), _DEFAULT_TARGETS),
        ((10, 3), _DEFAULT_TARGETS),
        ((12, 0), _DEFAULT_TARGETS),
        ((12, 1), "sm_120"),
        ((9, 0), "sm_90a"),
        ((8, 9), "sm_86"),
        ((10, 0), "sm_90 compute_90"),
        ((10, 3), "sm_100f"),
    ],
)
def test_a_gpu_that_the_cuda_library_has_code_for(gpu: Any, capability: tuple[int, int], targets: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.backend_for(gpu(capability, targets)) == "cuda"
    assert {"cuda", "triton"} <= set(K.available_backends())


@pytest.mark.parametrize(
    ("capability", "targets"),
    [
        ((8, 0), "sm_90a"),
        ((10, 0), "sm_90a"),
        ((12, 0), "sm_90a"),
        ((8, 0), "sm_86"),
        ((9, 0), "sm_80"),
        ((10, 0), "sm_80 sm_90a"),
        ((12, 0), "sm_80 sm_90"),
        ((12, 0), "sm_100"),
        ((12, 0), "sm_100f"),
        ((12, 1), "sm_120a"),
        ((8, 6), "compute_90"),
        ((10, 0), "compute_90a"),
        ((9, 0), "compute_100"),
    ],
)
@pytest.mark.parametrize("triton", [True, False])
def test_a_gpu_that_the_cuda_library_has_no_code_for(
    gpu: Any, capability: tuple[int, int], targets: str, triton: bool
) -> None:
    """The next backend serves it, with one warning; `cuda` by name is an error. Both give the reason."""
    on_gpu, other = gpu(capability, targets, triton), "triton" if triton else "reference"
    number = ".".join(map(str, capability))
    reason = f"the CUDA library has code for {', '.join(targets.split())}, Card has compute capability {number} "
    reason = re.escape(f"{reason}(rebuild with TORCH_CUDA_ARCH_LIST={number})")
    with pytest.warns(UserWarning, match=f"{reason}; the backend '{other}' serves it") as warned:
        assert [dispatch.backend_for(on_gpu) for _ in range(3)] == [other] * 3
    assert len(warned) == 1
    with K.use_backend("cuda"), pytest.raises(RuntimeError, match=f"backend 'cuda' cannot serve this call: {reason}"):
        dispatch.backend_for(on_gpu)
    assert re.fullmatch(reason, K.unavailable_backends()["cuda"])
    assert "cuda" not in K.available_backends()


@pytest.mark.parametrize("capability", [(7, 5), (5, 2)])
@pytest.mark.parametrize("targets", [_DEFAULT_TARGETS, "sm_90a", ""])
def test_an_old_gpu_is_served_by_the_reference_with_one_warning(
    gpu: Any, capability: tuple[int, int], targets: str
) -> None:
    on_gpu = gpu(capability, targets)
    reason = rf"need compute capability 8\.0, Card has {capability[0]}\.{capability[1]}"
    with pytest.warns(UserWarning, match=f"{reason}; the backend 'reference' serves it, slowly") as warned:
        assert [dispatch.backend_for(on_gpu) for _ in range(3)] == ["reference"] * 3
    assert len(warned) == 1
    for backend in ("cuda", "triton"):
        with K.use_backend(backend), pytest.raises(RuntimeError, match=reason):
            dispatch.backend_for(on_gpu)
        assert re.search(reason, K.unavailable_backends()[backend])


def test_one_of_two_gpus_is_served(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0), "sm_90a")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 0), (9, 0))[index])
    first, second = (SimpleNamespace(device=torch.device("cuda", i), dtype=torch.float32) for i in range(2))
    with pytest.warns(UserWarning, match="has compute capability 8"):
        assert dispatch.backend_for(first) == "triton"
    assert dispatch.backend_for(second) == "cuda"
    assert "cuda" in K.available_backends()


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


_REPORT = """
import torch, hne_kernels as K
from torch.utils._python_dispatch import TorchDispatchMode
class Ours(TorchDispatchMode):
    names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hne":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))
with Ours() as ours:
    K.prefix_mean(torch.ones(2, 1, 1))
print("cpp" if ours.names else "reference")
"""


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_environment_chooses(name: str) -> None:
    result = _python(_REPORT, HNE_BACKEND=name)
    assert result.stdout.strip() == name, result.stderr


def test_environment_with_an_unknown_backend() -> None:
    result = _python(_REPORT, HNE_BACKEND="mkl")
    assert result.returncode != 0
    assert "expected one of reference, cpp, cuda, triton, got 'mkl'" in result.stderr


# --- threads -----------------------------------------------------------------------------------------------


def _gradients(case: Any, inputs: dict[str, Any], rng: torch.Generator) -> list[torch.Tensor]:
    return cotangents(case, cast(inputs, torch.float64), rng) if case.differentiable else []


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", representative(), ids=lambda case: case.label)
def test_any_number_of_threads(case: Any, threads: int, rng: torch.Generator) -> None:
    inputs = case.inputs(rng)
    grads = [grad.float() for grad in _gradients(case, inputs, rng)]
    with on_threads(threads), K.use_backend("cpp"):
        outcome = evaluate(case, inputs, grads)
    check(case, "cpp", inputs, outcome, grads)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_keep_the_cores_that_they_may_use(threads: int) -> None:
    """Threads that were confined to one core may use all cores afterwards."""
    result = _python(f"THREADS = {threads}\n{_CONFINED}")
    assert result.stdout.split() == ["right", "free"], result.stderr


_CONFINED = """
import os
import torch
import hne_kernels as K

torch.set_num_threads(THREADS)
cores = os.sched_getaffinity(0)
x, weight = torch.randn(4, 8, 9, 9, 16), torch.randn(8, 16, 16, 1, 1)
want = K.branch_conv2d(x, weight, replicate=2)
right = True
for _ in range(20):
    tasks = [int(task) for task in os.listdir("/proc/self/task")]
    for allowed in ({min(cores)}, cores):  # confine the running threads to one core, and free them
        for task in tasks:
            os.sched_setaffinity(task, allowed)
    right &= torch.equal(K.branch_conv2d(x, weight, replicate=2), want)
tasks = [int(task) for task in os.listdir("/proc/self/task")]
free = all(os.sched_getaffinity(task) == cores for task in tasks)
print("right" if right else "wrong", "free" if free else "bound")
"""


def test_two_python_threads_at_once(backend: Placement, rng: torch.Generator) -> None:
    """Kernels share no scratch memory: the results of each thread are right."""
    work = []
    for case in representative():
        inputs = case.inputs(rng, backend.dtype, backend.device)
        grads = [g.to(backend.device, backend.dtype) for g in _gradients(case, inputs, rng)]
        work.append((case, inputs, grads))
    rounds = range(1 if backend.interpreted else 5)
    start = threading.Barrier(2)

    def run(order: int) -> list[tuple[Any, ...]]:
        start.wait()
        return [(*call, evaluate(*call)) for _ in rounds for call in work[::order]]

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(run, order) for order in (1, -1)]
        results = [result for future in running for result in future.result()]
    for case, inputs, grads, outcome in results:
        check(case, backend.backend, inputs, outcome, grads)


# --- instruction sets --------------------------------------------------------------------------------------

_LEVELS = [level.strip() for level in extension.cpu_library().cpu_capabilities_supported().split(",")]

# The core of the parity suite in one process: every op, two dtypes.
_CORE = """
import sys, torch
sys.path.insert(0, {folder!r})
from cases import CASES, cast, check, cotangents, evaluate
import hne_kernels as K
from hne_kernels import dispatch, extension
assert extension.cpu_library().cpu_capability() == {level!r}
assert extension.cpu_library().cpu_bfloat16() == {bfloat16!r}
rng = torch.Generator().manual_seed({seed})
for dtype in (torch.float32, torch.bfloat16):
    for case in CASES:
        inputs = case.inputs(rng, dtype)
        grads = [] if not case.differentiable else [
            g.to(dtype) for g in cotangents(case, cast(inputs, torch.float64), rng)]
        with K.use_backend("cpp"):
            outcome = evaluate(case, inputs, grads)
        check(case, "cpp", inputs, outcome, grads)
print("checked", len(CASES))
"""


def _multiplies_bfloat16(products: str) -> bool:
    """Whether this machine has these instructions for bfloat16."""
    code = "from hne_kernels import extension; extension.cpu_library().cpu_bfloat16()"
    return _python(code, HNE_CPU_BF16=products).returncode == 0


@pytest.mark.parametrize(
    ("level", "bfloat16"), [("portable", "portable"), ("avx2", "widened"), ("avx512", "avx512"), ("avx512", "amx")]
)
def test_instruction_sets(level: str, bfloat16: str, rng: torch.Generator) -> None:
    """Parity with every instruction set of this machine.

    glibc's MALLOC_PERTURB_ fills the library's scratch buffers with large numbers, so that uninitialised reads show.
    """
    if level not in _LEVELS:
        pytest.skip(f"this machine has {', '.join(_LEVELS)}")
    if not _multiplies_bfloat16(bfloat16):
        if bfloat16 == "amx":
            pytest.skip("this machine has no amx")
        bfloat16 = "portable"
    core = _CORE.format(folder=os.path.dirname(cases.__file__), level=level, bfloat16=bfloat16, seed=rng.initial_seed())
    result = _python(core, HNE_CPU_CAPABILITY=level, HNE_CPU_BF16=bfloat16, MALLOC_PERTURB_="128", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"checked {len(CASES)}"


_BITS = """
import sys, torch
sys.path.insert(0, {folder!r})
from cases import LAYERS, evaluate
for case in LAYERS:
    inputs = case.inputs(torch.Generator().manual_seed({seed}), torch.bfloat16)
    print(case.name, [result.view(torch.int16).tolist() for result in evaluate(case, inputs, []).results])
"""


def test_layers_with_even_channels_multiply_bfloat16(rng: torch.Generator) -> None:
    """Their features are rounded between layers, those of all others are not."""
    code = _BITS.format(folder=os.path.dirname(cases.__file__), seed=rng.initial_seed())
    outputs = [_python(code, HNE_CPU_BF16=value).stdout.splitlines() for value in "01"]
    assert len(outputs[0]) == len(LAYERS)
    changed = {case.name for case, *lines in zip(LAYERS, *outputs, strict=True) if lines[0] != lines[1]}
    assert changed == {
        "even channels",
        "even sums",
        "mean-first",
        "narrow stem",
        "network",
        "small maps",
        "small maps, features and mean",
        "wide stem",
    }


def test_best_instruction_set_by_default() -> None:
    code = "from hne_kernels import extension; print(extension.cpu_library().cpu_capability())"
    assert _python(code, HNE_CPU_CAPABILITY="").stdout.strip() == _LEVELS[-1]


def test_unknown_instruction_set() -> None:
    code = "import torch, hne_kernels as K; K.prefix_mean(torch.ones(1, 1, 1))"
    result = _python(code, HNE_CPU_CAPABILITY="sse9")
    assert result.returncode == 1, "an exception, not a crash"
    assert "HNE_CPU_CAPABILITY: expected portable, avx2 or avx512, got sse9" in result.stderr


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ("sse9", "HNE_CPU_BF16: expected 0, 1, widened, portable, avx512 or amx, got sse9"),
        ("avx512", "HNE_CPU_BF16: these products are not supported here: avx512"),
    ],
)
def test_unknown_products_of_bfloat16(products: str, message: str) -> None:
    code = """
import torch, hne_kernels as K
x, weight = torch.ones(1, 1, 1, 1, 2).bfloat16(), torch.ones(1, 2, 2, 1, 1).bfloat16()
K.branch_conv2d(x, weight)
"""
    result = _python(code, HNE_CPU_BF16=products, HNE_CPU_CAPABILITY="portable")
    assert result.returncode == 1, "an exception, not a crash"
    assert message in result.stderr


def test_import_leaves_the_compiler_alone() -> None:
    """Importing the compiler takes longer than everything else together; sympy is for its shapes."""
    code = "import sys, hne; assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    result = _python(code, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr

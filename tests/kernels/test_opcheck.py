"""torch.library.opcheck on every registered op, backward ops included.

The samples are recorded: whatever reaches ``torch.ops.hne`` while the public functions run forwards and
backwards, once and twice, is checked with the very arguments it came with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, GEOMETRIES, TRAINING_OPS, Case, Inputs, representative
from placements import Placement
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("one_thread")

INFERENCE = {"fused_conv2d", "fused_bottleneck", "fused_bottleneck_chain"}
# Not functions of tensors: ops with prepared layers, which are not traced either (test_fused_layers.py), and a switch.
NO_FUNCTIONS = {"prepare_layers", "fused_layers", "prepare_quantized_layers", "quantized_layers", "allow_tf32"}
# Ops that cannot be differentiated (again), while opcheck differentiates the sum of all results.
ONCE = {*(f"{op}_backward" for op in TRAINING_OPS), "hierarchical_distillation_loss"}

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Recorder(TorchDispatchMode):
    """Records the arguments of the calls of the package's ops, one call for each combination of shapes and values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {}
        self._seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "hne":
            name = func.name().removeprefix("hne::")
            look = str([name, *map(_look, args), kwargs])
            if look not in self._seen:
                self._seen.add(look)
                self.calls.setdefault(name, []).append((args, kwargs))
        return func(*args, **kwargs)


def _look(value: Any) -> Any:
    if isinstance(value, list):
        return [_look(part) for part in value]
    return (value.shape, value.stride()) if isinstance(value, Tensor) else value


def _record(case: Case, inputs: Inputs) -> dict[str, list[Call]]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    with _Recorder() as recorder:
        results = [r for r in case({**inputs, **leaves}) if r.requires_grad]
        if results:
            scalar = sum(r.square().sum() for r in results)
            first = torch.autograd.grad(scalar, list(leaves.values()), create_graph=True)
            if case.op not in (*TRAINING_OPS, "hierarchical_distillation_loss"):
                torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))
    return recorder.calls


def _registered(place: Placement) -> set[str]:
    """The ops of a backend with a kernel for the device."""
    keys = (place.device.upper(), "CompositeExplicitAutograd")
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hne::")]
    served = [op for op in ops if any(torch._C._dispatch_has_kernel_for_dispatch_key(op, key) for key in keys)]
    names = {op.removeprefix("hne::") for op in served}
    triton = {name for name in names if name.startswith("triton_")}
    return triton if place.backend == "triton" else names - triton - NO_FUNCTIONS


def _samples() -> list[Case]:
    """The general case of every op, and special shapes: empty, one pixel, no bias."""
    chosen = representative()
    for op in ("branch_conv2d", "branch_depthwise_conv2d"):
        chosen += [c for c in CASES if c.op == op and c.name.startswith((str(GEOMETRIES[0]), "G5r2B0"))]
    for op in ("prefix_mean", "prefix_logits", "hierarchical_distillation_loss"):
        chosen += [c for c in CASES if c.op == op][:1]
    chosen += [c for c in CASES if c.op == "branch_normalize" and "residual" not in c.name][:1]
    chosen += [c for c in CASES if c.op == "batch_norm_scale_shift" and ("untracked" in c.name or "plain" in c.name)]
    chosen += [c for op in TRAINING_OPS for c in CASES if c.op == op and "as-it-is" in c.name][:1]
    chosen += [c for c in CASES if c.op == "fused_bottleneck" and "identity" in c.name][:1]
    return chosen


def _copy(value: Any, grad: bool) -> Any:
    if isinstance(value, list):
        return [_copy(part, grad) for part in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(grad and value.is_floating_point())


@pytest.fixture
def registered(backend: Placement) -> Placement:
    """The backends whose ops are registered with PyTorch."""
    if backend.backend == "reference":
        pytest.skip("plain PyTorch: nothing of ours is registered")
    return backend


@pytest.mark.parametrize("case", _samples(), ids=str)
def test_opcheck(case: Case, registered: Placement, rng: torch.Generator) -> None:
    if registered.interpreted and case.name not in {c.name for c in representative()}:
        pytest.skip("the interpreter takes minutes: of each op, the general case")
    for name, calls in _record(case, case.inputs(rng, torch.float32, registered.device)).items():
        op = getattr(torch.ops.hne, name).default
        for args, kwargs in calls:
            plain = tuple(_copy(value, grad=False) for value in args)
            if name.removeprefix("triton_") in INFERENCE:
                torch.library.opcheck(op, plain, kwargs)
                continue
            torch.library.opcheck(op, plain, kwargs, test_utils="test_aot_dispatch_dynamic")
            declared = op._schema.arguments[: len(args)]
            written = [argument.alias_info is not None for argument in declared]
            wanting = tuple(_copy(value, grad=not w) for value, w in zip(args, written, strict=True))
            tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
            if name.removeprefix("triton_") not in ONCE:
                tests.append("test_aot_dispatch_dynamic")
            torch.library.opcheck(op, wanting, kwargs, test_utils=tests)


def test_every_registered_op_is_checked(registered: Placement, rng: torch.Generator) -> None:
    recorded = set()
    for case in representative():
        inputs = case.inputs(rng, torch.float32, registered.device)
        with FakeTensorMode() as mode:  # no kernel runs
            fake = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in inputs.items()}
            recorded |= _record(case, fake).keys()
    assert recorded == _registered(registered)


def test_fake_strides_are_the_real_ones(registered: Placement, rng: torch.Generator) -> None:
    """Shape inference gives the strides of the real results, also for inputs that are not contiguous."""
    for case in representative():
        inputs = case.inputs(rng, torch.float32, registered.device)
        with torch.no_grad():
            for turn in (lambda t: t, lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1)):
                turned = {n: turn(v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
                real = case(turned)
                with FakeTensorMode() as mode:
                    faked = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in turned.items()}
                    fake = case(faked)
                for one, other in zip(real, fake, strict=True):
                    assert (one.shape, one.stride(), one.dtype) == (
                        other.shape, other.stride(), other.dtype
                    ), case.op  # fmt: skip

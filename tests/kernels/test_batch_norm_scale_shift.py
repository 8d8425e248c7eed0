"""``batch_norm_scale_shift`` agrees with ``nn.BatchNorm2d``, and changes the running statistics as it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from placements import Placement
from torch import Tensor, nn

import hne_kernels as K

BRANCHES, CHANNELS = 3, 5


def _batch_norm(rng: torch.Generator, place: Placement, dtype: torch.dtype | None = None, **settings: Any) -> Any:
    bn = nn.BatchNorm2d(BRANCHES * CHANNELS, **settings)
    for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        if tensor is not None:
            tensor.data = torch.rand(tensor.shape, generator=rng)
    return bn.to(place.device, dtype or place.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[G, C]`` of ``[batch, G * C, height, width]``."""
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(1).view(BRANCHES, CHANNELS), rows.var(1, correction=0).view(BRANCHES, CHANNELS)


def _state(bn: nn.BatchNorm2d) -> dict[str, Any]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {name: getattr(bn, name) for name in names}


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.5}], ids=lambda s: "-".join(s)
)
def test_as_pytorch(momentum: float, settings: dict[str, Any], backend: Placement, rng: torch.Generator) -> None:
    """The normalised values, their gradients and the state after two batches."""
    bn = _batch_norm(rng, backend, momentum=momentum, **settings)
    with torch.no_grad():
        other = nn.BatchNorm2d(BRANCHES * CHANNELS, momentum=momentum, **settings).double()
        other.load_state_dict(bn.state_dict())
    for _ in range(2):
        x = (torch.randn(4, BRANCHES * CHANNELS, 2, 3, generator=rng, dtype=torch.float64) + 3).requires_grad_()
        want = other(x)
        mean, var = (t.to(backend.device, backend.dtype) for t in _statistics(x))
        norm = K.batch_norm_scale_shift(mean, var, **_state(bn), count=24, momentum=momentum, eps=bn.eps)
        mean, scale, shift = norm.cpu().double().flatten(1)[:, None, :, None, None]
        got = (x - mean) * scale + shift
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        cotangent = torch.randn(x.shape, generator=rng, dtype=torch.float64)
        gradients = torch.autograd.grad(got, [x, *bn.parameters()], cotangent)
        wanted = torch.autograd.grad(want, [x, *other.parameters()], cotangent)
        for gradient, right in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient.cpu().double(), right, rtol=1e-4, atol=1e-4)
    for name, value in bn.named_buffers():
        torch.testing.assert_close(value.cpu().double(), other.get_buffer(name).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_values_have_no_variance(count: int, backend: Placement, rng: torch.Generator) -> None:
    bn = _batch_norm(rng, backend)
    before = {name: buffer.clone() for name, buffer in bn.named_buffers()}
    zeros = torch.zeros(BRANCHES, CHANNELS, device=backend.device)
    norm = K.batch_norm_scale_shift(zeros, zeros, **_state(bn), count=count)
    assert norm.isfinite().all()
    before["num_batches_tracked"] += 1  # the batch counts nevertheless, as in PyTorch
    torch.testing.assert_close(dict(bn.named_buffers()), before, rtol=0, atol=0)


def test_a_number_on_the_device(backend: Placement, rng: torch.Generator) -> None:
    """``total`` replaces ``count``."""
    mean, var = torch.randn(2, BRANCHES, CHANNELS, generator=rng).to(backend.device).square()
    by_number, by_tensor = (_batch_norm(rng, backend, affine=False) for _ in range(2))
    by_tensor.load_state_dict(by_number.state_dict())
    K.batch_norm_scale_shift(mean, var, **_state(by_number), count=7)
    total = torch.tensor(7.0, device=backend.device)
    K.batch_norm_scale_shift(mean, var, **_state(by_tensor), total=total, count=1)
    torch.testing.assert_close(dict(by_tensor.named_buffers()), dict(by_number.named_buffers()))


def test_a_part_of_the_branches(backend: Placement, rng: torch.Generator) -> None:
    """A leading slice is changed, and the rest of the running statistics stays."""
    bn = _batch_norm(rng, backend)
    before = {name: buffer.clone() for name, buffer in bn.named_buffers()}
    mean, var = torch.randn(2, 2, CHANNELS, generator=rng).to(backend.device).square()
    flat = [t[: 2 * CHANNELS] for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]
    norm = K.batch_norm_scale_shift(mean, var, *flat, count=9, momentum=0.5)
    for name, batch in (("running_mean", mean), ("running_var", var * 9 / 8)):
        now, then = bn.get_buffer(name), before[name]
        torch.testing.assert_close(now[: 2 * CHANNELS], (then[: 2 * CHANNELS] + batch.flatten()) / 2)
        assert torch.equal(now[2 * CHANNELS :], then[2 * CHANNELS :])
    gradients = torch.autograd.grad(norm.sum(), [bn.weight, bn.bias])
    for gradient in gradients:
        assert gradient[: 2 * CHANNELS].all()
        assert not gradient[2 * CHANNELS :].any()


@pytest.mark.parametrize("low", ["running", "parameters"])
def test_dtypes_may_differ(low: str, backend: Placement, rng: torch.Generator) -> None:
    """Running statistics or parameters in bfloat16, beside float32."""
    bn = _batch_norm(rng, backend, torch.float32)
    state = _state(bn)
    for name in ("running_mean", "running_var") if low == "running" else ("weight", "bias"):
        state[name] = state[name].detach().bfloat16()
    exact = {name: value.detach().cpu().clone() for name, value in state.items()}
    exact = {name: value.double() if value.is_floating_point() else value for name, value in exact.items()}
    mean, var = torch.randn(2, BRANCHES, CHANNELS, generator=rng).to(backend.device).square()
    parameters = [state[name].requires_grad_() for name in ("weight", "bias")]
    norm = K.batch_norm_scale_shift(mean, var, **state, count=9)
    with K.use_backend("reference"):
        want = K.batch_norm_scale_shift(mean.cpu().double(), var.cpu().double(), **exact, count=9)
    torch.testing.assert_close(norm.detach().cpu().double(), want, rtol=1e-5, atol=1e-6)
    assert norm.dtype == torch.float32
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if low == "running" else {"rtol": 1e-5, "atol": 1e-6}
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(state[name].cpu().double(), exact[name], **tolerance)
    for parameter, gradient in zip(parameters, torch.autograd.grad(norm.sum(), parameters), strict=True):
        assert (gradient.dtype, gradient.shape) == (parameter.dtype, parameter.shape)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_change_is_visible_to_autograd(mode: Any, backend: Placement, rng: torch.Generator) -> None:
    """Each written tensor has a new version, as after an operation in place of PyTorch, and nothing else has."""
    bn = _batch_norm(rng, backend)
    state = _state(bn)
    before = {name: tensor._version for name, tensor in state.items()}
    with mode():
        mean, var = torch.ones(2, BRANCHES, CHANNELS, device=backend.device)
        norm = K.batch_norm_scale_shift(mean, var, **state, count=4)
    written = {name for name, tensor in state.items() if tensor._version != before[name]}
    assert written == {"running_mean", "running_var", "num_batches_tracked"}
    assert norm.requires_grad == (mode is torch.enable_grad)


def test_saved_running_statistics_are_missed(backend: Placement, rng: torch.Generator) -> None:
    """Autograd refuses a gradient that would need the values before the change."""
    bn = _batch_norm(rng, backend)
    leaf = torch.ones(BRANCHES * CHANNELS, device=backend.device, requires_grad=True)
    product = leaf * bn.running_mean
    mean, var = torch.ones(2, BRANCHES, CHANNELS, device=backend.device)
    K.batch_norm_scale_shift(mean, var, **_state(bn), count=4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_running_statistics_of_one_value(backend: Placement) -> None:
    """Expanded running statistics have no place for each value."""
    mean, var = torch.ones(2, BRANCHES, CHANNELS, device=backend.device)
    one = torch.ones(1, device=backend.device)
    for wrong in (one.expand(BRANCHES * CHANNELS), one.expand(BRANCHES, CHANNELS)):
        for name in ("running_mean", "running_var"):
            state = {"running_mean": mean.clone(), "running_var": var.clone(), name: wrong}
            with pytest.raises(
                (RuntimeError, ValueError), match=r"place in memory for each value|single memory location"
            ):
                K.batch_norm_scale_shift(mean, var, **state, count=4)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_programs_change_the_state(dynamic: bool, double: Placement, rng: torch.Generator) -> None:
    """Flat buffers and slices of them, in one graph."""
    torch._dynamo.reset()
    bn = _batch_norm(rng, double, torch.float64)
    mean, var = torch.randn(2, 2, CHANNELS, generator=rng, dtype=torch.float64).to(double.device).square()

    def call(mean: Tensor, var: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        state = {name: t[: mean.numel()] if t.dim() else t for name, t in _state(bn).items()}
        return K.batch_norm_scale_shift(mean, var, **state, count=6) * bn.running_mean.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (call, compiled):
        fresh = _batch_norm(rng, double, torch.float64)
        fresh.load_state_dict(bn.state_dict())
        norm = function(mean, var, fresh)
        norm.square().sum().backward()
        results.append((norm.detach(), fresh.weight.grad, fresh.bias.grad, dict(fresh.named_buffers())))
    torch.testing.assert_close(results[1], results[0])


def test_checkpointing_computes_it_twice(backend: Placement, rng: torch.Generator) -> None:
    """Activation checkpointing repeats the call, and so the update, as with PyTorch's batch norm."""
    from torch.utils.checkpoint import checkpoint

    bn = _batch_norm(rng, backend)
    mean, var = torch.randn(2, BRANCHES, CHANNELS, generator=rng).to(backend.device).square()

    def call(mean: Tensor) -> Tensor:
        return K.batch_norm_scale_shift(mean, var, **_state(bn), count=6).square()

    checkpoint(call, mean.requires_grad_(), use_reentrant=False).sum().backward()
    assert bn.num_batches_tracked == 2

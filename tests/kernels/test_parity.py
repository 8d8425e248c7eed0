"""Results and gradients of every op, on every backend and in every dtype, agree with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import (
    CASES,
    Case,
    Geometry,
    Inputs,
    cast,
    check,
    convolution,
    cotangents,
    evaluate,
    expected,
    norm_conv,
    prefix_logits,
    representative,
    tensors,
)
from norm_cases import materializing_norm_conv
from placements import SEED, Placement
from torch import Tensor

import hne_kernels as K


def _has_many_filters(inputs: Inputs) -> bool:
    """Whether a convolution has more branches than any network: tiles for all multiprocessors of a large GPU."""
    weight = inputs.get("weight")
    return isinstance(weight, Tensor) and weight.dim() > 3 and weight.shape[0] >= 24


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case: Case, placement: Placement, rng: torch.Generator) -> None:
    if placement.interpreted:
        # A plain convolution and one between two batch norms share a kernel: of each shape, one of the two is tried.
        turn, others = divmod(CASES.index(case), 2 if placement.dtype == torch.float32 else 8)
        if others or (turn + SEED) % 4:
            pytest.skip("the interpreter takes minutes: 1/8 of the cases, in half precision 1/32, in four turns")
    inputs = case.inputs(rng, placement.dtype, placement.device)
    if placement.interpreted and _has_many_filters(inputs):
        pytest.skip("the number of branches chooses kernels of the CUDA library; Triton's are the same for any number")
    grads = []
    if case.differentiable:
        exact = cast(inputs, torch.float64)
        grads = [g.to(placement.device, placement.dtype) for g in cotangents(case, exact, rng)]
    actual = evaluate(case, inputs, grads)
    check(case, placement.backend, inputs, actual, grads)
    first = next(iter(tensors(inputs).values()))
    statistics = case.op == "branch_pointwise_stats"  # which are float32 at least
    assert actual.results[0].dtype == (torch.promote_types(first.dtype, torch.float32) if statistics else first.dtype)
    assert actual.results[0].is_contiguous() or placement.backend == "reference"


# --- memory layouts ----------------------------------------------------------------------------------------


def _transposed(tensor: Tensor) -> Tensor:
    """The last dimension is the slowest in memory, as the channels of NCHW data are."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def _leading_slice(tensor: Tensor) -> Tensor:
    """A leading slice of a longer tensor, like the weights of a smaller ensemble; the rest is NaN."""
    longer = tensor.new_full((tensor.shape[0] + 2, *tensor.shape[1:]), _absent(tensor))
    longer[: tensor.shape[0]] = tensor
    return longer[: tensor.shape[0]]


def _channel_slice(tensor: Tensor, more: int = 3) -> Tensor:
    """The first entries of every dimension but the first, as the weights of a slimmable model: branches and rows have
    strides of their own. The other entries, `more` of each dimension, are NaN."""
    spatial = tensor.dim() - 2 if tensor.dim() > 3 else tensor.dim()  # a kernel is whole
    sizes = [size if d == 0 or d >= spatial else size + more for d, size in enumerate(tensor.shape)]
    wider = tensor.new_full(sizes, _absent(tensor))
    view = wider[tuple(slice(size) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def _misaligned(tensor: Tensor) -> Tensor:
    """Contiguous, but one value after an aligned address; surrounded by NaN."""
    longer = tensor.new_full((tensor.numel() + 2,), _absent(tensor))
    longer[1:-1] = tensor.flatten()
    return longer[1:-1].view(tensor.shape)


def _every_other(tensor: Tensor) -> Tensor:
    """Every second entry of the first dimension, and a window of the last one; NaN in between."""
    wider = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:-1], tensor.shape[-1] + 3), _absent(tensor))
    if tensor.dim() == 1:
        wider = tensor.new_full((2 * tensor.shape[0] + 1,), _absent(tensor))
        view = wider[1::2]
    else:
        view = wider[::2, ..., 2:-1]
    view.copy_(tensor)
    return view


def _expanded(tensor: Tensor) -> Tensor:
    """The first branch, expanded to all (stride 0)."""
    return tensor[:1].expand_as(tensor)


def _expanded_within(tensor: Tensor) -> Tensor:
    """The first entry of the last dimension, expanded to all (stride 0)."""
    return tensor[..., :1].expand_as(tensor)


def _absent(tensor: Tensor) -> float:
    return float("nan") if tensor.is_floating_point() else -(10**6)


LAYOUTS = [_transposed, _leading_slice, _channel_slice, _misaligned, _every_other, _expanded, _expanded_within]


def _relayout(inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    return {name: layout(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("case", representative(), ids=lambda c: c.label)
def test_memory_layouts(
    case: Case, layout: Callable[[Tensor], Tensor], backend: Placement, rng: torch.Generator
) -> None:
    inputs = _relayout(case.inputs(rng, backend.dtype, backend.device), layout)
    before = {name: tensor.clone() for name, tensor in tensors(inputs).items()}
    grads = []
    if case.differentiable:
        exact = cast(inputs, torch.float64)
        grads = [
            g.to(backend.device, backend.dtype) if g.dim() == 0
            else layout(g.to(backend.device, backend.dtype))
            for g in cotangents(case, exact, rng)
        ]  # fmt: skip
    check(case, backend.backend, inputs, evaluate(case, inputs, grads), grads)
    for name, tensor in tensors(inputs).items():
        assert torch.equal(tensor, before[name]), f"{name} was written to"


_WITH_WEIGHTS = (
    "branch_conv2d",
    "branch_depthwise_conv2d",
    "branch_norm_conv2d",
    "branch_pointwise_stats",
    "branch_pointwise_norm_conv2d",
    "prefix_logits",
)


@pytest.mark.skipif("cpp" not in K.available_backends(), reason="the other backends read strides in one way, or copy")
@pytest.mark.parametrize("case", [case for case in CASES if case.op in _WITH_WEIGHTS], ids=str)
def test_weights_that_are_slices_of_channels(case: Case, rng: torch.Generator) -> None:
    """The CPU's ways of packing differ with the shape: panels, transposed panels, Winograd's tiles, depthwise rows."""
    inputs = case.inputs(rng)
    inputs |= {name: _channel_slice(inputs[name]) for name in ("weight", "next_weight") if inputs.get(name) is not None}
    grads = [grad.float() for grad in cotangents(case, cast(inputs, torch.float64), rng)]
    with K.use_backend("cpp"):
        outcome = evaluate(case, inputs, grads)
    check(case, "cpp", inputs, outcome, grads)


_POINTWISE = [
    convolution("branch_conv2d", Geometry(2, 2, 3, 5, 4, 16, 24, 1, 1, 0), True),
    convolution("branch_conv2d", Geometry(1, 2, 2, 5, 4, 8, 40, 1, 2, 0, missing=1), True),
    convolution("branch_conv2d", Geometry(2, 1, 3, 9, 17, 3, 24, 1, 1, 0), False),
    convolution("branch_conv2d", Geometry(2, 1, 1, 1, 1, 264, 72, 1, 1, 0), True),
    norm_conv(Geometry(2, 2, 2, 5, 4, 16, 24, 1, 1, 0), "relu"),
    materializing_norm_conv(Geometry(2, 2, 2, 5, 4, 16, 8, 1, 1, 0), "relu", "normalised"),
    prefix_logits(4, 3, 64, 16, None, True),
    prefix_logits(3, 40, 264, 32, (1, 3), True),
]


@pytest.mark.parametrize("case", _POINTWISE, ids=str)
def test_filters_of_one_tap_that_are_aligned_slices(case: Case, backend: Placement, rng: torch.Generator) -> None:
    """Slices whose rows begin at multiples of 16 bytes: vectors of them are read where they are."""
    if backend.interpreted:
        pytest.skip("Triton's kernels read any strides in the same way: test_memory_layouts")
    inputs = case.inputs(rng, backend.dtype, backend.device)
    inputs["weight"] = _channel_slice(inputs["weight"], more=16)
    grads = [grad.to(backend.device, backend.dtype) for grad in cotangents(case, cast(inputs, torch.float64), rng)]
    check(case, backend.backend, inputs, evaluate(case, inputs, grads), grads)


@pytest.mark.any_level
@pytest.mark.parametrize("case", representative(differentiable=True), ids=lambda c: c.label)
def test_each_gradient_alone(case: Case, backend: Placement, rng: torch.Generator) -> None:
    """A gradient does not depend on the others that are computed with it."""
    inputs = case.inputs(rng, backend.dtype, backend.device)
    grads = [g.to(backend.device, backend.dtype) for g in cotangents(case, cast(inputs, torch.float64), rng)]
    want = expected(case, inputs, grads).gradients
    together = evaluate(case, inputs, grads).gradients
    for name in case.differentiable:
        leaf = inputs[name].detach().requires_grad_()
        results = case({**inputs, name: leaf})
        reached = [pair for pair in zip(results, grads, strict=False) if pair[0].requires_grad]
        (alone,) = torch.autograd.grad([r for r, _ in reached], leaf, [g for _, g in reached])
        torch.testing.assert_close(alone, together[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.cpu().double(), want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.any_level
@pytest.mark.parametrize("case", representative(differentiable=True), ids=lambda c: c.label)
def test_no_gradient_asked_none_recorded(case: Case, backend: Placement, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, backend.dtype, backend.device)
    assert not any(result.requires_grad for result in case(inputs))
    leaves = {name: inputs[name].requires_grad_() for name in case.differentiable}
    with torch.no_grad():
        assert not any(result.requires_grad for result in case({**inputs, **leaves}))


@pytest.mark.any_level
def test_one_result_differentiated_alone(backend: Placement, rng: torch.Generator) -> None:
    """Either of the two results of prefix_logits may have no gradient."""
    (case,) = (c for c in representative() if c.op == "prefix_logits")
    inputs = case.inputs(rng, backend.dtype, backend.device)
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    member, prefix = case({**inputs, **leaves})
    for which, result in enumerate((member, prefix)):
        grad = torch.randn(result.shape, generator=rng).to(result)
        zeros = [torch.zeros_like(member), torch.zeros_like(prefix)]
        zeros[which] = grad
        want = expected(case, inputs, zeros).gradients
        got = torch.autograd.grad(result, list(leaves.values()), grad, retain_graph=True)
        for gradient, right in zip(got, want.values(), strict=True):
            torch.testing.assert_close(gradient.cpu().double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variances_of_rows_far_from_the_first(dtype: torch.dtype, rng: torch.Generator) -> None:
    """On a CPU distances from the first row are summed, of bfloat16 rounded ones."""
    x = torch.full((1, 1, 50, 100, 2), 6.0).to(dtype)
    x[0, 0, 0, 0] = 0.369
    weight = torch.randn(1, 4, 2, 1, 1, generator=rng).to(dtype)
    norm = torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 1, 2).contiguous()
    _, var = K.branch_pointwise_stats(x, weight, norm)
    want = (x.double().view(-1, 2) @ weight.double().view(4, 2).T).var(0, correction=0)
    torch.testing.assert_close(var[0].double(), want, rtol=0.02, atol=0)


def test_variances_do_not_cancel(double: Placement, rng: torch.Generator) -> None:
    """The variance without the output is a sum of products of distances, not of large values."""
    x = torch.randn(2, 3, 7, 5, 16, generator=rng).to(double.device)
    weight = torch.randn(2, 40, 16, 1, 1, generator=rng).to(double.device)
    norm = torch.tensor([0.0, 1.0, 1000.0])[:, None, None].expand(3, 2, 16).to(double.device)
    _, var = K.branch_pointwise_stats(x, weight, norm)
    want = torch.einsum("gbhwi,goi->gbhwo", x.double(), weight[..., 0, 0].double()).flatten(1, 3).var(1, correction=0)
    torch.testing.assert_close(var.double(), want, rtol=2e-3, atol=0)


def test_a_large_map_is_written_past_the_cache(double: Placement, rng: torch.Generator) -> None:
    """The gradients of a feature map that fits no cache are right."""
    if double.backend != "cpp":
        pytest.skip("the other backends do not write past the cache")
    x, weight = torch.randn(2, 8, 32, 32, 3, generator=rng), torch.randn(2, 64, 3, 1, 1, generator=rng)
    norms = [torch.randn(3, 2, channels, generator=rng) for channels in (3, 64)]
    residual, cotangent = (torch.randn(2, 8, 32, 32, 64, generator=rng) for _ in range(2))

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, *norms, residual)]
        z = K.branch_pointwise_norm_conv2d(*leaves[:-1], residual=leaves[-1])[0]
        return list(torch.autograd.grad(z, leaves, cotangent.to(dtype)))

    got = gradients(torch.float32)
    with K.use_backend("reference"):
        want = gradients(torch.float64)
    for one, right in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=2e-5 * right.abs().max().item())


def test_the_gradient_of_a_sum_over_the_map_is_no_map(double: Placement, rng: torch.Generator) -> None:
    """A gradient that was expanded over pixels gives the same as a contiguous one."""
    (case,) = (c for c in representative() if c.op == "branch_pointwise_norm_conv2d")
    inputs = case.inputs(rng, torch.float64, double.device)
    leaves = {name: inputs[name].requires_grad_() for name in case.differentiable}
    z, *_ = case({**inputs, **leaves})
    for shape in ((2, 2, 1, 1, 4), (2, 2, 1, 2, 4)):
        grad = torch.randn(shape, generator=rng, dtype=torch.float64).to(double.device).expand_as(z)
        used = [leaf for name, leaf in leaves.items() if name != "next_weight"]
        got = torch.autograd.grad(z, used, grad, retain_graph=True)
        want = torch.autograd.grad(z, used, grad.contiguous(), retain_graph=True)
        torch.testing.assert_close(got, want)


# --- repeated calls ----------------------------------------------------------------------------------------


@pytest.mark.any_level
@pytest.mark.parametrize("case", representative(), ids=lambda c: c.label)
def test_same_result_every_time(case: Case, backend: Placement, rng: torch.Generator) -> None:
    """Bit for bit: no sum depends on the order of threads."""
    inputs = case.inputs(rng, backend.dtype, backend.device)
    grads = []
    if case.differentiable:
        grads = [g.to(backend.device, backend.dtype) for g in cotangents(case, cast(inputs, torch.float64), rng)]
    first = evaluate(case, inputs, grads)
    for _ in range(1 if backend.interpreted else 5):  # the interpreter has no threads
        for (name, one), (_, again) in zip(first.items(), evaluate(case, inputs, grads).items(), strict=True):
            assert torch.equal(one, again), name


@pytest.mark.any_level
def test_empty_batch_has_zero_weight_gradients(backend: Placement, rng: torch.Generator) -> None:
    """The gradient is an empty sum, zero, and not uninitialised memory."""
    for case in CASES:
        inputs = case.inputs(rng, backend.dtype, backend.device)
        first = next(iter(tensors(inputs).values()))
        if first.numel() or not case.differentiable:
            continue
        leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
        results = case({**inputs, **leaves})
        gradients = torch.autograd.grad(sum(r.sum() for r in results), list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            assert torch.equal(gradient, torch.zeros_like(inputs[name])), f"{case}: {name}"

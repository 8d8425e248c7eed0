"""The reference against the definitions, one branch at a time, with sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BOTTLENECKS, CASES, Case, cast, evaluate, expected, magnitude
from torch import Tensor
from torch.nn import functional as F

import hne_kernels as K


@pytest.fixture(autouse=True)
def _reference() -> object:
    with K.use_backend("reference"):
        yield


def _of(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if case.op == op], ids=lambda case: case.name)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """One branch, [B, H, W, C] with [C_out, C_in, k, k], by definition as a sum over windows."""
    k = weight.shape[-1]
    windows = F.pad(x, (0, 0, padding, padding, padding, padding))
    windows = windows.unfold(1, k, stride).unfold(2, k, stride)  # [B, H', W', C_in, k, k]
    return torch.einsum("bhwcij,ocij->bhwo", windows, weight) + bias


def _branches(inputs: dict, depthwise: bool = False) -> Tensor:
    outputs = []
    for g, weight in enumerate(inputs["weight"]):
        bias = weight.new_zeros(()) if inputs["bias"] is None else inputs["bias"][g]
        if depthwise:
            weight = torch.diag_embed(weight.movedim(0, -1)).movedim((-2, -1), (0, 1))
        x = inputs["x"][g // inputs["replicate"]]
        outputs.append(_convolve(x, weight, bias, inputs["stride"], inputs["padding"]))
    return torch.stack(outputs)


@_of("branch_conv2d")
def test_branch_conv2d(case: Case, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64)
    torch.testing.assert_close(case(inputs)[0], _branches(inputs))


@_of("branch_depthwise_conv2d")
def test_branch_depthwise_conv2d(case: Case, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64)
    torch.testing.assert_close(case(inputs)[0], _branches(inputs, depthwise=True))


_SUMS = [case for case in CASES if case.op in ("branch_conv2d", "branch_depthwise_conv2d", "fused_conv2d")]
_SUMS += [case for case in CASES if case.op == "prefix_logits"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", _SUMS, ids=str)
def test_sums_of_small_integers_are_exact_in_16_bits(case: Case, dtype: torch.dtype, rng: torch.Generator) -> None:
    """No partial sum is rounded, in whatever order and dtype the processor adds, so results and gradients are exact."""
    density = min(1.0, 8 / math.sqrt(case.terms))  # about 64 of the terms of the longest sum are not 0

    def small_integers(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return value.sign() * (torch.rand(value.shape, generator=rng) < density)

    exact = {name: small_integers(value) for name, value in case.inputs(rng, torch.float64).items()}
    grads = []
    if case.differentiable:
        # The results after the first are means, which are not integers.
        grads = [small_integers(torch.randn(case(exact)[0].shape, generator=rng, dtype=torch.float64))]
    want, sizes = expected(case, exact, grads), magnitude(case, exact, grads)
    got = evaluate(case, cast(exact, dtype), [grad.to(dtype) for grad in grads])
    for name in ("result 0", *(f"gradient of {name}" for name in case.differentiable)):
        one, right, size = (dict(outcome.items())[name] for outcome in (got, want, sizes))
        assert one.dtype == dtype
        assert (size <= 2 / torch.finfo(torch.bfloat16).eps).all(), "larger integers are not exact in bfloat16"
        assert torch.equal(one.double(), right), name


def _bend(x: Tensor, activation: str) -> Tensor:
    return x.clamp(*{"none": (None, math.inf), "relu": (0, None), "relu6": (0, 6)}[activation])


@_of("fused_conv2d")
def test_fused_conv2d(case: Case, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64)
    weight = K.unpack_weight(inputs["weight"], inputs["bias"].shape[1])
    want = _branches({**inputs, "weight": weight})
    if inputs["residual"] is not None:
        want = want + inputs["residual"][[g // inputs["residual_replicate"] for g in range(len(want))]]
    want = _bend(want, inputs["activation"])
    torch.testing.assert_close(case(inputs)[0], want)


@_of("fused_bottleneck")
def test_fused_bottleneck(case: Case, rng: torch.Generator) -> None:
    """Three convolutions and the sum, one after another (Tables 2 and 3)."""
    inputs = case.inputs(rng, torch.float64)
    got = case(inputs)[0]
    r, stride, bend = inputs["replicate"], inputs["stride"], inputs["activation"]
    for g in range(got.shape[0]):
        x = inputs["x"][g // r]

        def pointwise(x: Tensor, name: str, g: int = g, step: int = 1) -> Tensor:
            bias = inputs[f"{name}_bias"]
            weight = K.unpack_weight(inputs[name], bias.shape[1])[g]
            return _convolve(x, weight, bias[g], step, 0)

        filters = torch.diag_embed(inputs["depthwise"][g]).permute(2, 3, 0, 1)
        y = _bend(pointwise(x, "expand"), bend)
        y = _convolve(y, filters, inputs["depthwise_bias"][g], stride, filters.shape[-1] // 2)
        y = pointwise(_bend(y, bend), "project")
        if inputs["shortcut"] is not None:
            y = y + pointwise(x, "shortcut", step=stride)
        if inputs["identity"]:
            y = y + x
        torch.testing.assert_close(got[g], _bend(y, inputs["final_activation"]))


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_normalised_convolutions_are_a_network_with_batch_norm(depthwise: bool, rng: torch.Generator) -> None:
    """Values and gradients of torch's convolution and batch norm, without a normalised feature map in memory."""
    inputs = (3, 4) if depthwise else (3, 4, 4)
    x = torch.randn(3, 2, 5, 4, 4, generator=rng, dtype=torch.float64)
    first, second, gain, offset = (
        torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
        for shape in ((*inputs, 3, 3), (*inputs, 3, 3), (3, 4), (3, 4))
    )
    parameters = (first, second, gain, offset)
    y, mean, var = K.branch_norm_conv2d(x, first, padding=1)
    norm = torch.stack([mean, gain * (var + 1e-5).rsqrt(), offset])
    y, mean, var = K.branch_norm_conv2d(y, second, norm, activation="relu", padding=1)
    norm = torch.stack([mean, gain * (var + 1e-5).rsqrt(), offset])
    got = K.branch_normalize(y, norm, residual=x, activation="relu")

    def convolve(y: Tensor, filters: Tensor, g: int) -> Tensor:
        y = F.conv2d(y, filters[:, None] if depthwise else filters, padding=1, groups=4 if depthwise else 1)
        return F.batch_norm(y, None, None, gain[g], offset[g], True)

    def branch(g: int) -> Tensor:
        image = x[g].permute(0, 3, 1, 2)
        y = convolve(F.relu(convolve(image, first[g], g)), second[g], g)
        return F.relu(y + image).permute(0, 2, 3, 1)

    want = torch.stack([branch(g) for g in range(3)])
    torch.testing.assert_close(got, want)
    grad = torch.randn(want.shape, generator=rng, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(got, parameters, grad), torch.autograd.grad(want, parameters, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


@_of("prefix_mean")
def test_prefix_mean(case: Case, rng: torch.Generator) -> None:
    """Equation 1, and equation 5 for each ensemble."""
    inputs = case.inputs(rng, torch.float64)
    logits = inputs["logits"]
    sizes = inputs["sizes"] or K.default_sizes(len(logits))
    (got,) = case(inputs)
    assert len(got) == len(sizes)
    for mean, size in zip(got, sizes, strict=True):
        torch.testing.assert_close(mean, sum(logits[n] for n in range(size)) / size)


@_of("prefix_logits")
def test_prefix_logits(case: Case, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64)
    member, prefix = case(inputs)
    for n, features in enumerate(inputs["features"]):
        bias = None if inputs["bias"] is None else inputs["bias"][n]
        torch.testing.assert_close(member[n], F.linear(features, inputs["weight"][n], bias))
    torch.testing.assert_close(prefix, K.prefix_mean(member, inputs["sizes"]))


@pytest.mark.parametrize("models", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 2.0), (0.5, 2.0), (0.75, 1.0), (1.0, 3.0)])
def test_hierarchical_distillation_loss(models: int, alpha: float, temperature: float, rng: torch.Generator) -> None:
    """Equations 9 and 12, sample by sample and class by class."""
    batch, classes = 3, 4
    logits = torch.randn(models, batch, classes, generator=rng, dtype=torch.float64) * 3
    target = torch.randint(classes, (batch,), generator=rng)

    def probabilities(row: Tensor) -> list[float]:
        exponentials = [math.exp(value) for value in row.tolist()]
        return [value / sum(exponentials) for value in exponentials]

    independent = distilled = 0.0
    students = [size for size in (1, 2, 4, 8) if size < models]
    for b in range(batch):
        for n in range(models):
            independent -= math.log(probabilities(logits[n, b])[target[b]]) / batch
        teacher = probabilities(logits[:, b].mean(0) / temperature)
        for size in students:
            student = probabilities(logits[:size, b].mean(0) / temperature)
            for p, q in zip(teacher, student, strict=True):
                distilled -= p * math.log(q) / batch
    want = (1 - alpha) * independent + alpha * temperature**2 * distilled
    got = K.hierarchical_distillation_loss(logits, target, alpha=alpha, temperature=temperature)
    torch.testing.assert_close(got.item(), want, rtol=1e-12, atol=1e-12)


def test_teacher_gets_no_gradient(rng: torch.Generator) -> None:
    """With two leaves, the only student is the first leaf; the second one is not distilled."""
    logits = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    target = torch.randint(4, (3,), generator=rng)
    loss = K.hierarchical_distillation_loss(logits, target, alpha=1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0].abs().min() > 0
    assert not gradient[1].any()


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 33])
def test_pack_weight(channels: int, rng: torch.Generator) -> None:
    weight = torch.randn(3, channels, 5, 3, 3, generator=rng)
    packed = K.pack_weight(weight)
    panels = math.ceil(channels / 16)
    assert packed.shape == (3, panels, 3, 3, 5, 16)
    assert packed.is_contiguous()
    for o in range(panels * 16):
        filters = packed[:, o // 16, :, :, :, o % 16].permute(0, 3, 1, 2)
        want = weight[:, o] if o < channels else torch.zeros_like(filters)
        assert torch.equal(filters, want)
    assert torch.equal(K.unpack_weight(packed, channels), weight)


def test_bottleneck_samples_use_every_option() -> None:
    """Every option is used by some case, so that the comparisons above cover all options."""
    assert {b.join for b in BOTTLENECKS} == {"nothing", "identity", "shortcut"}
    assert {b.activation for b in BOTTLENECKS} == {"none", "relu", "relu6"}
    assert {b.final for b in BOTTLENECKS} == {"none", "relu", "relu6"}
    assert {b.stride for b in BOTTLENECKS} == {1, 2, 3}
    assert {b.k for b in BOTTLENECKS} == {1, 3, 5}

"""Judges the outcome of a case.

The yardstick is :mod:`hne_kernels.reference` in float64. A result may differ by rounding only, and a bound for that
is known: a sum of K products computed in any order is off by at most ``K eps sum |a_k b_k|``. The sum of magnitudes is
the op itself on absolute values, so :func:`magnitude` gives a bound for each element, however large or small the inputs
are.

Our kernels sum in float32 at least. PyTorch's kernels for 16-bit dtypes sum in float32 on some processors and in the
dtype itself on others, so eps is the dtype's for the reference. That bound is wide for long sums; test_reference.py
compares them exactly, on integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from case import KINK, NORMS, TRAINING_OPS, Case, Inputs, cast, normal, tensors
from torch import Tensor

import hne_kernels as K


@dataclass
class Outcome:
    """Results of a call and gradients of its differentiable inputs."""

    results: tuple[Tensor, ...]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def items(self) -> list[tuple[str, Tensor]]:
        return [(f"result {i}", t) for i, t in enumerate(self.results)] + [
            (f"gradient of {name}", t) for name, t in self.gradients.items()
        ]


def cotangents(case: Case, inputs: Inputs, rng: torch.Generator) -> list[Tensor]:
    """A float64 gradient for every differentiable result, zero where an activation bends."""
    with torch.no_grad(), K.use_backend("reference"):
        results = case(inputs)
        results = results[: len(results) - case.plain_results]
        grads = [normal(rng, *result.shape) for result in results]
        if inputs.get("activation", "none") != "none" and case.differentiable and case.op not in TRAINING_OPS:
            bent = case({**inputs, "activation": "none"})[0]
            grads[0] *= (bent.abs() > KINK) & ((bent - 6).abs() > KINK)
    return grads


def evaluate(case: Case, inputs: Inputs, grads: Sequence[Tensor] = ()) -> Outcome:
    """Call the op; with ``grads`` for its results, differentiate too."""
    if not grads:
        with torch.no_grad():
            return Outcome(case(inputs))
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    results = case({**inputs, **leaves})
    gradients = torch.autograd.grad(results[: len(grads)], list(leaves.values()), grads)
    return Outcome(tuple(result.detach() for result in results), dict(zip(leaves, gradients, strict=True)))


def expected(case: Case, inputs: Inputs, grads: Sequence[Tensor] = ()) -> Outcome:
    """The reference in float64."""
    with K.use_backend("reference"):
        return evaluate(case, cast(inputs, torch.float64), [grad.to("cpu", torch.float64) for grad in grads])


def magnitude(case: Case, inputs: Inputs, grads: Sequence[Tensor] = ()) -> Outcome:
    """For each element, the sum of the magnitudes of its terms."""
    rounding = next(torch.finfo(value.dtype).eps for value in tensors(inputs).values() if value.is_floating_point())
    inputs = cast(inputs, torch.float64)
    grads = [grad.to("cpu", torch.float64).abs() for grad in grads]
    if case.op == "hierarchical_distillation_loss":
        return _loss_magnitude(inputs, grads)
    absolute = {name: value.abs() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for name in NORMS:
        if absolute.get(name) is not None:
            absolute[name][0] *= -1  # so that x - mean is the sum of their magnitudes
    for option in ("activation", "final_activation", "out_activation"):
        if option in absolute:
            absolute[option] = "none"
    if case.op == "branch_pointwise_stats":
        outcome = _pointwise_stats_magnitude(case, inputs, absolute, rounding, grads)
    elif case.op in TRAINING_OPS and absolute.get("next_weight", "") is not None:
        outcome = _training_magnitude(case, inputs, absolute, rounding, grads)
    else:
        outcome = expected(case, absolute, grads)
    outcome.gradients = {name: gradient.abs() for name, gradient in outcome.gradients.items()}
    return outcome


def _training_magnitude(
    case: Case, inputs: Inputs, absolute: Inputs, rounding: float, grads: Sequence[Tensor]
) -> Outcome:
    """Magnitudes for a training op whose output is rounded by ``rounding``."""
    over = (1, 2, 3)
    *_, y, mean, _ = expected(case, inputs).results
    *before, size, mean_size, _ = expected(case, absolute).results
    values = max(y.shape[1:4].numel(), 1)
    both = size + mean_size[:, None, None, None]
    apart = (y - mean[:, None, None, None]).abs()
    # A deviation y - mean has the rounding of both, and the variance multiplies two deviations.
    spread = (both * (2 * apart + rounding * both)).sum(over) / values
    if not grads:
        return Outcome((*before, size, mean_size, spread))
    *others, grad, grad_mean, grad_var = grads
    total = grad + (grad_mean[:, None, None, None] + grad_var[:, None, None, None] * 2 * both) / values
    none = torch.zeros_like(mean_size)
    outcome = expected(case, absolute, (*others, total, none, none))
    outcome.results = (*before, size, mean_size, spread)
    return outcome


def _pointwise_stats_magnitude(
    case: Case, inputs: Inputs, absolute: Inputs, rounding: float, grads: Sequence[Tensor]
) -> Outcome:
    """Magnitudes for statistics without the output: the variance is a sum of products of distances from a mean."""
    convolution = dataclasses.replace(case, op="branch_norm_conv2d")
    size, mean_size, _ = expected(convolution, absolute).results
    all_grads = (torch.zeros_like(size), *grads) if grads else ()
    outcome = _training_magnitude(convolution, inputs, absolute, rounding, all_grads)
    with torch.no_grad(), K.use_backend("reference"):
        read = K.branch_normalize(inputs["x"], inputs["norm"], activation=inputs["activation"])
        distances = read - read.mean((1, 2, 3), keepdim=True).nan_to_num()
        apart = K.branch_conv2d(distances.abs(), absolute["weight"])
    # A distance has the rounding of the value and of the mean.
    spread = (apart * (apart + 2 * (size + mean_size[:, None, None, None]))).sum((1, 2, 3))
    outcome.results = (mean_size, spread / max(size.shape[1:4].numel(), 1))
    return outcome


def _loss_magnitude(inputs: Inputs, grads: Sequence[Tensor]) -> Outcome:
    """Exponents have an error of eps times the largest logit, probabilities the same as a relative error."""
    logits, alpha, temperature = inputs["logits"], inputs["alpha"], inputs["temperature"]
    models, batch, _ = logits.shape
    largest = 1 + logits.abs().max()
    sizes = K.default_sizes(models)
    loss = largest * ((1 - alpha) * models + alpha * temperature**2 * (len(sizes) - 1))
    with K.use_backend("reference"):
        *smaller, whole = (K.prefix_mean(logits, sizes) / temperature).log_softmax(-1)
    for ensemble in smaller:
        # The divergence is a mean by the probabilities of the whole ensemble. Where two of these are alike, as their
        # logits are, they decide between terms as large as logits.
        terms = whole - ensemble
        apart = (terms - (whole.exp() * terms).sum(-1, keepdim=True)).abs()
        loss = loss + alpha * temperature * largest * (whole.exp() * apart).sum(-1).mean()
    outcome = Outcome((loss,))
    if grads:
        per_logit = (1 - alpha) + alpha * temperature * sum(1 / size for size in sizes[:-1])
        outcome.gradients = {"logits": (grads[0] * largest * per_logit / batch).expand(logits.shape)}
    return outcome


def tolerance(case: Case, backend: str, dtype: torch.dtype, size: Tensor) -> Tensor:
    """The error that rounding allows: sums are float32 at least, those of the reference and stored values ``dtype``."""
    stored = torch.finfo(dtype)
    sums = stored.eps if backend == "reference" else torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    composed = [("triton", "fused_bottleneck")] if dtype == torch.float32 else []
    composed += [(backend, "branch_pointwise_norm_conv2d") for backend in ("triton", "cuda")]
    naive = backend == "reference" or (backend, case.op) in composed  # one kernel for each step
    roundings = case.naive_roundings if naive else case.roundings
    subnormal = roundings * stored.tiny * stored.eps  # the smallest numbers lie a fixed distance apart
    return (case.terms * sums + roundings * stored.eps) * size + subnormal


def check(case: Case, backend: str, inputs: Inputs, actual: Outcome, grads: Sequence[Tensor] = ()) -> None:
    """Raise unless ``actual`` agrees with the reference for ``inputs``, but for the rounding of ``backend``."""
    want, sizes = expected(case, inputs, grads), magnitude(case, inputs, grads)
    for (name, got), (_, right), (_, size) in zip(actual.items(), want.items(), sizes.items(), strict=True):
        assert got.shape == right.shape, f"{case}: shape of {name}"
        error = (got.to("cpu", torch.float64) - right).abs()
        error[(right.abs() > torch.finfo(got.dtype).max) & (got.cpu() == right.sign() * torch.inf)] = 0
        # The statistics of a training op are those of an output that is stored in a smaller dtype.
        dtype = inputs["x"].dtype if case.op in TRAINING_OPS else got.dtype
        allowed = tolerance(case, backend, dtype, size).expand_as(right)
        wrong = ~(error <= allowed)  # NaN is wrong too
        assert not wrong.any(), (
            f"{case}: {name} is wrong in {int(wrong.sum())} of {wrong.numel()} elements; the first at "
            f"{tuple(wrong.nonzero()[0].tolist())}: got {got.cpu()[wrong][0]}, "
            f"expected {right[wrong][0]}, allowed error {allowed[wrong][0]:.3g}"
        )
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == inputs[name].dtype, f"{case}: dtype of the gradient of {name}"

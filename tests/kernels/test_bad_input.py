"""Wrong arguments raise an error that names the argument, the expected and the given value, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, Inputs, representative
from placements import Placement
from wrong_arguments import LOSS, MATERIALIZE, NORM_CONVS, UNCHECKED, WRONG

import hne_kernels as K

SAMPLES = {case.label: case for case in representative()}


def _apply(op: str, argument: str, value: Any, rng: torch.Generator, place: Placement) -> tuple[Case, Inputs]:
    case = SAMPLES[op]
    inputs = case.inputs(rng, place.dtype, place.device)
    inputs[argument] = value(inputs[argument]) if callable(value) else value
    return case, inputs


@pytest.mark.parametrize(
    ("op", "argument", "value", "error", "text"),
    WRONG,
    ids=[f"{op}-{argument}-{i}" for i, (op, argument, *_) in enumerate(WRONG)],
)
def test_error_names_the_argument(
    op: str, argument: str, value: Any, error: type[Exception], text: str,
    backend: Placement, rng: torch.Generator,
) -> None:  # fmt: skip
    case, inputs = _apply(op, argument, value, rng, backend)
    if backend.device == "cuda" and "class indices from" in text:
        assert case(inputs)[0].isnan()  # an error would have to wait for the GPU
        return
    with pytest.raises(error, match=text):
        case(inputs)


def test_samples_are_right_without_the_wrong_argument(backend: Placement, rng: torch.Generator) -> None:
    """The unchanged samples are valid, so that no other argument causes the errors above."""
    for case in SAMPLES.values():
        case(case.inputs(rng, backend.dtype, backend.device))


@pytest.mark.parametrize("op", [*NORM_CONVS, MATERIALIZE])
def test_activation_without_a_normalisation(op: str, backend: Placement, rng: torch.Generator) -> None:
    inputs = SAMPLES[op].inputs(rng, backend.dtype, backend.device)
    with pytest.raises(ValueError, match=r"activation: expected none where x is not normalised .*got 'relu"):
        SAMPLES[op]({**inputs, "norm": None})


def test_materialize_without_a_normalisation(backend: Placement, rng: torch.Generator) -> None:
    inputs = SAMPLES[MATERIALIZE].inputs(rng, backend.dtype, backend.device)
    with pytest.raises(ValueError, match=r"norm: expected a tensor with materialize, got None"):
        SAMPLES[MATERIALIZE]({**inputs, "norm": None, "activation": "none"})


def test_no_models(backend: Placement) -> None:
    with pytest.raises(ValueError, match=r"expected at least 1, got 0"):
        K.prefix_mean(torch.zeros(0, 2, 3, device=backend.device))


def test_identity_needs_equal_shapes(backend: Placement, rng: torch.Generator) -> None:
    case = SAMPLES["fused_bottleneck"]
    inputs = case.inputs(rng, backend.dtype, backend.device)
    inputs |= {"shortcut": None, "shortcut_bias": None, "identity": True}
    with pytest.raises(ValueError, match=r"identity: expected stride 1 and equal channels, got stride 2"):
        case(inputs)
    with pytest.raises(ValueError, match=r"identity: .* and 3 > 18"):
        case({**inputs, "stride": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, n: (w[:8], n), "weights: expected eight for each of 2 layers, got 8"),
        (lambda w, n: (w, n[:7]), "numbers: expected four for each of one or more layers, got 7"),
        (lambda w, n: (w, []), "numbers: expected four for each of one or more layers, got 0"),
        (lambda w, n: (w, [*n[:5], 3, *n[6:]]), "numbers: expected the index of an activation from 0 to 2, got 3"),
        (lambda w, n: (w, [0, *n[1:]]), "layer 0: replicate"),
        (lambda w, n: ([*w[:8], w[8][:1], *w[9:]], n), "layer 1: expand"),
        (lambda w, n: ([*w[:9], w[9][:1], *w[10:]], n), "layer 1: expand_bias"),
    ],
    ids=["weights", "numbers", "no layer", "activation", "replicate", "expand", "expand_bias"],
)
def test_chain_of_bottlenecks(change: Any, message: str, backend: Placement, rng: torch.Generator) -> None:
    case = SAMPLES["fused_bottleneck_chain"]
    inputs = case.arguments(case.inputs(rng, backend.dtype, backend.device))
    weights, numbers = change(inputs["weights"], inputs["numbers"])
    with K.use_backend(backend.backend), pytest.raises(ValueError, match=message):
        K.fused_bottleneck_chain(inputs["x"], weights, numbers)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 1)])
def test_pack_weight(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"weight: expected 5 dimensions .*got {len(shape)}"):
        K.pack_weight(torch.zeros(shape))


@pytest.mark.parametrize("models", [0, -1])
def test_default_sizes(models: int) -> None:
    with pytest.raises(ValueError, match=rf"num_models: expected at least 1, got {models}"):
        K.default_sizes(models)


@pytest.mark.parametrize(
    ("op", "argument", "value"),
    UNCHECKED,
    ids=[f"{op}-{argument}-{i}" for i, (op, argument, _) in enumerate(UNCHECKED)],
)
def test_registered_ops_check_too(op: str, argument: str, value: Any, backend: Placement, rng: torch.Generator) -> None:
    case, inputs = _apply(op, argument, value, rng, backend)
    registered = getattr(torch.ops.hne, f"triton_{case.op}" if backend.backend == "triton" else case.op, None)
    if backend.backend == "reference" or registered is None:
        pytest.skip(f"{op} is no registered op of {backend.backend}")
    waits = backend.backend == "triton" or backend.device == "cuda"  # an error would have to wait for the GPU
    if waits and (op, argument) == (LOSS, "target") and inputs["target"].shape == (3,):
        assert registered(*inputs.values())[0].isnan()
        return
    names = [a.name for a in registered.default._schema.arguments]
    if op == "prefix_logits":
        inputs["sizes"] = inputs["sizes"] or [1, 2, 4, 5]
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        registered(*(inputs[name] for name in names))

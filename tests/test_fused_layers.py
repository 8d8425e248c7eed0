"""What is particular to layers in one call: what is prepared and kept, and what is refused. Their results are judged
with those of the ops, see ``cases.LAYERS``."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import LAYERS, Case, expected
from torch import Tensor

import hne_kernels as K
from hne_kernels import extension

each_case = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


def arguments(
    name: str, rng: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[K.FusedLayer], Any]:
    (case,) = (case for case in LAYERS if case.name == name)
    made = case.arguments(case.inputs(rng, dtype))
    return made["x"], made["layers"], made["keep"]


@pytest.fixture
def poisoned() -> Iterator[None]:
    extension.cpu_library().poison_memory(True)
    yield
    extension.cpu_library().poison_memory(False)


@each_case
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(case: Case, threads: int, poisoned: None, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results = case(inputs)
    finally:
        torch.set_num_threads(before)
    for result, right in zip(results, expected(case, inputs, []).results, strict=True):
        torch.testing.assert_close(result, right)


@each_case
def test_same_result_every_time(case: Case, rng: torch.Generator) -> None:
    made = case.arguments(case.inputs(rng))
    layers = K.FusedLayers(made["layers"], made["keep"])
    first = layers(made["x"])
    for _ in range(5):
        assert all(map(torch.equal, first, layers(made["x"])))


def test_any_batch_of_any_layout(rng: torch.Generator) -> None:
    x, described, keep = arguments("network", rng, torch.float64)
    layers = K.FusedLayers(described, keep)
    (together,) = layers(x)
    for first in range(x.shape[1]):
        assert torch.equal(layers(x[:, first:][:, :1])[0], together[:, first : first + 1])
    turned = x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert torch.equal(layers(turned)[0], together)


def test_other_backends_call_the_layers_in_turn(rng: torch.Generator) -> None:
    x, described, keep = arguments("network", rng, torch.float64)
    layers = K.FusedLayers(described, keep)
    want = layers(x)
    with K.use_backend("reference"):
        torch.testing.assert_close(layers(x), want)


def test_autocast_lowers_as_it_does_the_ops(rng: torch.Generator) -> None:
    x, described, keep = arguments("kept", rng)
    layers = K.FusedLayers(described, keep)
    with torch.autocast("cpu", torch.bfloat16):
        results = layers(x)
        want = x
        for layer in described:
            want = layer(want)
    assert all(result.dtype == torch.bfloat16 for result in results)
    assert torch.equal(results[-1], want.flatten(2))


LAYOUTS = {
    "channels first": lambda images: images.contiguous(),
    "channels last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "a part of larger images": lambda images: torch.nn.functional.pad(images, (1, 2, 3, 1, 2, 1))[:, 2:-1, 3:-1, 1:-2],
    "every second column": lambda images: images.repeat_interleave(2, 3)[..., ::2],
    "turned": lambda images: images.transpose(2, 3).contiguous().transpose(2, 3),
    "one channel for all": lambda images: images[:, :1].expand(images.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (1, 3, 1, 1), (0, 3, 5, 5), (3, 3, 40, 41)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_features_of_one_branch(
    layout: Any, shape: tuple[int, ...], dtype: torch.dtype, poisoned: None, rng: torch.Generator
) -> None:
    _, described, keep = arguments("network", rng, dtype)
    layers = K.FusedLayers(described, keep)
    images = layout(torch.randn(shape, generator=rng).to(dtype))
    assert images.shape == shape
    features = images.permute(0, 2, 3, 1).unsqueeze(0).contiguous()
    assert all(map(torch.equal, layers(images), layers(features)))
    with K.use_backend("reference"):
        for result, want in zip(layers(images), layers(features), strict=True):
            torch.testing.assert_close(result, want)


def test_images_that_do_not_fit(rng: torch.Generator) -> None:
    _, described, keep = arguments("network", rng)
    layers = K.FusedLayers(described, keep)
    with pytest.raises(ValueError, match=r"layer 0: .*4"):
        layers(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"layer 0: x: expected at least 1 rows and columns.*got 0x5"):
        layers(torch.randn(2, 3, 0, 5))
    with pytest.raises(TypeError, match=r"layer 0: .*float64"):
        layers(torch.randn(2, 3, 5, 5).double())


def test_layers_are_forgotten_with_their_object(rng: torch.Generator) -> None:
    x, described, keep = arguments("one", rng)
    layers = K.FusedLayers(described, keep)
    number = layers._prepared
    torch.ops.hne.fused_layers(x, number)
    del layers
    gc.collect()
    with pytest.raises(RuntimeError, match=f"layers: expected a number of prepare_layers, got {number}"):
        torch.ops.hne.fused_layers(x, number)


def test_a_copy_is_prepared_by_itself(rng: torch.Generator) -> None:
    x, described, keep = arguments("kept", rng)
    layers = K.FusedLayers(described, keep)
    want = layers(x)
    twin = copy.deepcopy(layers)
    assert twin._prepared != layers._prepared
    del layers
    gc.collect()
    assert all(map(torch.equal, twin(x), want))


def test_a_dtype_that_only_the_reference_serves(rng: torch.Generator) -> None:
    x, described, keep = arguments("one", rng, torch.float16)
    (result,) = K.FusedLayers(described, keep)(x)
    assert torch.equal(result, described[0](x))


def test_weights_are_kept_alive(rng: torch.Generator) -> None:
    x, described, keep = arguments("run", rng)
    layers = K.FusedLayers(described, keep)
    want = layers(x)[0].clone()
    layers.layers = ()
    del described
    gc.collect()
    for _ in range(10):  # memory of the weights would be used again
        torch.full((1000,), float("nan"))
    assert torch.equal(layers(x)[0], want)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "rank": (lambda x: x[0, 0], ValueError, r"x: expected 5 dimensions .*got 3"),
    "no tensor": (lambda x: x.tolist(), TypeError, r"x: expected a tensor.*got list"),
    "integers": (lambda x: x.long(), TypeError, r"layer 0: x: expected a floating-point tensor, got torch.int64"),
    "dtype": (lambda x: x.double(), TypeError, r"layer 0: .*float64"),
    "device": (lambda x: x.to("meta"), ValueError, r"layer 0: .*meta"),
    "channels": (lambda x: x[..., :2], ValueError, r"layer 0: .*2"),
    "branches": (lambda x: torch.cat([x, x]), ValueError, r"layer 0: .*branches"),
    "no pixels": (lambda x: x[:, :, :0], ValueError, r"layer 0: x: expected at least"),
}


@pytest.mark.parametrize(("change", "error", "text"), WRONG.values(), ids=WRONG)
def test_features_that_do_not_fit(change: Any, error: type[Exception], text: str, rng: torch.Generator) -> None:
    x, described, keep = arguments("network", rng)
    layers = K.FusedLayers(described, keep)
    with pytest.raises(error, match=text):
        layers(change(x))


def test_layers_that_do_not_fit(rng: torch.Generator) -> None:
    _, described, _ = arguments("network", rng)
    with pytest.raises(ValueError, match="layers: expected at least one, got none"):
        K.FusedLayers([])
    with pytest.raises(ValueError, match=r"keep: expected numbers from 0 to 4, got 5"):
        K.FusedLayers(described, [5])
    with pytest.raises(ValueError, match=r"layer 1: expand: .*"):
        K.FusedLayers([described[0], described[2]])
    with pytest.raises(ValueError, match=r"layer 1: .*branches"):
        K.FusedLayers([described[0], described[1]._replace(replicate=2)])
    with pytest.raises(ValueError, match=r"layer 0: weights: expected two .* or eight .*, got 3"):
        K.FusedLayers([described[0]._replace(weights=(*described[0].weights, None))])
    with pytest.raises(ValueError, match=r"layer 0: activation: expected one of none, relu, relu6, got 'gelu'"):
        K.FusedLayers([described[0]._replace(activation="gelu")])
    wide = tuple(w if w is None else w.double() for w in described[1].weights)
    with pytest.raises(TypeError, match=r"layer 1: .*float64"):
        K.FusedLayers([described[0], described[1]._replace(weights=wide)])


def test_the_library_guards_itself(rng: torch.Generator) -> None:
    """Past the checks of Python nothing is read or written that is not there."""
    x, described, _ = arguments("one", rng)
    (weights, *_) = described[0]
    numbers = [1, 1, 0, 1, 1, 1, 1, 1]
    prepare = torch.ops.hne.prepare_layers
    for wrong in (numbers[:-1], [], [9, *numbers[1:]], [1, 0, *numbers[2:]], [1, 1, 0, 0, *numbers[4:]],
                  [*numbers[:4], 3, *numbers[5:]], [*numbers[:7], 0], numbers * 2):  # fmt: skip
        with pytest.raises(RuntimeError):
            prepare(list(weights), wrong)
    for missing in range(6):
        with pytest.raises(RuntimeError):
            prepare([None if i == missing else w for i, w in enumerate(weights)], numbers)
    with pytest.raises(RuntimeError):
        prepare([*weights, weights[0]], numbers)
    number = prepare(list(weights), numbers)
    for features in (x[0], x[..., 1:], x.double(), x[:, :, :0], torch.cat([x, x])):
        with pytest.raises(RuntimeError):
            torch.ops.hne.fused_layers(features, number)
    extension.cpu_library().forget_layers(number)
    extension.cpu_library().forget_layers(number)  # nothing to forget


def test_no_gradient(rng: torch.Generator) -> None:
    x, described, keep = arguments("one", rng)
    layers = K.FusedLayers(described, keep)
    with pytest.raises(RuntimeError, match="FusedLayers is for inference and has no gradient"):
        layers(x.requires_grad_())
    weights = (described[0].weights[0].clone().requires_grad_(), *described[0].weights[1:])
    with pytest.raises(RuntimeError, match="FusedLayers is for inference and has no gradient"):
        K.FusedLayers([described[0]._replace(weights=weights)])
    with torch.no_grad():
        assert not layers(x)[0].requires_grad

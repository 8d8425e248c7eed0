"""Layers in one call: preparation, memory and errors. The parity suite judges their results (``cases.LAYERS``)."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from cases import LAYERS, Case, expected
from random_layers import random_bottleneck, random_convolution
from threads import on_threads
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


@each_case
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(case: Case, threads: int, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64)
    with on_threads(threads):
        results = case(inputs)
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
    x, singles, keep = arguments("network", rng, torch.float64)
    layers = K.FusedLayers(singles, keep)
    (together,) = layers(x)
    for first in range(x.shape[1]):
        assert torch.equal(layers(x[:, first:][:, :1])[0], together[:, first : first + 1])
    turned = x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert torch.equal(layers(turned)[0], together)


def test_other_backends_call_the_layers_in_turn(rng: torch.Generator) -> None:
    x, singles, keep = arguments("network", rng, torch.float64)
    layers = K.FusedLayers(singles, keep)
    want = layers(x)
    with K.use_backend("reference"):
        torch.testing.assert_close(layers(x), want)


def rounded(layer: K.FusedLayer) -> K.FusedLayer:
    weights = (None if weight is None else weight.bfloat16() for weight in layer.weights)
    return layer if layer.is_norm else layer._replace(weights=tuple(weights))


@each_case
def test_autocast_rounds_features_and_weights(case: Case, rng: torch.Generator) -> None:
    made = case.arguments(case.inputs(rng))
    x, layers = made["x"], K.FusedLayers(made["layers"], made["keep"])
    in_bfloat16 = K.FusedLayers([*map(rounded, made["layers"])], made["keep"])
    want = in_bfloat16(x.bfloat16())
    calls = [(x.bfloat16(), layers), (x, layers), (x, layers), (x.bfloat16(), in_bfloat16)]
    for given, computes in calls[3:] if case.name == "mean-first" else calls:  # a mean is computed from what is given
        with torch.autocast("cpu", torch.bfloat16):
            results = computes(given)
        assert all(result.dtype == torch.bfloat16 for result in results)
        assert all(map(torch.equal, results, want))
    assert all(result.dtype == torch.float32 for result in layers(x))


@pytest.mark.parametrize("first", ["norm", "pooling"])
def test_autocast_does_not_round_what_batch_norms_and_pooling_read(first: str, rng: torch.Generator) -> None:
    """Near 1000 the values of bfloat16 are 4 apart."""
    x = 1000 + torch.randn(1, 2, 4, 4, 6, generator=rng)
    rows = torch.tensor([[1000.0], [1.0], [0.0]]).expand(1, 3, 6).contiguous()
    norm = K.FusedLayer((rows,))
    average = K.FusedLayer((), stride=2, pooling="average", window=2, branches=1)
    convolution = K.FusedLayer((K.pack_weight(torch.randn(1, 4, 6, 1, 1, generator=rng)), torch.zeros(1, 4)))
    layers = K.FusedLayers([norm, convolution] if first == "norm" else [average, norm, convolution])
    with torch.autocast("cpu", torch.bfloat16):
        (result,) = layers(x)
        with K.use_backend("reference"):
            (want,) = layers(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, want, rtol=0.03, atol=0.03)


def test_wrong_features_under_autocast(rng: torch.Generator) -> None:
    x, singles, keep = arguments("network", rng)
    layers = K.FusedLayers(singles, keep)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="x: expected a tensor"):
            layers(x.tolist())
        with pytest.raises(ValueError, match=r"layer 0: .*channels"):
            layers(x[..., 1:])
        with pytest.raises(RuntimeError, match="gradient"):
            layers(x.requires_grad_())


def test_autocast_to_bfloat16_is_one_call(rng: torch.Generator) -> None:
    x, singles, keep = arguments("network", rng)
    layers = K.FusedLayers(singles, keep)
    with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
        layers(x)
    calls = [event.key for event in profile.key_averages() if event.key.startswith("hne::")]
    assert sorted(calls) == ["hne::fused_layers", "hne::prepare_layers"]


@pytest.mark.parametrize("lowest", [torch.float64, torch.float16])
def test_autocast_of_other_dtypes_calls_the_layers_in_turn(lowest: torch.dtype, rng: torch.Generator) -> None:
    """float64 is not lowered, and the library has no float16."""
    x, singles, keep = arguments("network", rng, torch.float64 if lowest == torch.float64 else torch.float32)
    layers = K.FusedLayers(singles, keep)
    with torch.autocast("cpu", torch.bfloat16 if lowest == torch.float64 else torch.float16):
        (result,) = layers(x)
    assert result.dtype == lowest


def test_autocast_on_another_backend_lowers_as_it_does_the_ops(rng: torch.Generator) -> None:
    x, singles, keep = arguments("keep", rng)
    layers = K.FusedLayers(singles, keep)
    with torch.autocast("cpu", torch.bfloat16), K.use_backend("reference"):
        results = layers(x)
        want = x
        for layer in singles:
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
    layout: Any, shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator
) -> None:
    _, singles, keep = arguments("network", rng, dtype)
    of_images, of_features = (K.FusedLayers(singles, keep, images=images) for images in (True, False))
    images = layout(torch.randn(shape, generator=rng).to(dtype))
    assert images.shape == shape
    features = images.permute(0, 2, 3, 1).unsqueeze(0).contiguous()
    want = of_features(features)
    assert all(map(torch.equal, of_images(images), want))
    assert all(map(torch.equal, copy.deepcopy(of_images)(images), want))
    with K.use_backend("reference"):
        for result, right in zip(of_images(images), of_features(features), strict=True):
            torch.testing.assert_close(result, right)


def test_images_that_do_not_fit(rng: torch.Generator) -> None:
    _, singles, keep = arguments("network", rng)
    layers = K.FusedLayers(singles, keep, images=True)
    with pytest.raises(ValueError, match=r"layer 0: .*4"):
        layers(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"layer 0: x: expected at least 1 rows and columns.*got 0x5"):
        layers(torch.randn(2, 3, 0, 5))
    with pytest.raises(TypeError, match=r"layer 0: .*float64"):
        layers(torch.randn(2, 3, 5, 5).double())
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions \[batch, channels, height, width\], got 5"):
        layers(torch.randn(1, 2, 5, 5, 3))


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["network", "even channels", "mean-first"])
def test_other_channels(name: str, dtype: torch.dtype, more: int, rng: torch.Generator) -> None:
    """Products of bfloat16 read pairs of channels: the padding of odd numbers is no channel."""
    x, singles, keep = arguments(name, rng, dtype)
    channels = x.shape[-1] + more
    with pytest.raises(ValueError, match=rf"layer 0: .*{channels}"):
        K.FusedLayers(singles, keep)(torch.zeros(*x.shape[:-1], channels, dtype=dtype))


# Expanded feature maps of 128 channels are computed in bands of rows, those of few channels as a whole. With an
# identity, the output may replace the input in memory; with a shortcut it may not.
CHAINS = {
    "bands, whole, bands": [(16, 128, 16, 5, 1), (16, 3, 16, 3, 1), (16, 128, 9, 3, 2)],
    "whole, bands, whole": [(16, 3, 16, 3, 1), (16, 128, 16, 3, 1), (16, 5, 16, 3, 2)],
    "bands, bands": [(16, 128, 16, 3, 1), (16, 130, 7, 5, 2)],
    "in place, shortcuts": [*3 * [(16, 3, 16, 3, 1)], *2 * [(16, 3, 16, 3, 1, False)], (16, 3, 16, 3, 1)],
    "smaller, larger": [(16, 3, 7, 3, 1), *2 * [(7, 3, 7, 3, 1)], (7, 3, 16, 5, 1), (16, 3, 16, 3, 1)],
}


@pytest.mark.parametrize("sizes", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("branches_and_batch", [(1, 1), (1, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_maps_in_memory(
    sizes: list[tuple[Any, ...]], branches_and_batch: tuple[int, int], threads: int, rng: torch.Generator
) -> None:
    branches, batch = branches_and_batch
    layers = [random_bottleneck(rng, branches, *layer_sizes) for layer_sizes in sizes]
    x = torch.randn(branches, batch, 40, 30, 16, generator=rng, dtype=torch.float64)
    given = x.clone()
    with on_threads(threads):
        (result,) = K.FusedLayers(layers)(x)
    with K.use_backend("reference"):
        (want,) = K.FusedLayers(layers)(x)
    torch.testing.assert_close(result, want)
    assert torch.equal(x, given)


@pytest.mark.parametrize("keep", [[], [1], [2]], ids=str)
@pytest.mark.parametrize("convolutions", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_convolutions_before_bottlenecks(
    keep: list[int], convolutions: int, threads: int, rng: torch.Generator
) -> None:
    layers = [random_convolution(rng, 1, 7, 7) for _ in range(convolutions)]
    layers += [random_bottleneck(rng, 1, *sizes) for sizes in [(7, 3, 7, 3, 1), (7, 3, 7, 3, 1), (7, 3, 5, 3, 2)]]
    x = torch.randn(1, 3, 9, 7, 7, generator=rng, dtype=torch.float64)
    with on_threads(threads):
        results = K.FusedLayers(layers, keep)(x)
    with K.use_backend("reference"):
        wanted = K.FusedLayers(layers, keep)(x)
    assert len(results) == len(wanted)
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want)


@pytest.mark.parametrize("given", ["features", "images", "branches"])
def test_micro_batches(given: str, rng: torch.Generator) -> None:
    branches, images = 2 if given == "branches" else 1, given == "images"
    layers = [random_convolution(rng, branches, 3, 64), random_convolution(rng, branches, 64, 2)]
    if given == "branches":
        layers.append(random_convolution(rng, branches, 2, 5)._replace(mean=True))
    x = torch.randn(branches, 19, 64, 64, 3, generator=rng, dtype=torch.float64)
    in_micro_batches = K.FusedLayers(layers, images=images)
    whole = K.FusedLayers(layers, [0], images=images)
    of_image = x[0].permute(0, 3, 1, 2) if images else x
    K.release_memory()
    (result,) = in_micro_batches(of_image)
    assert K.release_memory() < whole(of_image)[0].nbytes  # idle memory; there is none with AddressSanitizer
    (together,) = whole(of_image)[1:]
    assert torch.equal(result, together)
    with K.use_backend("reference"):
        torch.testing.assert_close(result, in_micro_batches(of_image)[0])


def head(rng: torch.Generator, dtype: torch.dtype) -> tuple[K.FusedLayers, Tensor]:
    layers = [random_convolution(rng, 1, 3, 5), random_convolution(rng, 1, 5, 7)._replace(mean=True)]
    layers = [layer._replace(weights=tuple(weight.to(dtype) for weight in layer.weights)) for layer in layers]
    return K.FusedLayers(layers, [0]), torch.randn(1, 3, 6, 5, 3, generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mean_with_the_members_before(dtype: torch.dtype, rng: torch.Generator) -> None:
    layers, x = head(rng, dtype)
    total, sums = None, torch.zeros(3, 7, dtype=torch.promote_types(dtype, torch.float32))
    for count in range(1, 4):
        features, logits, total, mean = layers.next_member(x, total, count)
        assert all(map(torch.equal, (features, logits), layers(x)))
        sums += logits[0]
        assert torch.equal(total, sums)
        assert torch.equal(mean, (sums / count).to(dtype))
        with K.use_backend("reference"):
            others = layers.next_member(x, total, count + 1)
        assert [(t.shape, t.dtype) for t in others] == [(t.shape, t.dtype) for t in (features, logits, total, mean)]
        torch.testing.assert_close(others[3], ((total + others[1][0]) / (count + 1)).to(dtype))
        x = torch.randn(x.shape, generator=rng).to(dtype)


def test_members_under_autocast(rng: torch.Generator) -> None:
    layers, x = head(rng, torch.float32)
    total = torch.randn(3, 7, generator=rng)
    want = K.FusedLayers([*map(rounded, layers.layers)], [0]).next_member(x.bfloat16(), total, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, layers.next_member(x, total, 2), want))
        with pytest.raises(RuntimeError, match="total: "):
            layers.next_member(x, torch.zeros(7), 2)


@pytest.mark.parametrize(
    "total",
    [torch.zeros(7), torch.zeros(3, 6), torch.zeros(2, 7), torch.zeros(3, 7, dtype=torch.float64), torch.zeros(7, 3).T],
)
def test_a_total_that_does_not_fit(total: Tensor, rng: torch.Generator) -> None:
    layers, x = head(rng, torch.float32)
    with pytest.raises(RuntimeError, match="total: "):
        layers.next_member(x, total, 2)


def test_members_end_with_logits_of_one_branch(rng: torch.Generator) -> None:
    x, singles, keep = arguments("one", rng)
    with pytest.raises(RuntimeError, match="layers: expected the logits of one branch"):
        K.FusedLayers(singles, keep).next_member(x, None, 1)


def test_layers_are_forgotten_with_their_object(rng: torch.Generator) -> None:
    x, singles, keep = arguments("one", rng)
    layers = K.FusedLayers(singles, keep)
    number = layers._prepared
    torch.ops.hne.fused_layers(x, number)
    del layers
    gc.collect()
    with pytest.raises(RuntimeError, match=f"layers: expected a number of prepare_layers, got {number}"):
        torch.ops.hne.fused_layers(x, number)


def test_a_copy_is_prepared_by_itself(rng: torch.Generator) -> None:
    x, singles, keep = arguments("keep", rng)
    layers = K.FusedLayers(singles, keep)
    want = layers(x)
    twin = copy.deepcopy(layers)
    assert twin._prepared != layers._prepared
    del layers
    gc.collect()
    assert all(map(torch.equal, twin(x), want))


def test_a_dtype_that_only_the_reference_serves(rng: torch.Generator) -> None:
    x, singles, keep = arguments("one", rng, torch.float16)
    (result,) = K.FusedLayers(singles, keep)(x)
    assert torch.equal(result, singles[0](x))


def test_weights_are_kept_alive(rng: torch.Generator) -> None:
    x, singles, keep = arguments("chain", rng)
    layers = K.FusedLayers(singles, keep)
    want = layers(x)[0].clone()
    layers.layers = ()
    del singles
    gc.collect()
    for _ in range(10):  # would reuse the memory of freed weights
        torch.full((1000,), float("nan"))
    assert torch.equal(layers(x)[0], want)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "rank": (lambda x: x[0], ValueError, r"x: expected 5 dimensions .*got 4"),
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
    x, singles, keep = arguments("network", rng)
    layers = K.FusedLayers(singles, keep)
    with pytest.raises(error, match=text):
        layers(change(x))


def test_layers_that_do_not_fit(rng: torch.Generator) -> None:
    _, singles, _ = arguments("network", rng)
    with pytest.raises(ValueError, match="layers: expected at least one, got none"):
        K.FusedLayers([])
    with pytest.raises(ValueError, match=r"keep: expected numbers from 0 to 4, got 5"):
        K.FusedLayers(singles, [5])
    with pytest.raises(ValueError, match=r"layer 1: expand: .*"):
        K.FusedLayers([singles[0], singles[2]])
    with pytest.raises(ValueError, match=r"layer 1: .*branches"):
        K.FusedLayers([singles[0], singles[1]._replace(replicate=2)])
    with pytest.raises(ValueError, match=r"layer 0: weights: expected two .* or eight .*, got 3"):
        K.FusedLayers([singles[0]._replace(weights=(*singles[0].weights, None))])
    with pytest.raises(ValueError, match=r"layer 0: activation: expected one of none, relu, relu6, got 'gelu'"):
        K.FusedLayers([singles[0]._replace(activation="gelu")])
    with pytest.raises(ValueError, match=r"layer 1: source: expected a number from -2 to -1, got -3"):
        K.FusedLayers([singles[0], singles[1]._replace(source=-3)])
    with pytest.raises(ValueError, match=r"layer 0: source: expected a number from -1 to -1, got 0"):
        K.FusedLayers([singles[0]._replace(source=0)])
    with pytest.raises(ValueError, match=r"layer 0: residual: expected a number from -1 to -1, got 1"):
        K.FusedLayers([singles[0]._replace(residual=1)])
    with pytest.raises(TypeError, match=r"layer 0: residual: expected an int, got float"):
        K.FusedLayers([singles[0]._replace(residual=-1.0)])
    with pytest.raises(ValueError, match=r"layer 1: residual: expected None for a bottleneck, .*got -1"):
        K.FusedLayers([singles[0], singles[1]._replace(residual=-1)])
    with pytest.raises(ValueError, match=r"layer 0: residual_replicate: expected at least 1, got 0"):
        K.FusedLayers([singles[0]._replace(residual=-1, residual_replicate=0)])
    with pytest.raises(ValueError, match=r"layer 0: residual: expected shape \(1, 1, .*, 16\) .*got \(1, 1, .*, 3\)"):
        K.FusedLayers([singles[0]._replace(residual=-1)])
    wide = tuple(w if w is None else w.double() for w in singles[1].weights)
    with pytest.raises(TypeError, match=r"layer 1: .*float64"):
        K.FusedLayers([singles[0], singles[1]._replace(weights=wide)])


def test_the_library_guards_itself(rng: torch.Generator) -> None:
    """Without the checks in Python, the library still refuses wrong arguments."""
    x, singles, _ = arguments("one", rng)
    (weights, *_) = singles[0]
    numbers = [1, 1, 0, 1, 1, 1, 1, 1, -1, 0, 1, 0, 0]
    prepare = torch.ops.hne.prepare_layers
    for wrong in (numbers[:-1], [], [9, *numbers[1:]], [1, 0, *numbers[2:]], [1, 1, 0, 0, *numbers[4:]],
                  [*numbers[:4], 3, *numbers[5:]], [*numbers[:7], 0, *numbers[8:]], numbers * 2,
                  [*numbers[:8], 0, *numbers[9:]], [*numbers[:8], -2, *numbers[9:]],
                  [*numbers[:9], -1, *numbers[10:]], [*numbers[:9], 1, *numbers[10:]],
                  [*numbers[:10], 0, *numbers[11:]]):  # fmt: skip
        with pytest.raises(RuntimeError):
            prepare(list(weights), wrong)
    for missing in range(6):
        with pytest.raises(RuntimeError):
            prepare([None if i == missing else w for i, w in enumerate(weights)], numbers)
    with pytest.raises(RuntimeError):
        prepare([*weights, weights[0]], numbers)
    convolution = [0, 1, 0, 1, 0, 0, 0, 1, -1]
    for wrong in ([*convolution, -2, 1, 0, 0], [*convolution, 1, 1, 0, 0], [*convolution, -1, 0, 0, 0]):
        with pytest.raises(RuntimeError):
            prepare(list(weights[:2]), wrong)
    number = prepare(list(weights[:2]), [*convolution, -1, 1, 0, 0])
    with pytest.raises(RuntimeError, match="residual"):
        torch.ops.hne.fused_layers(x, number)
    pool = [4, 2, 1, 1, 0, 0, 0, 0, -1, 0, 1, 3, 1]  # window 3, stride 2, padding 1, one branch
    for wrong in (
        [*pool[:11], 0, 1],
        [*pool[:11], 1, 1],
        [*pool[:12], 0],
        [4, 0, *pool[2:]],
        [*pool[:9], -1, *pool[10:]],
    ):
        with pytest.raises(RuntimeError):
            prepare(list(weights), [*wrong, *numbers])
    rows = torch.ones(len(weights[1]), 3, 4, dtype=torch.float64)
    for wrong in (None, rows, rows[0].float()):
        with pytest.raises(RuntimeError):
            prepare([wrong, *weights], [3, *numbers[1:], *numbers])
    number = prepare(list(weights), numbers)
    for features in (x[0], x[..., 1:], x.double(), x[:, :, :0], torch.cat([x, x])):
        with pytest.raises(RuntimeError):
            torch.ops.hne.fused_layers(features, number)
    extension.cpu_library().forget_layers(number)
    extension.cpu_library().forget_layers(number)  # a second call does nothing


def test_no_gradient(rng: torch.Generator) -> None:
    x, singles, keep = arguments("one", rng)
    layers = K.FusedLayers(singles, keep)
    with pytest.raises(RuntimeError, match="FusedLayers is for inference and has no gradient"):
        layers(x.requires_grad_())
    weights = (singles[0].weights[0].clone().requires_grad_(), *singles[0].weights[1:])
    with pytest.raises(RuntimeError, match="FusedLayers is for inference and has no gradient"):
        K.FusedLayers([singles[0]._replace(weights=weights)])
    with torch.no_grad():
        assert not layers(x)[0].requires_grad


def test_a_copy_is_prepared_as_the_original(rng: torch.Generator) -> None:
    _, layers, keep = arguments("network", rng)
    for prepare in (True, False):
        original = K.FusedLayers(layers, keep, prepare=prepare)
        assert (copy.deepcopy(original)._prepared is None) == (original._prepared is None)

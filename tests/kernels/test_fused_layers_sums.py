"""Sequences whose layers read the outputs of any earlier ones, as their input or as a residual."""

from __future__ import annotations

import pytest
import torch
from random_layers import random_bottleneck, random_convolution
from threads import on_threads
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hne_kernels as K


class _Sequence:
    """Layers of random kinds and sizes, each of which reads features of random earlier ones."""

    def __init__(self, rng: torch.Generator, batch: int) -> None:
        self._rng = rng
        self.layers: list[K.FusedLayer] = []
        shape = (self._below(2, 1), batch, 7 + self._below(2), 7, 4)
        self.x = torch.randn(shape, generator=rng, dtype=torch.float64)
        self._shapes: list[tuple[int, ...]] = [shape]  # of the input, and of the output of each layer

    def _below(self, number: int, least: int = 0) -> int:
        return int(torch.randint(least, least + number, (), generator=self._rng))

    def _earlier(self) -> int:
        """A layer, counted backwards: mostly the last one."""
        return -1 if self._below(3) else -1 - self._below(len(self._shapes))

    def add(self) -> None:
        source = self._earlier()
        branches, _, height, width, channels = self._shapes[source]
        replicate = 2 if branches < 6 and self._below(4) == 0 else 1
        children = branches * replicate - self._below(replicate)
        mean = self._below(8) == 0
        if not mean and min(height, width) > 3 and self._below(6) == 0:
            stride, padding, average = 1 + self._below(2), self._below(2), self._below(2)
            layer = K.FusedLayer(
                (),
                stride,
                padding,
                pooling="average" if average else "max",
                window=2 + self._below(2),
                branches=children,
            )
        elif not mean and self._below(6) == 0:
            rows = torch.randn(children, 3, channels, generator=self._rng, dtype=torch.float64)
            layer = K.FusedLayer((rows,), activation="relu6")
        elif not mean and self._below(3) == 0:
            layer = random_bottleneck(self._rng, children, channels, 3 + self._below(9), 4 + self._below(2), 3, 1)
        else:
            kernel = 1 if mean else 1 + self._below(3)
            layer = random_convolution(self._rng, children, channels, 4 + self._below(2), kernel)
            stride = 1 + self._below(2) if min(height, width) > 3 else 1
            layer = layer._replace(stride=stride, padding=kernel // 2, mean=mean, activation="relu")
        layer = layer._replace(replicate=replicate, source=source)
        out = layer.check(self.x.new_empty(()).expand(self._shapes[source]))
        if len(layer.weights) == 2:  # a convolution
            fitting = [
                (number, -(-children // shape[0]))
                for number, shape in zip(range(-len(self._shapes), 0), self._shapes, strict=True)
                if shape[1:] == out[1:] and -(-children // -(-children // shape[0])) == shape[0]
            ]
            if fitting and self._below(4):
                residual, residual_replicate = fitting[self._below(len(fitting))]
                layer = layer._replace(residual=residual, residual_replicate=residual_replicate)
        self.layers.append(layer)
        self._shapes.append(out)

    def expected(self) -> list[Tensor]:
        """The output of every layer, one after the other."""
        outputs = [self.x]
        with K.use_backend("reference"):
            for layer in self.layers:
                residual = None if layer.residual is None else outputs[layer.residual]
                outputs.append(layer(outputs[layer.source], residual))
        return outputs[1:]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [2, 6, 20])
def test_random_sequences(length: int, threads: int, rng: torch.Generator) -> None:
    summed = 0
    for attempt in range(8):
        sequence = _Sequence(rng, batch=attempt % 4)
        for _ in range(length):
            sequence.add()
        summed += sum(layer.residual is not None for layer in sequence.layers)
        keep = [i for i in range(length) if not sequence._below(5)]
        layers, want = K.FusedLayers(sequence.layers, keep), sequence.expected()
        given = sequence.x.clone()
        with on_threads(threads):
            results = layers(sequence.x)
        with K.use_backend("reference"):
            in_turn = layers(sequence.x)
        wanted = [want[i] for i in sorted({*keep, length - 1})]
        if sequence.layers[-1].mean:
            wanted[-1] = wanted[-1].flatten(2)
        assert len(results) == len(in_turn) == len(wanted)
        for result, other, right in zip(results, in_turn, wanted, strict=True):
            torch.testing.assert_close(result, right)
            torch.testing.assert_close(other, right)
        assert torch.equal(sequence.x, given)
    assert summed > 0 or length < 20


def _sums_of_large_maps(rng: torch.Generator) -> tuple[Tensor, list[K.FusedLayer]]:
    """Features of 2 MiB a sample, each of which is added to the second output after it."""
    layers = [random_convolution(rng, 1, 64, 64)._replace(residual=-2 if i else -1) for i in range(12)]
    return torch.randn(1, 9, 64, 64, 64, generator=rng, dtype=torch.float64), layers


def test_micro_batches_of_sums(rng: torch.Generator) -> None:
    x, layers = _sums_of_large_maps(rng)
    (result,) = K.FusedLayers(layers)(x)
    together = K.FusedLayers(layers, [0])(x)[1]
    assert torch.equal(result, together)
    with K.use_backend("reference"):
        torch.testing.assert_close(result, K.FusedLayers(layers)(x)[0])


def test_memory_of_features_is_used_again(rng: torch.Generator) -> None:
    x, layers = _sums_of_large_maps(rng)
    whole = K.FusedLayers(layers, [10])
    K.release_memory()
    results = whole(x)
    # At any time there are the input and the residual of a layer, its output, and the slack of blocks.
    assert K.release_memory() <= 2 * 1.25 * results[0].nbytes  # idle memory; there is none with AddressSanitizer


def test_branches_of_a_block(rng: torch.Generator) -> None:
    """A slice of a block whose first layer branches; its residuals come from before and after the branching."""
    first, second, third = (random_convolution(rng, 6, 4, 4, 3)._replace(padding=1) for _ in range(3))
    shortcut = random_convolution(rng, 6, 4, 4)
    identity = [first._replace(replicate=2), second._replace(residual=-2, residual_replicate=2)]
    projected = [
        shortcut._replace(replicate=2),
        first._replace(replicate=2, source=-2),
        second,
        third._replace(residual=-3),
    ]
    x = torch.randn(3, 2, 5, 5, 4, generator=rng, dtype=torch.float64)
    for block in (identity, projected):
        (whole,) = K.FusedLayers(block)(x)
        for branches, parents, replicate in (
            (slice(0, 6), slice(0, 3), 2),
            (slice(0, 3), slice(0, 2), 2),
            (slice(2, 3), slice(1, 2), 1),
        ):
            part = K.select_branches(block, branches, replicate)
            torch.testing.assert_close(K.FusedLayers(part)(x[parents])[0], whole[branches])


def _basic_block(rng: torch.Generator) -> K.FusedLayers:
    """From 2 branches of 3 channels to 5 channels, with stride 2 and a convolution as its shortcut."""
    shortcut, first = (random_convolution(rng, 2, 3, 5, k)._replace(stride=2, padding=k // 2) for k in (1, 3))
    second = random_convolution(rng, 2, 5, 5, 3)._replace(padding=1, residual=-2)
    return K.FusedLayers([shortcut, first._replace(source=-2), second])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_recorded_block(rng: torch.Generator) -> None:
    layers = _basic_block(rng)
    x, other = (torch.randn(2, batch, 7, 6, 3, generator=rng, dtype=torch.float64) for batch in (4, 3))
    traced = torch.jit.trace(lambda x: layers(x)[0], x)
    compiled = torch.compile(lambda x: layers(x)[0], fullgraph=True, backend="aot_eager")
    for given in (x, other):
        torch.testing.assert_close(traced(given), layers(given)[0])
        torch.testing.assert_close(compiled(given), layers(given)[0])


def test_operations_of_a_block_are_counted(rng: torch.Generator) -> None:
    """Also of a layer that does not read the one before."""
    layers = _basic_block(rng)
    with FlopCounterMode(display=False) as counter:
        layers(torch.randn(2, 4, 7, 6, 3, generator=rng, dtype=torch.float64))
    assert counter.get_total_flops() == 2 * (2 * 4 * 4 * 3 * 5) * (3 + 9 * 3 + 9 * 5)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_sums_that_fit_some_sizes(backend: str, rng: torch.Generator) -> None:
    """Two ways to halve a feature map agree for even sizes or for odd ones only."""
    narrow = random_convolution(rng, 1, 3, 3, 1)._replace(stride=2)
    for padding, fits, other in ((0, 6, 7), (1, 7, 6)):
        even = random_convolution(rng, 1, 3, 3, 2)._replace(stride=2, padding=padding, source=-2, residual=-1)
        layers = K.FusedLayers([narrow, even])
        with K.use_backend(backend):
            x = torch.randn(1, 2, fits, fits, 3, generator=rng, dtype=torch.float64)
            torch.testing.assert_close(layers(x)[0], even(x, narrow(x)))
            with pytest.raises(ValueError, match=r"layer 1: residual: expected shape .*got"):
                layers(torch.randn(1, 2, other, other, 3, dtype=torch.float64))


def test_a_layer_needs_the_residual_that_it_names(rng: torch.Generator) -> None:
    layer = random_convolution(rng, 1, 3, 3)._replace(residual=-1)
    with pytest.raises(ValueError, match="residual: expected the output of the layer that this one names, got None"):
        layer(torch.randn(1, 2, 4, 4, 3, dtype=torch.float64))

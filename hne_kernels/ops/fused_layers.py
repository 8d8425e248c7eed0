"""A sequence of layers in one call, prepared once (inference)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import autograd, checks, dispatch, extension
from ..tracing import is_traced
from .fused_bottleneck_chain import MOST_CHANNELS, MOST_LAYERS, MOST_SIDE
from .fused_layer import FusedLayer

_LARGE = 1 << 20  # height and width for checking layers before there is an input


# Images of a micro-batch where layers are called one by one on a CPU: 16 images of CIFAR, and at least eight of larger
# ones, since the weights are read once for each.
IMAGES, PIXELS = 8, 16 * 32 * 32


def _in_memory(tensor: Tensor | None) -> bool:
    return tensor is None or type(tensor) in (Tensor, Parameter)  # subclasses, such as fake tensors, may have none


def add_member(logits: Tensor, total: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The sum of logits ``[1, B, L]`` and the total of the members before them, and ``sum / count`` in their dtype."""
    member = logits[0]
    total = member.to(torch.promote_types(member.dtype, torch.float32)) if total is None else total + member
    return total, (total / count).to(member.dtype)


def micro_batches(x: Tensor, batch_dim: int) -> tuple[Tensor, ...]:
    """Parts of a batch of features ``[G, B, H, W, C]`` or images ``[B, C, H, W]``, small enough that on a CPU the
    features of one layer are in the cache when the next layer reads them."""
    # A traced program does not depend on the size of its batch.
    if x.device.type != "cpu" or is_traced():
        return (x,)
    height, width = x.shape[2:4]
    most = max(IMAGES, PIXELS // max(1, height * width))
    return (x,) if x.shape[batch_dim] <= most else x.split(most, batch_dim)


class _Chain(NamedTuple):
    """Layers that one :func:`fused_bottleneck_chain` computes."""

    length: int
    weights: list[Tensor | None]
    numbers: list[int]
    pool: bool  # whether the layer after them reads the mean over their feature maps


def _is_chainable(layer: FusedLayer) -> bool:
    """Whether the CUDA kernel of a chain takes the layer, for small feature maps."""
    if not layer.is_bottleneck or layer.stride != 1 or layer.mean:
        return False
    expand, _, depthwise, _, _, project_bias, *_ = layer.weights
    assert expand is not None
    assert depthwise is not None
    assert project_bias is not None
    channels, middle, vector = expand.shape[4], depthwise.shape[3], 16 // expand.element_size()
    return (
        depthwise.shape[1] == 3
        and channels == project_bias.shape[1] <= MOST_CHANNELS
        and channels % vector == middle % vector == 0
    )


def _readers(layers: Sequence[FusedLayer]) -> dict[int, list[int]]:
    """By the index of a layer, or -1 for the input of all: the layers that read its output, in order."""
    readers: dict[int, list[int]] = {index: [] for index in range(-1, len(layers))}
    for index, layer in enumerate(layers):
        for name, number in (("source", layer.source), ("residual", layer.residual)):
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"layer {index}: {name}: expected an int, got {type(number).__name__}")
            if not -1 - index <= number <= -1:
                raise ValueError(f"layer {index}: {name}: expected a number from {-1 - index} to -1, got {number}")
            readers[index + number].append(index)
    return readers


def _find_chains(layers: Sequence[FusedLayer], kept: frozenset[int]) -> dict[int, _Chain]:
    """By the index of their first layer: consecutive layers that a chain computes. It ends at an output that is kept,
    before a layer with several output branches per input branch, and before other numbers of channels."""
    chains: dict[int, _Chain] = {}
    first = 0
    while first < len(layers):
        last = first
        while _is_chainable(layers[last]) and last + 1 < len(layers) and last not in kept:
            after = layers[last + 1]
            same = after.replicate == 1 and last + 1 - first < MOST_LAYERS and _is_chainable(after)
            if not same or after.weights[2].shape[3] != layers[first].weights[2].shape[3]:  # type: ignore[union-attr]
                break
            last += 1
        count = last + 1 - first
        pool = last + 1 < len(layers) and last not in kept and layers[last + 1].mean
        if _is_chainable(layers[first]) and (count > 1 or pool):
            weights: list[Tensor | None] = []
            numbers: list[int] = []
            for layer in layers[first : last + 1]:
                weights += layer.weights
                activations = map(checks.ACTIVATIONS.index, (layer.activation, layer.final_activation))
                activation, final_activation = activations
                numbers += [layer.replicate, activation, int(layer.identity), final_activation]
            chains[first] = _Chain(count, weights, numbers, pool)
        first += count
    return chains


_LOWERED_DTYPES = torch.float32, torch.bfloat16  # by autocast, on a CPU
_MOST_KINDS = 64  # of features that are remembered


class FusedLayers:
    """A sequence of layers.

    On a CPU it is one call of the library, which has checked and stored the weights: a small batch has no overhead, and
    feature maps between bottlenecks never leave the cache. Elsewhere, and where PyTorch records or transforms the call
    (``torch.compile``, ``torch.jit.trace``, ``torch.func``, ...), the layers are called in turn, so that a recorded
    program holds the weights; the CUDA kernels compute consecutive bottlenecks on small feature maps together
    (:func:`fused_bottleneck_chain`). The weights must not change. Of bfloat16 weights the library stores a copy in
    float32, and computes in it, unless the processor multiplies bfloat16 faster (AMX, or ``vdpbf16ps`` on AMD's Zen 4
    and 5) and all layers are pointwise convolutions, convolutions of images and bottlenecks with even numbers of
    channels: features between layers are then rounded to bfloat16. Under autocast to bfloat16 float32 features and
    weights are rounded to bfloat16, the weights once, unless a batch norm or pooling reads the features: then the
    layers are called in turn.

    Args:
        layers: the layers; each must fit the features that it reads.
        keep: indices of the layers whose outputs are results, besides the last.
        images: the first layer has one input branch, and takes images instead of features.
        prepare: False for layers that are used once, as in a compiled program; they are called in turn.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the layer and the argument.
        TypeError: a dtype does not fit.
        RuntimeError: a weight requires a gradient; this is for inference.
    """

    def __init__(
        self, layers: Sequence[FusedLayer], keep: Sequence[int] = (), *, images: bool = False, prepare: bool = True
    ) -> None:
        self.layers, self.images = tuple(layers), images
        if not self.layers:
            raise ValueError("layers: expected at least one, got none")
        for number in keep:
            if not 0 <= number < len(self.layers):
                raise ValueError(f"keep: expected numbers from 0 to {len(self.layers) - 1}, got {number}")
        checks.no_gradient("FusedLayers", *(weight for layer in self.layers for weight in layer.weights))
        self._result_indices = frozenset((*keep, len(self.layers) - 1))
        readers = _readers(self.layers)
        # By layer: the features that no later layer reads.
        self._finished: list[list[int]] = [[] for _ in self.layers]
        for index, found in readers.items():
            if found:
                self._finished[found[-1]].append(index)
        entry = self._entry()
        if entry is not None:
            self._check(entry, any_size=True)
        # Outputs that something else reads than the next layer, as its input.
        kept = {
            index for index, found in readers.items() if found != [index + 1] or self.layers[index + 1].source != -1
        }
        self._chains = _find_chains(self.layers, self._result_indices | kept)
        self._fitting: set[tuple[torch.Size, torch.dtype, torch.device]] = set()  # features that were checked
        self._prepared: int | None = None
        # Under autocast convolutions round what they read, batch norms and pooling do not.
        self._dtype = None if entry is None else entry.dtype
        self._lowerable = self._dtype in _LOWERED_DTYPES and all(
            bool(self.layers[reader].weights) and not self.layers[reader].is_norm and not self.layers[reader].mean
            for reader in readers[-1]
        )
        self._rounded: FusedLayers | None = None  # for autocast, once it is needed
        self._call = torch.ops.hne.fused_layers.default  # looked up once
        # A recorded program must hold the weights, so nothing is prepared while one is recorded.
        in_memory = all(_in_memory(weight) for layer in self.layers for weight in layer.weights)
        known = entry is not None and entry.is_cpu and entry.dtype in dispatch.DTYPES["cpp"]
        if prepare and in_memory and known and not is_traced():
            self._prepared = self._prepare()
            _PREPARED[self._prepared] = self
            weakref.finalize(self, extension.cpu_library().forget_layers, self._prepared)

    def __reduce__(self) -> tuple[Any, ...]:
        # The prepared layers belong to this object: a copy prepares its own.
        make = functools.partial(FusedLayers, images=self.images, prepare=self._prepared is not None)
        return make, (self.layers, sorted(self._result_indices))

    def _entry(self) -> Tensor | None:
        """Features like those that the first layer reads, without memory; None if no layer has filters, and any fit."""
        first, like, channels = self.layers[0], None, 0
        checks.at_least("layer 0: replicate", first.replicate, 1)
        branches = first.branches
        for index, layer in enumerate(self.layers):
            if not layer.weights:
                continue
            weight = layer.weights[0]
            shape = "[branches, 3, channels]" if layer.is_norm else "[out_branches, panels, k, k, channels, 16]"
            checks.rank(f"layer {index}: weights[0]", weight, 3 if layer.is_norm else 6, shape)  # type: ignore[arg-type]
            assert weight is not None
            branches = branches if index else len(weight)
            channels = channels or weight.shape[2 if layer.is_norm else 4]
            if not layer.is_norm:  # of bfloat16 features, that is float32
                like = weight
                break
        if like is None:
            return None
        return like.new_empty(()).expand(-(-branches // first.replicate), 1, _LARGE, _LARGE, channels)

    def _prepare(self) -> int:
        weights: list[Tensor | None] = []
        numbers: list[int] = []
        for index, layer in enumerate(self.layers):
            weights += layer.weights
            numbers += [
                _kind(layer),
                layer.stride,
                layer.padding,
                layer.replicate,
                checks.ACTIVATIONS.index(layer.activation),
                checks.ACTIVATIONS.index(layer.final_activation),
                int(layer.identity),
                int(index in self._result_indices),
                layer.source,
                layer.residual or 0,
                layer.residual_replicate,
                layer.window,
                layer.branches,
            ]
        prepared: int = torch.ops.hne.prepare_layers(weights, numbers)
        return prepared

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Compute the layers.

        Args:
            x: features ``[G, B, H, W, C]``, or images ``[B, C, H, W]`` with ``images``; any strides, device and dtype
                of the weights.

        Returns:
            The output ``[G', B, H', W', C']`` of every layer in ``keep``, and of the last one, in order. The output of
            a linear last layer is ``[G', B, C']``.

        Raises:
            ValueError, TypeError: ``x`` does not fit the layers.
            RuntimeError: a gradient is required.
        """
        if self._reaches_library(x):
            return self._library_call(x)
        if self._is_lowered(x):
            return self._in_bfloat16()._library_call(x.to(torch.bfloat16))
        if self.images:
            checks.rank("x", x, 4, "[batch, channels, height, width]")
        else:
            checks.rank("x", x, 5, checks.CONV_INPUT)
        checks.no_gradient("FusedLayers", x)
        if is_traced():
            return self._in_turn(x)
        with torch._C._AutoDispatchBelowAutograd():
            batches = (x,) if len(self._result_indices) > 1 else micro_batches(x, 0 if self.images else 1)
            results = []
            for batch in batches:
                results.append(self._in_turn(batch))
            return results[0] if len(results) == 1 else [torch.cat([outputs[0] for outputs in results], 1)]

    def next_member(self, x: Tensor, total: Tensor | None, count: int) -> list[Tensor]:
        """Compute the layers of one member of an ensemble, up to its logits, and the mean with the members before.

        Args:
            x: as for a call.
            total: the sum of the logits of the members before, ``[B, C']`` float32 (float64 for float64 logits), or
                None.
            count: the number of members, this one included; at least 1.

        Returns:
            What a call returns, whose last tensor are the logits ``[1, B, C']``; their sum with ``total``,
            ``[B, C']``; and the mean ``sum / count`` in the dtype of the logits.

        Raises:
            ValueError, TypeError, RuntimeError: as in a call.
        """
        if self._reaches_library(x):
            return self._library_call(x, total, count)
        if self._is_lowered(x):
            return self._in_bfloat16()._library_call(x.to(torch.bfloat16), total, count)
        outputs = self(x)
        return [*outputs, *add_member(outputs[-1], total, count)]

    def _reaches_library(self, x: Tensor, *, autocast: bool = False) -> bool:
        reaches = self._prepared is not None and dispatch.reaches_cpp(x, autocast=autocast)
        return reaches and x.dim() == (4 if self.images else 5)

    def _is_lowered(self, x: Tensor) -> bool:
        """Whether autocast lowers a call to bfloat16 that would reach the library without autocast."""
        return (
            self._lowerable
            and self._reaches_library(x, autocast=True)
            and x.dtype in _LOWERED_DTYPES
            and checks.autocast_dtype("cpu") == torch.bfloat16
        )

    def _in_bfloat16(self) -> FusedLayers:
        """The layers with weights rounded to bfloat16, but for the statistics of batch norms."""
        if self._rounded is None:
            if self._dtype == torch.bfloat16:
                return self
            layers = [
                layer
                if layer.is_norm
                else layer._replace(weights=tuple(None if w is None else w.to(torch.bfloat16) for w in layer.weights))
                for layer in self.layers
            ]
            self._rounded = FusedLayers(layers, sorted(self._result_indices), images=self.images)
        return self._rounded

    def _library_call(self, x: Tensor, *arguments: Any) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():  # there is no gradient: the dispatcher need not look for one
            try:
                outputs: list[Tensor] = self._call(x, self._prepared, *arguments)
            except Exception:
                self._check(self._features(x))
                raise
        return outputs

    def _in_turn(self, x: Tensor) -> list[Tensor]:
        x = self._features(x)
        self._check_once(x)
        results = []
        features = {-1: x}  # those that are read later, by the index of the layer that computes them
        chains = self._chains if self._chains and dispatch.backend_for(x) == "cuda" else {}
        index, pooled = 0, False
        while index < len(self.layers):  # the ops themselves are called: every Python frame costs time
            chain, layer, finished = chains.get(index), self.layers[index], self._finished[index]
            x = features[index + layer.source]
            if chain is not None and x.shape[2] <= MOST_SIDE and x.shape[3] <= MOST_SIDE:
                length, *arguments = chain
                x = dispatch.implementation("fused_bottleneck_chain", x)(x, *arguments)
                index, pooled = index + length, chain.pool
            else:
                arguments = [*layer.arguments] if layer.weights else []
                if layer.residual is not None:
                    arguments += [features[index + layer.residual], layer.residual_replicate]
                x = x if pooled else layer.input(x)
                x = dispatch.implementation(layer.op, x)(x, *arguments) if layer.weights else x
                index, pooled = index + 1, False
            features[index - 1] = x
            for number in finished:
                del features[number]
            if index - 1 in self._result_indices:
                results.append(x)
        if self.layers[-1].mean:
            results[-1] = results[-1].flatten(2)
        return results

    def _features(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).unsqueeze(0) if self.images else x

    def _check_once(self, x: Tensor) -> None:
        """As :meth:`_check`, without what features of the same kind have passed: it takes longer than the launches."""
        if is_traced():  # its sizes may be symbols
            self._check(x)
            return
        kind = (x.shape, x.dtype, x.device)
        if kind not in self._fitting:
            self._check(x)
            if len(self._fitting) == _MOST_KINDS:
                self._fitting.clear()
            self._fitting.add(kind)

    def _check(self, x: Tensor, *, any_size: bool = False) -> None:
        """Raise unless the layers fit features like ``x``; with ``any_size``, whatever their height and width."""
        features = [x]  # tensors without memory, like the outputs
        for index, layer in enumerate(self.layers):
            source = features[index + 1 + layer.source]
            residual = None if layer.residual is None else features[index + 1 + layer.residual]
            try:
                if residual is not None and any_size:  # whether sizes agree may depend on whether x has odd ones
                    rows, columns = layer.check(source)[2:4]
                    residual = x.new_empty(()).expand(*residual.shape[:2], rows, columns, residual.shape[4])
                shape = layer.check(source, residual)
            except (ValueError, TypeError) as error:
                raise type(error)(f"layer {index}: {error}") from None
            features.append(x.new_empty(()).expand(shape))


def _kind(layer: FusedLayer) -> int:
    """The number of a layer's kind in csrc/cpu/layer_spec.h."""
    if layer.pooling:
        return 4 if layer.pooling == "max" else 5
    return 3 if layer.is_norm else 1 if layer.is_bottleneck else 2 if layer.mean else 0


# By handle: the sequences that are prepared.
_PREPARED: weakref.WeakValueDictionary[int, FusedLayers] = weakref.WeakValueDictionary()


def prepared_layers(handle: int) -> tuple[FusedLayer, ...]:
    """The layers that a call of ``torch.ops.hne.fused_layers`` with this handle computes."""
    return _PREPARED[handle].layers


dispatch.register("fused_layers", FusedLayers._in_turn, "reference", "cuda", "triton")
autograd.register_inference("fused_layers")

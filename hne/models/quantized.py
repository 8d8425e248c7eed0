"""An ensemble in int8, for inference on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hne_kernels as K

from ..executors import Anytime, QuantizedExecutor, Quantizer, Range, fused_pool_linear, observe, to_fused_layers
from .hne import HNE, FusedHNE


class QuantizedHNE(nn.Module):
    """An ensemble in int8; :func:`quantize` makes it of a trained one. It cannot be trained.

    Weights are int8 with a scale for each output channel, features uint8 with a scale and a zero point for each branch,
    sums int32. All CPUs compute the same integers.

    Args:
        config: The config of the network, :meth:`hne.HNE.config`.
        layers: The layers in order: one for the images, those of each block with all branches, and the head.

    Raises:
        ValueError, TypeError: The layers do not fit the network or each other.

    Attributes:
        metadata: As :attr:`hne.HNE.metadata`.
    """

    metadata: Mapping[str, Any] = {}

    def __init__(self, config: Mapping[str, Any], layers: Sequence[K.QuantizedLayer]) -> None:
        super().__init__()
        with torch.device("meta"):  # without memory: it counts operations
            self._network = (FusedHNE.from_config(dict(config)),)  # in a tuple: no module of this one
        self.hierarchy, self.num_classes = self._network[0].hierarchy, self._network[0].num_classes
        self.in_channels = self._network[0].in_channels
        self.layers = tuple(layers)
        if len(self.layers) < 2:
            raise ValueError(f"layers: expected at least 2, got {len(self.layers)}")
        entry, *rest = self.layers
        if rest[-1].channels != K.padded(self.num_classes) or entry.in_channels != self.in_channels:
            raise ValueError("layers: the first and the last do not have the channels and classes of the network")
        counts = [len(block) for block in self._network[0].layers_of_blocks()]
        if len(rest) != sum(counts) + 1:
            raise ValueError(f"layers: expected {sum(counts) + 2}, got {len(self.layers)}")
        remaining = iter(rest)
        blocks = [[*itertools.islice(remaining, count)] for count in counts]
        self._executor = QuantizedExecutor(self.hierarchy, entry, blocks, rest[-1], self.num_classes)
        tensors = (tensor for layer in self.layers for tensor in layer.tensors if tensor is not None)
        self.tensors = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
        self.eval()

    def extra_repr(self) -> str:
        return f"{self.num_models} models, {self.num_classes} classes"

    @property
    def num_models(self) -> int:
        """Number of leaves."""
        return self.hierarchy.num_models

    @property
    def prefix_sizes(self) -> tuple[int, ...]:
        """The ensemble sizes of :meth:`prefix_logits`: the powers of two below ``num_models``, and that."""
        return K.default_sizes(self.num_models)

    def config(self) -> dict[str, Any]:
        """The config of the network."""
        return self._network[0].config()

    def macs(self, num_models: int | None = None, input_size: int | tuple[int, int] = (32, 32)) -> int:
        """As :meth:`hne.HNE.macs`."""
        return self._network[0].macs(num_models, input_size)

    def executor(self) -> QuantizedExecutor:
        """What computes the layers."""
        return self._executor

    def forward(self, x: Tensor, num_models: int | None = None) -> Tensor:
        """Logits of the first ``num_models`` leaves: images float32 ``[B, C, H, W]`` to float32 ``[N, B, L]``.

        Raises:
            ValueError, TypeError: As :meth:`hne.HNE.forward`.
        """
        self.check_images(x)
        n = self.num_models if num_models is None else num_models
        self.hierarchy.check_num_models(n)
        return self._executor.run(x, slice(0, n))[-1]

    def prefix_logits(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Logits of nested ensembles, as :meth:`hne.HNE.prefix_logits`."""
        self.check_images(x)
        wanted = self.prefix_sizes if sizes is None else tuple(sizes)
        if not wanted or any(a >= b for a, b in itertools.pairwise((0, *wanted))):
            raise ValueError(f"sizes must rise from at least 1, got {wanted}")
        self.hierarchy.check_num_models(wanted[-1])
        return self._executor.run(x, slice(0, wanted[-1]), sizes=wanted)[-1]

    def anytime(self, x: Tensor) -> Anytime:
        """Anytime inference, as :meth:`hne.HNE.anytime`."""
        self.check_images(x)
        return Anytime(self, x)

    def check_images(self, x: Tensor) -> None:
        """Raise unless ``x`` are images that :meth:`forward` accepts."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be images [batch, {self.in_channels}, height, width], got shape {tuple(x.shape)}")
        if x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(f"x must be images of at least 1x1 pixels, got shape {tuple(x.shape)}")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(f"x must be float32 on the CPU, got {x.dtype} on {x.device}")

    def train(self, mode: bool = True) -> QuantizedHNE:
        if mode:
            raise RuntimeError("a QuantizedHNE cannot be trained: train the network that it was made of")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedHNE:
        like = torch.empty(0)
        if (changed := fn(like)).device != like.device or changed.dtype != like.dtype:
            raise RuntimeError("a QuantizedHNE computes on the CPU, from float32 images")
        return self

    def layer_configs(self) -> list[dict[str, Any]]:
        """The layers as JSON-able values, without their tensors: instead of each, whether there is one."""
        return [
            {**layer._asdict(), "tensors": [tensor is not None for tensor in layer.tensors]} for layer in self.layers
        ]

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], tensors: Iterable[Tensor]
    ) -> QuantizedHNE:
        """The network of :meth:`config`, :meth:`layer_configs` and the tensors, in order.

        Raises:
            ValueError, TypeError, StopIteration: They do not fit each other.
        """
        remaining = iter(tensors)
        made = []
        for layer in layers:
            found = tuple(next(remaining) if there else None for there in layer["tensors"])
            made.append(K.QuantizedLayer(**{**layer, "tensors": found}))
        return cls(config, made)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedHNE, (self.config(), self.layers)


@torch.no_grad()
def quantize(model: HNE, images: Tensor | Iterable[Tensor]) -> QuantizedHNE:
    """Convert a trained network to int8, for inference on a CPU.

    The range of every feature map is that for the given images: take some hundred of the training images, normalised as
    in training and without augmentation.

    Args:
        model: A network of :class:`hne.Conv`, :class:`hne.Bottleneck` and :class:`hne.PoolLinear` layers with the
            activations ``none``, ``relu`` and ``relu6``, in eval mode on the CPU, in float32.
        images: ``[B, C, H, W]``, or batches of these.

    Raises:
        ValueError: There are no images, or the model has a layer of another kind; the message names it.
        TypeError: The model or the images have another dtype.
        RuntimeError: The model is in training mode.
    """
    if model.training:
        raise RuntimeError("quantize() is for inference: call model.eval() first")
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        raise TypeError(f"model: expected float32 on the CPU, got {parameter.dtype} on {parameter.device}")
    layers = [
        folded._replace(replicate=replicate if index == 0 else 1)
        for block, replicate in zip(_folded(model), model.hierarchy.replication, strict=True)
        for index, folded in enumerate(block)
    ]
    seen: list[list[Range]] = []
    for batch in [images] if isinstance(images, Tensor) else images:
        model.check_images(batch)
        if not len(batch):
            continue
        x = batch.permute(0, 2, 3, 1)[None].contiguous()
        found = [[Range.of(x)]]
        for layer in layers:
            x, ranges = observe(layer, x)
            found.append(ranges)
        if not all(bound.isfinite().all() for ranges in found for pair in ranges for bound in pair):
            raise ValueError("images: expected finite values, and finite features of them")
        seen = [[*map(Range.union, *pair)] for pair in zip(found, seen, strict=True)] if seen else found
    if not seen:
        raise ValueError("images: expected at least one, got none")
    quantizer = Quantizer(seen[0][0], model.in_channels)
    converted = [quantizer.entry]
    for index, (layer, ranges) in enumerate(zip(layers, seen[1:], strict=True)):
        converted.append(quantizer.convert(layer, ranges, last=index == len(layers) - 1))
    return QuantizedHNE(model.config(), converted)


def _folded(model: HNE) -> list[list[K.FusedLayer]]:
    """The folded layers of each block, and the head as one more block."""
    blocks: list[list[K.FusedLayer]] = []
    for number, block in enumerate(model.layers_of_blocks()):
        blocks.append([])
        for index, layer in enumerate(block):
            folded = to_fused_layers(layer)
            if not isinstance(folded, list) or len(folded) != 1 or len(folded[0].weights) not in (2, 8):
                raise ValueError(
                    f"blocks.{number}.{index} ({layer.spec}): int8 inference knows Conv (without groups), Bottleneck "
                    "and PoolLinear with the activations none, relu and relu6, without hooks"
                )
            blocks[-1].append(folded[0])
    return [*blocks, [fused_pool_linear(model.head)]]

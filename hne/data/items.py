"""Items of a map-style data set of PyTorch, as labelled images."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data

from ..errors import DataError
from .decode import to_8_bits
from .plan import Plan

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")


@dataclass(frozen=True)
class ItemImages:
    """The items ``(image, label)`` of a map-style data set, read on demand.

    An image is a tensor ``[C, H, W]`` or ``[H, W]``, an array ``[H, W]`` or ``[H, W, C]``, or a PIL image. It is of
    uint8, or of floating-point numbers that are already scaled. A label is an integer.

    Before each item is read, the generators of torch (CPU), NumPy and Python are seeded for it: in training from the
    generator of the run, else from the index. So random changes of an image depend neither on the number of workers and
    processes nor on what was drawn before, and the states of the generators outside are as they were. An item that
    draws from a generator of its own, or depends on the items read before, is beyond that.

    Attributes:
        items: the data set.
        name: for error texts.
        channels: expected of all images.
        classes: number of classes.
        transform: a function from one image ``[C, H, W]``, of the data set's dtype, to the changed image, for training.
        workers: processes that read batches; with 0, this process does.
        as_indices: whether the label of an item is its index.
    """

    items: data.Dataset
    name: str
    channels: int
    classes: int
    transform: Callable[[Tensor], Tensor] | None = None
    workers: int = 0
    as_indices: bool = False

    labels: ClassVar[None] = None  # unknown until the items are read

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the seeds of ``count`` items: int64 ``[count]``."""
        return torch.randint(2**63 - 1, (count,), generator=generator)

    def pixels(self, indices: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return images as uint8 or floating-point numbers ``[B, H, W, C]``, transformed if ``noise`` is given.

        Raises:
            DataError: an item is not as described above, or the images of the batch differ in shape or dtype.
        """
        return self.read(indices.tolist(), None if noise is None else noise.tolist())[0]

    def batches(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`MemoryImages.batches`; ``workers`` processes read batches ahead of the one in use."""
        lists = ((indices.tolist(), None if noise is None else noise.tolist()) for indices, noise in plan)
        # The loader seeds its workers from its generator: without one, from torch's global generator.
        yield from data.DataLoader(
            _Batches(self), batch_size=None, sampler=lists, num_workers=self.workers, generator=torch.Generator()
        )

    def read(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Read a batch: pixels as by :meth:`pixels` and labels, int64 ``[B]``; ``seeds`` are rows of :meth:`draw`."""
        images, labels = [], []
        with _preserved_generators():
            for index, seed in zip(indices, indices if seeds is None else seeds, strict=True):
                _seed_generators(seed)
                image, label = self._item(index)
                if seeds is not None and self.transform is not None:
                    image = self._transformed(image, index)
                images.append(image)
                labels.append(label)
        for index, image in zip(indices, images, strict=True):
            if (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
                raise DataError(
                    f"{self.name}[{index}]: expected an image like {self.name}[{indices[0]}] in the same batch, "
                    f"{_kind(images[0])}, got {_kind(image)}"
                )
        return torch.stack([image.permute(1, 2, 0) for image in images]).contiguous(), torch.tensor(labels)

    def check(self) -> None:
        """Check the first item."""
        if len(self):
            self.read([0], [0])

    def subset(self, indices: Tensor) -> ItemImages:
        return replace(self, items=data.Subset(self.items, indices.tolist()))

    def indexed(self) -> ItemImages:
        """See :meth:`MemoryImages.indexed`."""
        return replace(self, as_indices=True)

    def to(self, device: torch.device) -> ItemImages:
        """Return the same images: items are read by the CPU."""
        return self

    def _item(self, index: int) -> tuple[Tensor, int]:
        where = f"{self.name}[{index}]"
        image, label = _pair(self.items, index, where)
        self._check(image, where)
        return image, index if self.as_indices else self._label(label, where)

    def _transformed(self, image: Tensor, index: int) -> Tensor:
        assert self.transform is not None
        where = f"transform of {self.name}[{index}]"
        image = self.transform(image)
        if not isinstance(image, Tensor):
            raise DataError(f"{where}: expected a tensor [channels, height, width], got {type(image).__name__}")
        image = as_image(image, where)
        self._check(image, where)
        return image

    def _check(self, image: Tensor, where: str) -> None:
        if len(image) != self.channels or image.numel() == 0:
            raise DataError(f"{where}: expected an image of {self.channels} channels, got {_kind(image)}")
        if image.is_floating_point() and not image.isfinite().all():
            raise DataError(f"{where}: expected finite numbers, got NaN or infinity")

    def _label(self, value: Any, where: str) -> int:
        label: int | None
        try:
            label = operator.index(value)
        except (TypeError, ValueError):
            label = None
        if label is None or not 0 <= label < self.classes:
            shape = tuple(getattr(value, "shape", ()))
            got = label if label is not None else f"{type(value).__name__} of shape {shape}" if shape else repr(value)
            raise DataError(f"{where}: expected a label from 0 to {self.classes - 1}, got {got}")
        return label


def image_shape(items: data.Dataset, name: str) -> torch.Size:
    """The shape ``[C, H, W]`` of the first image of a data set; ``name`` is for error texts.

    Raises:
        DataError: the first item is not a pair of an image and a label.
    """
    with _preserved_generators():
        _seed_generators(0)
        return _pair(items, 0, f"{name}[0]")[0].shape


def as_image(value: Any, where: str) -> Tensor:
    """Convert an image to ``[C, H, W]``, uint8 or floating point.

    Args:
        value: a tensor, an array or a PIL image, see :class:`ItemImages`.
        where: names the image in error texts.

    Raises:
        DataError: it is of another type, shape or dtype.
    """
    if isinstance(value, Image.Image):
        value = np.array(to_8_bits(value, "L" if value.mode in _GREY_MODES else "RGB", name=where))
    if isinstance(value, np.ndarray):
        array = value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise DataError(f"{where}: expected an image of uint8 or floating-point numbers, got {array.dtype}")
        image = torch.from_numpy(np.ascontiguousarray(array))
        image = image.permute(2, 0, 1) if image.dim() == 3 else image
    elif isinstance(value, Tensor):
        image = value.detach().as_subclass(Tensor)
    else:
        raise DataError(f"{where}: expected an image as tensor, array or PIL image, got {type(value).__name__}")
    image = image[None] if image.dim() == 2 else image
    if image.dim() != 3:
        raise DataError(f"{where}: expected an image of 2 or 3 dimensions, got shape {tuple(value.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise DataError(f"{where}: expected an image of uint8 or floating-point numbers, got {image.dtype}")
    return image.cpu()


def _pair(items: data.Dataset, index: int, where: str) -> tuple[Tensor, Any]:
    item = items[index]
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
        raise DataError(f"{where}: expected a pair (image, label), got {got}")
    return as_image(item[0], where), item[1]


class _Batches(data.Dataset):
    """A data set whose items are the batches of a plan."""

    def __init__(self, split: ItemImages) -> None:
        self.split = split

    def __getitem__(self, batch: tuple[list[int], list[int] | None]) -> tuple[Tensor, Tensor]:
        return self.split.read(*batch)


@contextmanager
def _preserved_generators() -> Iterator[None]:
    """Restore the global generators of torch (CPU), NumPy and Python at the end."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def _seed_generators(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def _kind(image: Tensor) -> str:
    return f"{image.dtype} {tuple(image.shape)}"

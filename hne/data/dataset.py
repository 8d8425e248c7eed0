"""What a data set is: images with labels, in memory or in files, and the input they become."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import DataError
from . import augment


@dataclass(frozen=True)
class InputFormat:
    """How a picture becomes the input of a network. A checkpoint carries it, to read other
    pictures alike.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: height and width in pixels.
        mean, std: of every channel over the training images, pixels scaled to [0, 1].
        resize: length of the shorter side before a centre crop to ``size``; None squeezes the
            whole picture.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> [B, C, H, W] in channels_last memory, of torch's default dtype, with mean 0 and
        deviation 1 in every channel."""
        mean = torch.tensor(self.mean, device=pixels.device) * 255
        std = torch.tensor(self.std, device=pixels.device) * 255
        return pixels.to(mean.dtype).sub_(mean).div_(std).permute(0, 3, 1, 2)

    def read(self, path: str | Path, noise: Sequence[float] | None = None) -> np.ndarray:
        """Read one picture as uint8 [H, W, C].

        Args:
            path: a file of any format that Pillow reads.
            noise: ``augment.RESIZED_CROP_DRAWS`` uniform numbers for a random resized crop and
                flip; without them the picture is resized (and cropped at its centre) as for
                evaluation.

        Raises:
            DataError: the file is missing or no complete image.
        """
        try:
            with Image.open(path) as opened:
                image = opened.convert(self._mode)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file") from error
        except (
            OSError,
            UnidentifiedImageError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            raise DataError(f"{path}: not a complete image ({error})") from error
        if noise is None:
            return self.fit(image)
        height, width = self.size
        box = augment.resized_crop_box(image.width, image.height, noise)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if noise[-1] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._pixels(image)

    def fit(self, image: Image.Image) -> np.ndarray:
        """A picture as it is read for evaluation, uint8 [H, W, C]: grey or RGB, resized, cropped at its centre."""
        height, width = self.size
        image = image.convert(self._mode)
        if self.resize is None:
            return self._pixels(image.resize((width, height), Image.Resampling.BILINEAR))
        scale = self.resize / min(image.width, image.height)
        resized = (round(image.width * scale), round(image.height * scale))
        image = image.resize(resized, Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return self._pixels(image.crop((left, top, left + width, top + height)))

    @property
    def _mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def _pixels(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image).reshape(*self.size, self.channels)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputFormat:
        """The inverse of :meth:`to_dict`."""
        lists = {name: tuple(values[name]) for name in ("size", "mean", "std")}
        return cls(**{**values, **lists})


@dataclass(frozen=True)
class TargetFormat:
    """How a number to be predicted is normalised.

    Attributes:
        mean, std: over the training samples.
    """

    mean: float
    std: float

    def normalise(self, target: Tensor) -> Tensor:
        """With mean 0 and deviation 1."""
        return (target - self.mean) / self.std


@dataclass(frozen=True)
class MemoryImages:
    """Labelled images in memory; augmented by a padded random crop and a flip.

    Attributes:
        images: uint8 [N, H, W, C], or other measurements in float32 [N, 1, 1, C].
        labels: class indices, int64 [N], or numbers to be predicted, float32 [N].
        pad: pixels of padding for the random crop.
        flip: whether a mirrored image is still of its class.
    """

    images: Tensor
    labels: Tensor
    pad: int = 0
    flip: bool = False

    prefetch = 0  # a batch costs less than handing it between threads

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The random numbers that augment ``count`` images: float64 [count, k] in [0, 1)."""
        size = (count, augment.CROP_AND_FLIP_DRAWS)
        return torch.rand(size, generator=generator, dtype=torch.float64)

    def pixels(self, indices: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images as uint8 [B, H, W, C], augmented if ``noise`` (rows of :meth:`draw`) is given."""
        images = self.images[indices.to(self.images.device)]
        if noise is None:
            return images
        return augment.crop_and_flip(images, noise, pad=self.pad, flip=self.flip)

    def subset(self, indices: Tensor) -> MemoryImages:
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def to(self, device: torch.device) -> MemoryImages:
        """Keep the images on ``device``: batches are then cut out and augmented there."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class FileImages:
    """Labelled image files, decoded by threads when they are needed; augmented by a random
    resized crop and a flip.

    Attributes:
        paths: N files.
        labels: int64 [N].
        input: the format they are decoded to.
        workers: threads that decode.
    """

    paths: tuple[str, ...]
    labels: Tensor
    input: InputFormat
    workers: int = 8
    _pool: ThreadPoolExecutor = field(init=False, repr=False, compare=False)

    prefetch = 2  # batches decoded ahead of the one in use

    def __post_init__(self) -> None:
        object.__setattr__(self, "_pool", ThreadPoolExecutor(self.workers))

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """As :meth:`MemoryImages.draw`."""
        size = (count, augment.RESIZED_CROP_DRAWS)
        return torch.rand(size, generator=generator, dtype=torch.float64)

    def pixels(self, indices: Tensor, noise: Tensor | None = None) -> Tensor:
        """As :meth:`MemoryImages.pixels`.

        Raises:
            DataError: a file is not a complete image.
        """
        paths = [self.paths[index] for index in indices.tolist()]
        rows = [None] * len(paths) if noise is None else noise.tolist()
        return torch.from_numpy(np.stack(list(self._pool.map(self.input.read, paths, rows))))

    def subset(self, indices: Tensor) -> FileImages:
        paths = tuple(self.paths[index] for index in indices.tolist())
        return replace(self, paths=paths, labels=self.labels[indices])

    def to(self, device: torch.device) -> FileImages:
        """The files stay where they are."""
        return self


Images = MemoryImages | FileImages


@dataclass(frozen=True)
class Dataset:
    """Images to train on, images to test on, and what they show.

    Attributes:
        name: as in ``DATASETS``.
        classes: a name for every label; none for a regression.
        input: the input that a network gets.
        train, test: the two splits.
        target: of a regression, whose labels are numbers; else None.
    """

    name: str
    classes: tuple[str, ...]
    input: InputFormat
    train: Images
    test: Images
    target: TargetFormat | None = None

    @property
    def outputs(self) -> int:
        """How many a network needs: one for each class; for a regression, mean and variance."""
        return len(self.classes) if self.target is None else 2

    def to(self, device: torch.device) -> Dataset:
        """Keep images that are in memory on ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

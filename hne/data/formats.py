"""Formats of inputs and regression targets: sizes and normalisation, as plain data that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    """How an image becomes the input of a network. A checkpoint stores it, so that new images are read alike.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: height and width in pixels.
        mean, std: per channel over the training images, with pixels scaled to [0, 1].
        resize: length of the shorter side before the centre crop to ``size``; None resizes the whole image to
            ``size`` and ignores its aspect ratio.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale every channel to mean 0 and standard deviation 1.

        Args:
            pixels: uint8 ``[B, H, W, C]``.

        Returns:
            ``[B, C, H, W]`` in channels_last memory, of torch's default dtype.
        """
        mean = torch.tensor(self.mean, device=pixels.device) * 255
        std = torch.tensor(self.std, device=pixels.device) * 255
        return pixels.to(mean.dtype).sub_(mean).div_(std).permute(0, 3, 1, 2)

    def read(self, path: str | Path, noise: Sequence[float] | None = None) -> np.ndarray:
        """Read an image file.

        Args:
            path: a file in any format that Pillow reads.
            noise: ``augment.RESIZED_CROP_DRAWS`` uniform numbers for a random resized crop and a flip. Without them
                the image is read as for evaluation (see :meth:`fit`).

        Returns:
            uint8 ``[H, W, C]``.

        Raises:
            DataError: the file is missing or not a complete image.
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
        """Convert an image as for evaluation: to grey or RGB, resized, cropped at its centre. uint8 ``[H, W, C]``."""
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
        """Return the format as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputFormat:
        """Invert :meth:`to_dict`."""
        lists = {name: tuple(values[name]) for name in ("size", "mean", "std")}
        return cls(**{**values, **lists})


@dataclass(frozen=True)
class TargetFormat:
    """Normalisation of a regression target.

    Attributes:
        mean, std: over the training samples.
    """

    mean: float
    std: float

    def normalise(self, target: Tensor) -> Tensor:
        """Scale targets to mean 0 and standard deviation 1."""
        return (target - self.mean) / self.std

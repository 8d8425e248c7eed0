"""Formats of inputs and regression targets: sizes and normalisation, as plain data that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import augment
from .decode import decode, to_8_bits

_LARGE = 2**22  # pixels of an intermediate image


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
            pixels: ``[B, H, W, C]``: uint8, which are scaled to [0, 1], or floating-point numbers as they are. The
                latter may be overwritten.

        Returns:
            ``[B, C, H, W]`` in channels_last memory, of torch's default dtype.
        """
        white = 255 if pixels.dtype == torch.uint8 else 1
        mean = torch.tensor(self.mean, device=pixels.device) * white
        std = torch.tensor(self.std, device=pixels.device) * white
        return pixels.to(mean.dtype).sub_(mean).div_(std).permute(0, 3, 1, 2)

    def read(self, path: str | Path, noise: Sequence[float] | None = None) -> np.ndarray:
        """Read an image file.

        Args:
            path: a file in any format that Pillow reads; of several frames the first is taken. See
                :func:`hne.data.decode.to_8_bits` for 16-bit, transparent and rotated images.
            noise: ``augment.RESIZED_CROP_DRAWS`` uniform numbers for a random resized crop and a flip. Without them
                the image is read as for evaluation (see :meth:`fit`).

        Returns:
            uint8 ``[H, W, C]``.

        Raises:
            DataError: the file is missing, no complete image, too large, or of values that have no defined black and
                white.
        """
        image = decode(path, self._mode)
        if noise is None:
            return self._fit(image)
        height, width = self.size
        box = augment.resized_crop_box(image.width, image.height, noise)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if noise[-1] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._pixels(image)

    def fit(self, image: Image.Image) -> np.ndarray:
        """Convert an image as for evaluation: to grey or RGB, resized, cropped at its centre. uint8 ``[H, W, C]``.

        Raises:
            DataError: black and white are not defined for the values of the image.
        """
        return self._fit(to_8_bits(image, self._mode))

    def _fit(self, image: Image.Image) -> np.ndarray:
        return self._pixels(self._squeeze(image) if self.resize is None else self._resize_and_crop(image))

    def _squeeze(self, image: Image.Image) -> Image.Image:
        """Resize the whole image to ``size``."""
        height, width = self.size
        if width * image.height > _LARGE:  # Pillow scales the width first, which makes a tall image vast
            image = image.resize((image.width, height), Image.Resampling.BILINEAR, reducing_gap=4)
        return image.resize((width, height), Image.Resampling.BILINEAR)

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side to ``resize`` and cut out the centre; black where the image is smaller.

        Sizes are rounded as torchvision's ``Resize`` and ``CenterCrop`` round them.
        """
        assert self.resize is not None
        height, width = self.size
        shorter = min(image.width, image.height)
        resized = (self.resize * image.width // shorter, self.resize * image.height // shorter)
        left, top = _centre(resized[0], width), _centre(resized[1], height)
        right, bottom = left + width, top + height
        if resized[0] * resized[1] <= _LARGE:
            return image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, right, bottom))
        # A long and narrow image would become vast: compute only the part of it that lies in the crop.
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, resized[0]), min(bottom, resized[1])
        sx, sy = image.width / resized[0], image.height / resized[1]
        box = (x0 * sx, y0 * sy, min(x1 * sx, image.width), min(y1 * sy, image.height))
        part = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=box)
        crop = Image.new(self._mode, (width, height))
        crop.paste(part, (x0 - left, y0 - top))
        return crop

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


def _centre(length: int, crop: int) -> int:
    """Where a centred crop begins; below 0 if it is longer than the image."""
    return round((length - crop) / 2) if length >= crop else -((crop - length) // 2)

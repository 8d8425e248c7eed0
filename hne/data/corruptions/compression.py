"""Fewer pixels, and compression by JPEG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def pixelate(image: np.ndarray, scale: float, _: np.random.Generator) -> np.ndarray:
    """Scale the image down and up again, with averages of boxes. Tiny images have few sizes to scale to."""
    picture = _picture(image)
    width, height = (max(1, int(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BOX)
    return _pixels(small.resize(picture.size, Image.Resampling.BOX), image)


def jpeg_compression(image: np.ndarray, quality: int, _: np.random.Generator) -> np.ndarray:
    """Compress the image by JPEG, from quality 95 (best) to 1."""
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as compressed:
        return _pixels(compressed, image)


def _picture(image: np.ndarray) -> Image.Image:
    pixels = np.rint(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if image.shape[-1] == 1 else pixels)


def _pixels(picture: Image.Image, like: np.ndarray) -> np.ndarray:
    return np.asarray(picture).reshape(like.shape) / 255

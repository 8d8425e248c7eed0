"""Brightness and contrast."""

from __future__ import annotations

import numpy as np


def brightness(image: np.ndarray, added: float, _: np.random.Generator) -> np.ndarray:
    """Add to the value of each pixel in HSV (the largest of its channels); hue and saturation stay."""
    value = image.max(-1, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, image * (brighter / np.where(value > 0, value, 1)), brighter)  # black has no hue


def contrast(image: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    """Scale the distance of each pixel from the mean of its channel."""
    mean = image.mean((0, 1))
    return mean + factor * (image - mean)

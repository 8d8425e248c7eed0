"""Defocus: the image of each point is a disc."""

from __future__ import annotations

import numpy as np


def defocus_blur(image: np.ndarray, disc: tuple[float, float], _: np.random.Generator) -> np.ndarray:
    """Convolve with a disc of a radius in pixels, whose edge is smoothed by a Gaussian of a standard deviation."""
    kernel = _disc(*disc)
    reach = len(kernel) // 2
    height, width, _channels = image.shape
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    blurred = np.zeros_like(image)
    for row, column in np.argwhere(kernel):
        blurred += kernel[row, column] * padded[row : row + height, column : column + width]
    return blurred


def _disc(radius: float, smoothing: float) -> np.ndarray:
    """A disc with sum 1, of an odd number of rows and columns."""
    size = 3 if radius <= 8 else 5  # of the Gaussian
    reach = int(radius) + size // 2
    x = np.arange(-reach, reach + 1)
    disc = (x[:, None] ** 2 + x**2 <= radius**2).astype(np.float64)
    gaussian = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * smoothing**2))
    for axis in (0, 1):
        disc = np.apply_along_axis(np.convolve, axis, disc, gaussian, mode="same")
    return disc / disc.sum()

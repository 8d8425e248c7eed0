"""Augmentation of whole batches, as a function of uniform random numbers that the caller draws.

The numbers are an argument, so that all randomness stays in one place: several processes draw the same numbers, each
takes its rows, and together they see the same images as a single process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_AND_FLIP_DRAWS = 3  # row and column of the crop, flip

_TRIES = 10
RESIZED_CROP_DRAWS = 2 * _TRIES + 3  # area and aspect of every try, row and column, flip
_AREA = (0.25, 1.0)  # share of the image that a resized crop covers, as in US-Nets, whose protocol the HNE paper takes
_ASPECT = (3 / 4, 4 / 3)  # width of the crop over its height


def crop_and_flip(images: Tensor, noise: Tensor, *, pad: int, flip: bool) -> Tensor:
    """Pad with black, cut out a random window of the original size, and mirror half of the images.

    Args:
        images: uint8 ``[B, H, W, C]``.
        noise: uniform numbers in [0, 1), float64 ``[B, 3]``: row, column, flip.
        pad: pixels added on every side.
        flip: mirror left and right with probability 1/2.

    Returns:
        uint8 ``[B, H, W, C]``.
    """
    batch, height, width, _ = images.shape
    noise = noise.to(images.device)
    offset = (noise[:, :2] * (2 * pad + 1)).long().clamp_(max=2 * pad)
    rows = offset[:, :1] + torch.arange(height, device=images.device)
    columns = offset[:, 1:] + torch.arange(width, device=images.device)
    if flip:
        columns = torch.where(noise[:, 2:] < 0.5, columns.flip(1), columns)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    return padded[sample, rows[:, :, None], columns[:, None, :]]


def resized_crop_box(width: int, height: int, noise: Sequence[float]) -> tuple[int, int, int, int]:
    """Choose the box (left, top, right, bottom) of a random resized crop.

    Inception's crop (Szegedy et al. 2015), but with 25 to 100 % of the area; aspect ratio 3/4 to 4/3. The first of ten
    tries that fits into the image is taken, else the largest centred box with an allowed aspect ratio.

    Args:
        width, height: of the image, in pixels.
        noise: at least ``RESIZED_CROP_DRAWS - 1`` uniform numbers in [0, 1).
    """
    row, column = noise[2 * _TRIES : 2 * _TRIES + 2]
    for trial in range(_TRIES):
        area = width * height * (_AREA[0] + noise[2 * trial] * (_AREA[1] - _AREA[0]))
        low, high = (math.log(bound) for bound in _ASPECT)
        aspect = math.exp(low + noise[2 * trial + 1] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(column * (width - w + 1)), int(row * (height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * _ASPECT[1])))
    h = max(1, min(height, round(width / _ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h

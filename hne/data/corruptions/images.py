"""Images that are corrupted as their batches are made."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..plan import Plan, Split
from .corrupt import check_corruption, corrupt


@dataclass(frozen=True)
class CorruptedImages:
    """The images of a split, each with a corruption.

    An image gets the same noise whatever batch it is in.

    Attributes:
        images: the split, of uint8 images.
        corruption: one of :data:`hne.data.CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the noise, a whole number of at least 0.

    Raises:
        ValueError: the corruption, the severity or the seed is unknown.
        DataError: in a batch, the images are no uint8 images.
    """

    images: Split
    corruption: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_corruption(self.corruption, self.severity)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed: expected a whole number of at least 0, got {self.seed!r}")

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield corrupted pixels ``[B, H, W, C]`` (uint8, on the CPU) and labels of every batch of a plan."""
        kept: list[Tensor] = []

        def remembered() -> Plan:
            for indices, noise in plan:
                kept.append(indices)
                yield indices, noise

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for pixels, labels in self.images.batches(remembered()):
                if pixels.dtype != torch.uint8:
                    raise DataError(f"corruptions: expected images of uint8, got {pixels.dtype}")
                changed = threads.map(self._corrupt, pixels.cpu().numpy(), kept.pop(0).tolist())
                yield torch.from_numpy(np.stack(list(changed))), labels

    def _corrupt(self, image: np.ndarray, index: int) -> np.ndarray:
        return corrupt(image, self.corruption, self.severity, (self.seed, index))

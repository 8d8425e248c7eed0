"""The device and the dtypes that each backend is tested with, and the seed of this run."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

import torch

# In the environment, so that processes that a test starts draw the same inputs.
SEED = int(os.environ.setdefault("HNE_TEST_SEED", str(secrets.randbelow(2**31))))


@dataclass(frozen=True)
class Placement:
    """Backend, device and dtype of a test."""

    backend: str
    device: str
    dtype: torch.dtype

    @property
    def interpreted(self) -> bool:
        """Whether the kernels run in Triton's interpreter, which takes milliseconds for each tile."""
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"


_GPU = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU Triton's interpreter or the CUDA emulation may serve
_PLACES = {
    "reference": ("cpu", (torch.float32, torch.float64, torch.bfloat16)),
    "cpp": ("cpu", (torch.float32, torch.float64, torch.bfloat16)),
    "cuda": (_GPU, (torch.float32, torch.float16, torch.bfloat16)),
    "triton": (_GPU, (torch.float32, torch.float16, torch.bfloat16)),
}
PLACEMENTS = [Placement(backend, device, dtype) for backend, (device, dtypes) in _PLACES.items() for dtype in dtypes]

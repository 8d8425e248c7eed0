"""Tells whether the tensors of modules have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class Snapshot:
    """Which tensors some modules hold, and in which state. The counters of batch norms are left out.

    Args:
        modules: Modules, without regard to those inside them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # The dictionaries in which modules hold their tensors: they show replaced ones, and are quick to look into.
        self._sources: list[tuple[dict[str, Any], str]] = [
            (tensors, name)
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and name != "num_batches_tracked"
        ]
        self._state = self._current_state()
        # Holding on to the memory keeps its address from being given to another tensor.
        self._memory = [tensors[name].detach() for tensors, name in self._sources]

    def is_current(self) -> bool:
        """Whether all is unchanged; False where that cannot be told.

        Writing through ``parameter.data`` goes unseen; tensors made under ``torch.inference_mode()`` have no version
        counter to tell by.
        """
        return self._state is not None and self._state == self._current_state()

    def _current_state(self) -> tuple[list[int], list[int]] | None:
        """Address and version of every tensor, or None where one has no such thing."""
        current = [tensors[name] for tensors, name in self._sources]
        try:
            return [tensor.data_ptr() for tensor in current], [tensor._version for tensor in current]
        except RuntimeError:
            return None

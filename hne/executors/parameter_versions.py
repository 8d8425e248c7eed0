"""Detection of changed parameters and buffers."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_VERSION = operator.attrgetter("_version")


class ParameterVersions:
    """Records addresses and version counters of parameters and buffers, to notice changes later.

    The batch counters of batch norms are left out.

    Args:
        modules: The modules whose own tensors are recorded; their children are not searched.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # Modules hold their tensors in these dictionaries. Reading them is fast, and finds replaced tensors.
        self._sources: list[tuple[dict[str, Any], str]] = [
            (tensors, name)
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and name != "num_batches_tracked"
        ]
        self._versions = self._read()
        # A reference to the memory, so that no other tensor can get the same address.
        self._memory = [tensors[name].detach() for tensors, name in self._sources]

    def is_current(self) -> bool:
        """Whether all tensors are unchanged; False if that is unknown.

        Writes through ``parameter.data`` are invisible, and tensors made under ``torch.inference_mode()`` have no
        version counter.
        """
        return self._versions is not None and self._versions == self._read()

    def _read(self) -> tuple[list[int], list[int]] | None:
        """Address and version of every tensor, or None where a tensor has none."""
        current = [tensors[name] for tensors, name in self._sources]
        try:
            return list(map(Tensor.data_ptr, current)), list(map(_VERSION, current))
        except RuntimeError:
            return None

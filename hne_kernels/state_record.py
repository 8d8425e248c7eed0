"""A quick check whether modules and their tensors are unchanged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from . import extension


class StateRecord:
    """A record of dictionaries, lists and tensors, to notice changes later.

    Args:
        containers: Dictionaries and lists; their lengths are recorded, and the identity of their entries.
        ignored: For each container the keys whose entries are not recorded; a list has none.
        tensors: Tensors; their addresses and version counters are recorded.
        sizes: For each tensor the bytes of its memory, of which some are recorded: 64 bytes at five places. 0 for a
            tensor whose memory cannot be read, as on another device.
    """

    def __init__(
        self,
        containers: Sequence[dict[Any, Any] | list[Any]],
        ignored: Sequence[Collection[str]],
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> None:
        record = extension.cpu_library().StateRecord(list(containers), list(ignored), list(tensors), list(sizes))
        #: Whether nothing has changed; False if a tensor has no version counter.
        self.unchanged = record.unchanged

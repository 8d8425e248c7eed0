"""The cache of folded weights in a model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from .parameter_versions import CountsAttributeChanges

_FREEZING = threading.Lock()  # guards all freeze_depth; one for all networks, because locks cannot be copied


class FoldedWeightCache(CountsAttributeChanges):
    """A module that caches folded weights for inference.

    The cache is not part of the module's state: it is neither saved nor copied. It is dropped when ``train()`` or
    ``eval()`` is called, and when the parameters change their device or dtype.

    Attributes:
        folded: The cached :class:`~hne.executors.InferenceSession`, or None.
        graph_weights: Sessions whose weights a CUDA graph reads; they must live as long as the graph.
        freeze_depth: While it is above 0, staleness checks are skipped.
    """

    uncounted_attributes = frozenset({"folded", "graph_weights", "freeze_depth"})

    def __init__(self) -> None:
        super().__init__()
        self._reset_cache()

    def _reset_cache(self) -> None:
        self.folded: Any = None
        self.graph_weights: list[Any] = []
        self.freeze_depth = 0

    def read_modules(self) -> Iterator[nn.Module]:
        """The modules whose parameters, buffers and attributes the folded weights depend on."""
        return self.modules()

    def current(self) -> Any:
        """The cached session; None if there is none, or if the network has changed."""
        folded = self.folded  # read once, since another thread may drop it
        if folded is None or (self.freeze_depth and folded.holds_all_weights) or folded.is_current():
            return folded
        return None

    @contextlib.contextmanager
    def frozen_parameters(self) -> Iterator[Self]:
        """Promise that the network stays unchanged until the end of the ``with`` block.

        Changes are looked for once, at the beginning, and not in every call. A change within the block takes effect as
        a whole: at the end of the block, or before that if the weights are folded again, as when another thread begins
        such a block. A network with layers that have no kernel path reads their parameters in every call; it looks for
        changes in every call, too.

        Blocks may overlap, in one thread or several. Calls look for changes again when all blocks have ended.
        """
        # Also if other blocks are open: changes before this block take effect in it.
        folded = self.folded
        if folded is not None and not folded.is_current():
            self.folded = None
        with _FREEZING:
            self.freeze_depth += 1
        try:
            yield self
        finally:
            with _FREEZING:
                self.freeze_depth -= 1

    def train(self, mode: bool = True) -> Self:
        self.folded = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.folded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "folded": None, "graph_weights": [], "freeze_depth": 0}

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()
        replica._reset_cache()
        return replica

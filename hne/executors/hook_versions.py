"""Detection of hooks that were registered or removed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers import global_hook_dicts, hook_dicts


class HookVersions:
    """Records the hooks on the calls of modules, and of all modules, to notice changes later.

    Args:
        modules: The modules whose hooks are recorded; their children are not searched.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._dicts: list[dict[int, Any]] = [*global_hook_dicts(), *chain.from_iterable(map(hook_dicts, modules))]
        self._count = RemovableHandle.next_id
        self._hooks = self._read()

    @property
    def has_hooks(self) -> bool:
        """Whether there were hooks."""
        return bool(self._hooks)

    def is_current(self) -> bool:
        """Whether the hooks are unchanged."""
        # PyTorch numbers all hooks, so a new one anywhere changes this number.
        count = RemovableHandle.next_id
        if self._hooks or self._count != count:
            if self._hooks != self._read():
                return False
            self._count = count
        return True

    def _read(self) -> list[tuple[int, tuple[int, ...]]]:
        """The numbers of the hooks in each dictionary that has some."""
        return [(index, tuple(hooks)) for index, hooks in enumerate(self._dicts) if hooks]

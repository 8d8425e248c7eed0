"""Detection of hooks and attributes that were added or removed, and of batch norms that changed their mode."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..layers import Layer, global_hook_dicts, hook_dicts

_TRAINING = operator.attrgetter("training")


class ModuleModes:
    """Records hooks on the calls of modules, the number of attributes of layers (a replaced ``forward`` is a new one),
    and the modes of batch norms, to notice changes later.

    Args:
        modules: The modules; their children are not searched. Hooks on all modules are recorded, too.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._dicts: list[dict[int, Any]] = [*global_hook_dicts(), *chain.from_iterable(map(hook_dicts, modules))]
        self._count = RemovableHandle.next_id
        self._hooks = self._read_hooks()
        self._attributes = [module.__dict__ for module in modules if isinstance(module, Layer)]
        self._counts = list(map(len, self._attributes))
        self._norms = [module for module in modules if isinstance(module, _BatchNorm)]
        self._training = list(map(_TRAINING, self._norms))

    @property
    def has_hooks(self) -> bool:
        """Whether there were hooks."""
        return bool(self._hooks)

    def is_current(self) -> bool:
        """Whether hooks, attributes and modes are unchanged."""
        # PyTorch numbers all hooks, so a new one anywhere changes this number.
        count = RemovableHandle.next_id
        if self._hooks or self._count != count:
            if self._hooks != self._read_hooks():
                return False
            self._count = count
        if self._counts != list(map(len, self._attributes)):
            return False
        return self._training == list(map(_TRAINING, self._norms))

    def _read_hooks(self) -> list[tuple[int, tuple[int, ...]]]:
        """The numbers of the hooks in each dictionary that has some."""
        return [(index, tuple(hooks)) for index, hooks in enumerate(self._dicts) if hooks]

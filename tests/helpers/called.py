"""Which ops of ours are called."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OpsOfOurs(TorchDispatchMode):
    """Counts the calls of the registered ops, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "hne":
            self.called[func.name().removeprefix("hne::")] += 1
        return func(*args, **(kwargs or {}))

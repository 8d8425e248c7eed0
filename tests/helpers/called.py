"""Counts the calls of the package's ops."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OpsOfOurs(TorchDispatchMode):
    """Counts the calls of the registered ops by name.

    The name of ``branch_norm_conv2d`` and of its gradient is preceded by "depthwise" or "materializing" for a call of
    that kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "hne":
            self.called[_label(func, args)] += 1
        return func(*args, **(kwargs or {}))


def _label(func: Any, args: tuple[Any, ...]) -> str:
    name = func.name().removeprefix("hne::")
    if not name.startswith("branch_norm_conv2d"):
        return name
    arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=True))
    if arguments["weight"].dim() == 4:
        return f"depthwise {name}"
    materializing = arguments.get("materialize") or arguments.get("z") is not None
    return f"materializing {name}" if materializing else name

"""Parameters of several branches that a layer uses in plain PyTorch."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from .parameters import BranchModule, check_own_parameters


class BranchParameters(BranchModule):
    """Base class of such modules. The layer reads them through :meth:`Executor.read`.

    Args:
        branches: Number of branches.
        shape: Shape of each parameter of one branch; the last dimension are the channels. A parameter of all branches
            is ``[branches * shape[0], *shape[1:]]``.
    """

    names: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, branches: int, *shape: int) -> None:
        super().__init__(branches, shape[-1], shape[-1])
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.empty(branches * shape[0], *shape[1:])))

    def reset_parameters(self) -> None:
        check_own_parameters(self)
        self._initialise()

    @abstractmethod
    def _initialise(self) -> None:
        """Give all parameters new values."""

    def read(self, branches: slice) -> tuple[Tensor, ...]:
        """The parameters of some branches, each ``[len(branches), *shape]``.

        Raises:
            SkippedModuleError: The module has hooks, which would not run.
        """
        self.check_hooks()
        return tuple(self.select_branches(getattr(self, name), branches) for name in self.names)

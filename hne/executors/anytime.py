"""Anytime inference: an answer after every model, each better than the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..layers.modules import Runner
    from ..models.hne import HNE


class Anytime(Iterator[tuple[int, Tensor]]):
    """Evaluates the tree leaf by leaf, depth first, as the paper describes; see :meth:`HNE.anytime`.

    The outputs of the nodes on the path to the current leaf are kept: a later leaf branches off from one of them. No
    node is computed twice, and none before the answer that needs it is asked for. Whether parameters have changed is
    looked at once, in the beginning: they are not to change before the end.

    Attributes:
        num_models: Leaves evaluated so far.
        member: Logits ``[batch, num_classes]`` of the last of them by itself; None before the first.
    """

    def __init__(self, model: HNE, x: Tensor) -> None:
        self.num_models = 0
        self.member: Tensor | None = None
        self._model = model
        self._run: Runner = model.runner(x)
        self._execution = model.execution()
        self._images = x
        self._path: list[Tensor] = []  # _path[b] is the output of block b
        self._total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)

    def __next__(self) -> tuple[int, Tensor]:
        model, tree, leaf = self._model, self._model.hierarchy, self.num_models
        if leaf == tree.num_models:
            raise StopIteration
        if model.execution() is not self._execution:  # whether gradients are recorded has changed
            self._run, self._execution = model.runner(self._images), model.execution()
        first = tree.first_new(leaf)
        del self._path[first:]
        x = self._path[-1] if first > 0 else self._images
        *features, logits = self._run(x, slice(leaf, leaf + 1), first, keep=True)
        self._path += features
        self.member = logits[0]
        self._total = self._total + self.member
        self.num_models += 1
        mean = self._total / self.num_models
        return self.num_models, mean if mean.dtype == logits.dtype else mean.to(logits.dtype)

    def keep(self, samples: Tensor) -> None:
        """Go on with a part of the batch: later answers are those of the samples kept, in the order given.

        Args:
            samples: Their indices in the current batch, ``[K]`` int64.

        Raises:
            RuntimeError: There is no answer yet.
        """
        if self.member is None:
            raise RuntimeError("keep() chooses by an answer: ask for the first one before")
        self.member, self._total = self.member[samples], self._total[samples]
        execution, self._images = self._model.execution(), self._images[samples]
        self._path = [execution.select(x, samples) for x in self._path]

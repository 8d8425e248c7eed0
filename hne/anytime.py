"""Anytime inference: an answer after every model, each better than the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import HNE


def anytime(model: HNE, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Evaluate the tree leaf by leaf, depth first, as the paper describes; see :meth:`HNE.anytime`.

    The outputs of the nodes on the path to the current leaf are kept: a later leaf branches off from one of them. No
    node is computed twice, and none before the answer that needs it is asked for.
    """
    tree = model.hierarchy
    path = [model.enter(x)]  # path[b + 1] is the output of block b
    total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for leaf in range(tree.num_models):
        first = tree.first_new(leaf)
        del path[first + 1 :]
        for block in range(first, tree.num_blocks):
            branch = tree.ancestor(leaf, block)
            path.append(model.run_block(block, path[-1], slice(branch, branch + 1)))
        logits = model.run_head(path[-1], slice(leaf, leaf + 1))[0]
        total = total + logits
        yield leaf + 1, (total / (leaf + 1)).to(logits.dtype)

"""An ensemble as TorchUncertainty (torch-uncertainty.github.io) wants it: the members one below the other."""

from __future__ import annotations

from torch import Tensor, nn

from ..models.hne import HNE


def stacked_members(outputs: Tensor) -> Tensor:
    """Outputs ``[M, B, C]`` of M members as ``[M * B, C]``, in TorchUncertainty's order: row ``m * B + b``.

    Its routines take them apart by ``rearrange(y, "(m b) c -> b m c", b=batch)``: all samples of the first member come
    first.

    Raises:
        ValueError: ``outputs`` has not three dimensions.
    """
    if outputs.dim() != 3:
        raise ValueError(f"outputs must be [members, batch, classes], got shape {tuple(outputs.shape)}")
    return outputs.flatten(0, 1)


class TorchUncertainty(nn.Module):
    """A model for TorchUncertainty's routines: images ``[B, C, H, W]`` to logits ``[M * B, L]``.

    In training it expects the targets once for each member (``RepeatTarget(num_estimators)`` there does it).

    Args:
        model: The tree; it is kept as it is, and trained or put into eval mode with this module.
        num_models: M, the first so many leaves; all by default.
    """

    def __init__(self, model: HNE, num_models: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.num_estimators = model.num_models if num_models is None else num_models
        model.hierarchy.needed(self.num_estimators)  # raises if there are not so many

    def forward(self, x: Tensor) -> Tensor:
        return stacked_members(self.model(x, self.num_estimators))

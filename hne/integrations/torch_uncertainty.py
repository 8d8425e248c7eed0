"""An ensemble in the layout of TorchUncertainty (torch-uncertainty.github.io): members stacked along the batch."""

from __future__ import annotations

from torch import Tensor, nn

from ..models import HNE


def stacked_members(outputs: Tensor) -> Tensor:
    """Stack outputs ``[M, B, C]`` of M members to ``[M * B, C]``, in TorchUncertainty's order: row ``m * B + b``.

    TorchUncertainty's routines invert this by ``rearrange(y, "(m b) c -> b m c", b=batch)``: all samples of the first
    member come first.

    Raises:
        ValueError: ``outputs`` does not have three dimensions.
    """
    if outputs.dim() != 3:
        raise ValueError(f"outputs must be [members, batch, classes], got shape {tuple(outputs.shape)}")
    return outputs.flatten(0, 1)


class TorchUncertainty(nn.Module):
    """A model for TorchUncertainty's routines: images ``[B, C, H, W]`` to logits ``[M * B, L]``.

    In training the routine must repeat the targets once per member (TorchUncertainty's
    ``RepeatTarget(num_estimators)``). Its metrics are those of the members' mean probabilities, as of
    ``evaluate(..., average="probabilities")`` here.

    Args:
        model: the ensemble. It becomes a submodule: ``train()`` and ``eval()`` of this module apply to it.
        num_models: M, the number of members; by default all.

    Raises:
        ValueError: the ensemble has fewer than ``num_models`` members.
    """

    def __init__(self, model: HNE, num_models: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.num_estimators = model.num_models if num_models is None else num_models
        model.hierarchy.needed(self.num_estimators)  # raises if num_models is out of range

    def forward(self, x: Tensor) -> Tensor:
        return stacked_members(self.model(x, self.num_estimators))

"""A model's outputs on a split, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, nn

from ..data import InputFormat, Split, evaluation_batches
from ..distributed import World
from ..errors import ResultError
from ..files import first_not_finite

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Results = TypeVar("Results", bound="DataclassInstance")


class Ensemble(Protocol):
    """What is evaluated: an :class:`hne.HNE`, or another module that gives the logits of N members."""

    @property
    def num_models(self) -> int:
        """N."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Logits of all members ``[N, B, L]`` for images ``[B, C, H, W]``."""

    def macs(self, num_models: int, input_size: tuple[int, int], /) -> int:
        """Multiply-adds of the first members for one image."""

    def eval(self) -> Any:
        """Switch to eval mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters; their device is that of the images."""


def finite(results: Results) -> Results:
    """Return the results of an evaluation if every number in them is finite.

    Raises:
        ResultError: A number is NaN or infinite.
    """
    values: dict[str, Any] = asdict(results)
    wrong = first_not_finite(values)
    if wrong is not None:
        name, number = wrong
        raise ResultError(f"the evaluation gives {name} = {number}: the model has diverged, or its inputs are wrong")
    return results


def predict(
    model: Ensemble,
    images: Split,
    input_format: InputFormat,
    batch_size: int,
    *,
    channels_last: bool = True,
    world: World | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs of all members ``[N, B, L]`` and the labels ``[B]`` of each batch, in eval mode.

    Args:
        model: is put into eval mode.
        images: the split.
        input_format: the normalisation of its images.
        batch_size: images at a time in each process.
        channels_last: memory layout of the batches.
        world: the processes that share the batches; by default this one, on the device of the model.
        progress: called with the size of every batch after the caller has used it.
    """
    world = world or World(next(model.parameters()).device)
    model.eval()
    batches = evaluation_batches(
        images, input_format, batch_size, rank=world.rank, world_size=world.size, device=world.device
    )
    for inputs, target in batches:
        yield model(inputs if channels_last else inputs.contiguous()), target
        if progress is not None:
            progress(len(target))

"""The part of a model that starts from a trained network: its construction, and its frozen blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from typing_extensions import Self

from ..hierarchy import Hierarchy
from .backbone import Conversion, Origin, build, load_backbone

START_ENTRIES = frozenset({"origin", "frozen_blocks"})  # of a model's config, where they apply


class StartsTrained(nn.Module):
    """Base class of :class:`HNE`: a model that may start from a trained network.

    Attributes:
        conversion: How a backbone became this model, see :meth:`from_backbone`; else None.
        origin: The name of the backbone's architecture, if it has one; else None.
        frozen_blocks: Number of leading blocks that training leaves as they are, see :meth:`freeze_blocks_`.
    """

    conversion: Conversion | None = None
    origin: Origin | None = None
    frozen_blocks: int = 0
    blocks: nn.ModuleList

    @classmethod
    def from_backbone(
        cls,
        backbone: nn.Module | str,
        branches: Sequence[int] | Hierarchy,
        *,
        num_classes: int | None = None,
        stages: Sequence[Sequence[str | nn.Module]] | None = None,
        head: str | None = None,
        perturb: float = 0.1,
        seed: int = 0,
        freeze_trunk: bool = False,
        input_size: int | tuple[int, ...] | None = None,
        architecture: str | None = None,
    ) -> Self:
        """An ensemble that starts from a trained network.

        The network is cut into the blocks of the tree. Its parts become layers of :mod:`hne.layers` where these
        compute exactly the same, and a :class:`Module` elsewhere; ``print(model.conversion)`` shows what became what.
        All branches take over the weights and running statistics. Leaf 1 is the backbone itself. Every further branch
        is perturbed, since equal branches would get equal gradients, and every head but the first is drawn anew. The
        backbone is not changed, and the global random generator is not used. The model has the backbone's device, dtype
        and mode.

        Known families are cut without help: ResNet, WideResNet, MobileNetV2, VGG and VisionTransformer of torchvision
        and timm, and any ``nn.Sequential``. Their stages are combined evenly, the first ones first, if ``branches`` has
        fewer counts. The blocks of an :class:`HNE` of one network, as ``hne train --branches 1,1,1,1`` trains it, are
        those of the tree.

        Args:
            backbone: The network, which maps images to logits; or its name as in :func:`load_backbone`, such as
                ``torchvision:resnet18``.
            branches: The number of branches of each block, or a tree.
            num_classes: Number of logits; if it is not that of the backbone, all heads are drawn anew.
            stages: For other networks: the modules of each block by their paths (``"layer1"``, ``"features.0"``) in the
                order of computation. A function of the network's ``forward`` is given as a module without parameters,
                such as ``nn.Flatten()``.
            head: Path of the last ``nn.Linear``; found if it is not given.
            perturb: Standard deviation of the noise of further branches, relative to that of each parameter tensor.
            seed: Seed of the noise and of the new heads.
            freeze_trunk: Freeze the blocks with one branch, see :meth:`freeze_blocks_`.
            input_size: Height and width of the images, or one number for both, or ``(channels, height, width)``; only
                needed where the backbone does not tell. Networks that take any size still do.
            architecture: With a file for ``backbone``, the name of its architecture.

        Raises:
            BackboneError: The backbone cannot be cut into these blocks, has lazy, quantised or tied weights, or its
                stages do not compute what its ``forward`` computes.
            ValueError, TypeError: An argument is out of range or of a wrong type.
        """
        origin = None
        if isinstance(backbone, str):
            backbone, name = load_backbone(backbone, architecture)
            origin = Origin.of(name, stages, head, input_size)
        elif architecture is not None:
            raise ValueError(f"architecture: expected none for a network, got {architecture!r}")
        model: Self = build(
            cls,
            backbone,
            branches,
            num_classes=num_classes,
            stages=stages,
            head=head,
            perturb=perturb,
            seed=seed,
            freeze_trunk=freeze_trunk,
            input_size=input_size,
        )
        model.origin = origin
        return model

    def freeze_blocks_(self, count: int) -> Self:
        """Freeze the first ``count`` blocks, in place: training leaves them as they are.

        Their parameters require no gradient, and their layers stay in eval mode: batch norms use and keep their running
        statistics, and dropout is off. ``count`` may be 0; blocks that were frozen before and are not any more are
        trained again.

        Raises:
            TypeError, ValueError: ``count`` is not an int from 0 to the number of blocks.
        """
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"count must be an int, got {count!r}")
        if not 0 <= count <= len(self.blocks):
            raise ValueError(f"count must lie between 0 and the number of blocks, {len(self.blocks)}, got {count}")
        for index, block in enumerate(self.blocks):
            if index < max(count, self.frozen_blocks):
                block.requires_grad_(index >= count)
        self.frozen_blocks = count
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for block in list(self.blocks)[: self.frozen_blocks]:
            block.eval()
        return self

    def start_config(self) -> dict[str, Any]:
        """The entries :data:`START_ENTRIES` of the config."""
        origin = {} if self.origin is None else {"origin": self.origin.config()}
        return origin | ({"frozen_blocks": self.frozen_blocks} if self.frozen_blocks else {})

    def restore_start(self, config: dict[str, Any]) -> Self:
        """The inverse of :meth:`start_config`."""
        if "origin" in config:
            self.origin = Origin(**config["origin"])
        return self.freeze_blocks_(config.get("frozen_blocks", 0))

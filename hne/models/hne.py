"""Hierarchical neural ensembles: two models with the same parameters, one on kernels and one in plain PyTorch."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hne_kernels import default_sizes

from ..executors import (
    Anytime,
    FoldedExecutor,
    KernelExecutor,
    NaiveExecutor,
    SubtreeExecutor,
)
from ..hierarchy import Hierarchy
from ..layers import (
    BatchNormModule,
    BranchLinear,
    BranchModule,
    Layer,
    LayerSpec,
    Module,
    ModuleLayer,
    build_layer,
    check_kind,
    spec_from_config,
)
from .checks import check_images, check_network, check_templates, has_plain_batch_norm
from .presets import PRESETS, scaled
from .pretrained import SharesPretrained
from .slimmable import SLIM_ENTRIES, Slimmable, check_width
from .trained import START_ENTRIES, StartsTrained

_Model = TypeVar("_Model", bound="HNE")


class HNE(StartsTrained, SharesPretrained, Slimmable, ABC):
    """An ensemble of networks that share the branches of a tree; base class of :class:`FusedHNE` and :class:`NaiveHNE`.

    Args:
        hierarchy: The tree, with the number of branches of each block.
        blocks: The specs of the layers of each block, in order.
        num_classes: Number of logits of each leaf.
        in_channels: Number of channels of the images.

    Raises:
        TypeError: A layer is not a spec from :mod:`hne.layers`, or a number is not an int.
        ValueError: The number of blocks is not that of the tree, a block is empty, a number is below 1, or the template
            of a :class:`Module` does not fit.

    Weights of convolutions are initialised as in He et al. (2015), and those of linear layers as in ``nn.Linear``, from
    PyTorch's global random generator; those of modules of other classes as :class:`Module` says.
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        blocks: Sequence[Sequence[LayerSpec]],
        *,
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_network(hierarchy, blocks, num_classes, in_channels)
        self.hierarchy = hierarchy
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.blocks = nn.ModuleList()
        channels = in_channels
        levels = zip(blocks, hierarchy.branches, hierarchy.replication, strict=False)
        for number, (specs, branches, replicate) in enumerate(levels):
            block = nn.ModuleList()
            for index, spec in enumerate(specs):
                try:
                    layer = build_layer(spec, channels, branches, replicate)
                except (TypeError, ValueError) as error:
                    kind = TypeError if isinstance(error, TypeError) else ValueError
                    raise kind(f"blocks[{number}][{index}]: {error}") from error
                block.append(layer)
                channels, replicate = layer.channels, 1  # only the first layer of a block branches
            self.blocks.append(block)
        self.head = BranchLinear(hierarchy.num_models, channels, num_classes)
        self.reset_parameters()

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        num_models: int | None = None,
        hierarchy: Hierarchy | None = None,
    ) -> Self:
        """A network by name.

        ``hne_resnet50_cifar`` and ``hne_small_resnet50_cifar`` are from the paper's Table 2, ``hne_mobilenetv2_075`` is
        from Table 3. ``hne_resnet18``, ``hne_resnet50`` (torchvision's networks, for images of 224 x 224),
        ``hne_resnet18_cifar`` and ``hne_wrn28_10`` (for 32 x 32), and ``hne_vit_tiny`` (DeiT-Ti, for 224 x 224) are
        trees of widely used networks. ``hne_tiny`` (small images) and ``hne_mlp`` (rows of a table) are for short runs.

        Args:
            name: One of :data:`hne.PRESETS`.
            num_classes: Number of logits of each leaf.
            in_channels: Number of channels of the images.
            width: Factor on every channel count; the results are rounded, and at least 1.
            num_models: Another number of models, in a tree whose branches double from block to block.
            hierarchy: Another tree, instead of ``num_models``.

        Raises:
            ValueError: The name is unknown, the width is not positive, the tree does not fit the blocks, or both
                ``num_models`` and ``hierarchy`` are given.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        preset = PRESETS[name]
        if num_models is not None and hierarchy is not None:
            raise ValueError("give num_models or hierarchy, not both")
        if num_models is not None:
            hierarchy = Hierarchy.doubling(len(preset.blocks), num_models)
        blocks = preset.blocks if width == 1 else scaled(preset.blocks, width)
        tree = preset.hierarchy if hierarchy is None else hierarchy
        return cls(tree, blocks, num_classes=num_classes, in_channels=in_channels)

    @classmethod
    def from_config(cls, config: dict[str, Any], templates: Sequence[nn.Module] = ()) -> Self:
        """A newly initialised model from a config that :meth:`config` wrote.

        Args:
            config: The config.
            templates: The template of each :class:`Module` in the order of the layers, as :meth:`templates` gives them;
                a config has the names of their classes only.

        Raises:
            ValueError: An entry is missing, unknown or not valid, or the templates do not fit.
        """
        expected = {"hierarchy", "blocks", "num_classes", "in_channels"}
        if not isinstance(config, dict) or set(config) - START_ENTRIES - SLIM_ENTRIES != expected:
            got = sorted(config) if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"a model's config has the entries {sorted(expected)}, got {got}")
        try:
            hierarchy = Hierarchy(**config["hierarchy"])
            check_templates(config["blocks"], templates)
            rest = iter(templates)
            blocks = [[spec_from_config(layer, rest) for layer in block] for block in config["blocks"]]
            model = cls(hierarchy, blocks, num_classes=config["num_classes"], in_channels=config["in_channels"])
            return model.restore_start(config).restore_widths(config)
        except TypeError as error:
            raise ValueError(f"not a model's config: {error}") from error

    def config(self) -> dict[str, Any]:
        """The description of the network as a JSON-able dictionary, without weights; :meth:`from_config` reads it."""
        return {
            "hierarchy": {
                "branches": list(self.hierarchy.branches),
                "num_models": self.num_models,
            },
            "blocks": [[layer.spec.config() for layer in block] for block in self.layers_of_blocks()],
            "num_classes": self.num_classes,
            "in_channels": self.in_channels,
            **self.start_config(),
            **self.slim_config(),
        }

    def templates(self) -> list[nn.Module]:
        """The template of each :class:`Module`, in the order of the layers; :meth:`from_config` takes them."""
        specs = (layer.spec for block in self.layers_of_blocks() for layer in block)
        return [spec.template for spec in specs if isinstance(spec, Module)]

    def reset_parameters(self) -> None:
        """Initialise all weights and running statistics anew, those of a :class:`Module` from its template again."""
        for module in self.modules():
            if isinstance(module, BranchModule | ModuleLayer):
                module.reset_parameters()

    def sync_batch_norm_(self, enabled: bool = True) -> Self:
        """Switch synchronised batch norm on or off, in place.

        In training, batch statistics are then computed over all processes of the default process group, some of which
        may have an empty batch. A single process computes as before. ``nn.SyncBatchNorm.convert_sync_batchnorm`` does
        the same for its process group. Gradients are those of the sum of all processes' losses;
        ``DistributedDataParallel`` turns the sum into a mean.

        Raises:
            ValueError: A :class:`Module` has batch norms, which only ``convert_sync_batchnorm`` replaces.
        """
        for name, module in self.named_modules():
            if enabled and isinstance(module, ModuleLayer) and has_plain_batch_norm(module):
                raise ValueError(
                    f"{name} is a {module.spec} with batch norms of torch.nn: use "
                    f"torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) instead of sync_batch_norm_()"
                )
        for module in self.modules():
            if isinstance(module, BatchNormModule):
                module.synchronised = enabled
        return self

    # Shape ------------------------------------------------------------------------------------------------------------

    @property
    def num_models(self) -> int:
        """Number of leaves of the tree."""
        return self.hierarchy.num_models

    @property
    def prefix_sizes(self) -> tuple[int, ...]:
        """The ensemble sizes of :meth:`prefix_logits`: powers of two below ``num_models``, then ``num_models``."""
        return tuple(default_sizes(self.num_models))

    def layers_of_blocks(self) -> list[list[Layer]]:
        """The layers of each block, in order."""
        return [list(cast("nn.ModuleList", block)) for block in self.blocks]  # type: ignore[arg-type]

    def macs(
        self,
        num_models: int | None = None,
        input_size: int | tuple[int, int] = (32, 32),
        *,
        width: float | None = None,
    ) -> int:
        """Multiply-adds of convolutions and linear layers for one image.

        Args:
            num_models: Number of models that are evaluated, the first ones; all by default.
            input_size: Height and width of the image in pixels, or one number for both.
            width: Share of the channels that is computed, above 0 and at most 1 (:meth:`set_widths_`).
        """
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
        if min(size) < 1:
            raise ValueError(f"input_size must be at least 1x1, got {size[0]}x{size[1]}")
        *needed, heads = self.hierarchy.needed(self.num_models if num_models is None else num_models)
        network = self if width is None or check_width(width) == 1 else self.skeleton(float(width))
        total = heads * network.head.macs((1, 1))
        for block, branches in zip(network.layers_of_blocks(), needed, strict=True):
            for layer in block:
                total += branches * layer.macs(size)
                size = layer.output_size(size)
        return total

    # Evaluation -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def executor(self) -> SubtreeExecutor:
        """The executor for the current mode: it computes the layers."""

    def forward(self, x: Tensor, num_models: int | None = None, *, width: float | None = None) -> Tensor:
        """Logits of the first ``num_models`` leaves; only their part of the tree is computed.

        Args:
            x: Images ``[batch, in_channels, height, width]`` of any strides (:class:`FusedHNE` reads channels-last
                memory in place), in the dtype of the parameters; under autocast in any floating-point dtype.
            num_models: From 1 to ``self.num_models``; all by default.
            width: Share of the channels that is computed, the first ones, of a slimmable model (:meth:`set_widths_`);
                all by default. In eval mode one of ``self.widths``, in training mode any above 0.

        Returns:
            Logits ``[num_models, batch, num_classes]``.

        Raises:
            ValueError: ``x`` has a wrong rank, number of channels or device, or has no pixels; or ``num_models`` is out
                of range; or ``width`` is, or the model is not slimmable.
            TypeError: ``x`` has another dtype, ``num_models`` is not an int, or ``width`` is not a number.
            RuntimeError: The batch-norm statistics of ``width`` were not computed (:meth:`calibrate_widths_`).
            SkippedModuleError: A module that is not called has hooks or was replaced (:mod:`hne.layers.submodules`).
        """
        self.check_images(x)
        n = self.num_models if num_models is None else num_models
        self.hierarchy.check_num_models(n)
        network = self if width is None else self.at_width(width)
        return self.executor().runner(network)(x, slice(0, n))[-1]

    def prefix_logits(self, x: Tensor, sizes: Sequence[int] | None = None, *, width: float | None = None) -> Tensor:
        """Logits of nested ensembles: the mean over the first ``n`` leaves for each ``n`` of ``sizes`` (eq. 1 and 5).

        Args:
            x: Images as in :meth:`forward`.
            sizes: Ensemble sizes in rising order; :attr:`prefix_sizes` by default. Only the part of the tree that the
                largest ensemble needs is computed.
            width: As in :meth:`forward`.

        Returns:
            Logits ``[len(sizes), batch, num_classes]``.

        Raises:
            ValueError, TypeError, RuntimeError: As :meth:`forward`, or ``sizes`` do not rise.
        """
        self.check_images(x)
        wanted = self.prefix_sizes if sizes is None else tuple(sizes)
        if not wanted or any(a >= b for a, b in itertools.pairwise((0, *wanted))):
            raise ValueError(f"sizes must rise from at least 1, got {wanted}")
        self.hierarchy.check_num_models(wanted[-1])
        return self.executor().runner(self.at_width(width))(x, slice(0, wanted[-1]), sizes=wanted)[-1]

    def anytime(self, x: Tensor, *, width: float | None = None) -> Anytime:
        """Anytime inference: an iterator over ``(n, y)`` for n = 1, 2, ... ``num_models``.

        ``y`` ``[batch, num_classes]`` is the mean of the logits of the first ``n`` leaves. Each step computes only the
        nodes of the tree that are new. The iterator's ``select(samples)`` continues with some samples of the batch.

        Args:
            x: Images as in :meth:`forward`.
            width: As in :meth:`forward`.

        Raises:
            RuntimeError: The model is in training mode, or ``width`` has no statistics.
            ValueError, TypeError: As :meth:`forward`.
        """
        if self.training:
            raise RuntimeError("anytime() is for inference: call model.eval() first")
        self.check_images(x)
        return Anytime(self.at_width(width), x)

    def check_images(self, x: Tensor) -> None:
        """Raise unless ``x`` are images that :meth:`forward` accepts."""
        check_images(x, self.in_channels, self._head_parameter())

    def _head_parameter(self) -> Tensor:
        """A parameter of the head, for its device and dtype; pruned and parametrized weights are not computed."""
        try:
            conv = self.head.conv
        except AttributeError:
            check_kind(self.head, BranchLinear, "head")
            raise
        parameter = conv._parameters.get("weight")
        if parameter is None:
            parameter = next(conv.parameters(), None)
        return conv.weight if parameter is None else parameter  # replicas of DataParallel have no parameters

    # Copies and text --------------------------------------------------------------------------------------------------

    def to_naive(self) -> NaiveHNE:
        """A copy that computes in plain PyTorch, with the same weights, mode, dtype and device."""
        return self._copy_as(NaiveHNE)

    def to_fused(self) -> FusedHNE:
        """A copy that computes by the kernels, with the same weights, mode, dtype and device."""
        return self._copy_as(FusedHNE)

    def _copy_as(self, kind: type[_Model]) -> _Model:
        model = copy.deepcopy(self)
        model.__class__ = kind  # the classes differ only in executor()
        return model  # type: ignore[return-value]

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        rows = [("block", "branches", "layers")]
        for index, block in enumerate(self.layers_of_blocks()):
            runs = [(text, len(list(same))) for text, same in itertools.groupby(str(layer.spec) for layer in block)]
            layers = ", ".join(text if count == 1 else f"{text} x{count}" for text, count in runs)
            rows.append((str(index), str(self.hierarchy.branches[index]), layers))
        rows.append(("head", str(self.num_models), f"pool, linear {self.num_classes}"))
        table = "\n".join(f"  {block:<7}{branches:<10}{layers}" for block, branches, layers in rows)
        shape = f"{self.num_models} models, {self.in_channels} channels > {self.num_classes} classes"
        return f"{type(self).__name__}({shape}, {parameters:,} parameters)\n{table}"


class NaiveHNE(HNE):
    """The ensemble in plain PyTorch, as in the paper's Figure 2: features copied for each branch, grouped convolutions.

    It is the baseline for :class:`FusedHNE`; with the same weights both give the same logits. It calls its convolutions
    and batch norms wherever all their branches are computed, so their hooks run and they may be replaced by other
    modules. See :class:`HNE` for the arguments.
    """

    _NAIVE: ClassVar = NaiveExecutor()

    def executor(self) -> SubtreeExecutor:
        return self._NAIVE


class FusedHNE(HNE):
    """The ensemble on the kernels of :mod:`hne_kernels`. See :class:`HNE` for the arguments.

    In ``eval()`` and without gradients (``torch.no_grad()`` or ``torch.inference_mode()``) batch norms are folded into
    the weights. A layer is one kernel, or one for each convolution; on a CPU all consecutive layers of such kernels are
    one call. The folded weights are cached, and folded again when parameters have changed; see
    :meth:`hne.executors.InferenceSession.is_current` for the changes that are noticed.
    """

    _TRAINING: ClassVar = KernelExecutor()
    _INFERENCE: ClassVar = FoldedExecutor()

    def executor(self) -> SubtreeExecutor:
        return self._TRAINING if self.training or torch.is_grad_enabled() else self._INFERENCE

"""Builds an ensemble from a trained network: cuts it, converts its blocks, and copies its weights to all branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import BackboneError
from ...hierarchy import Hierarchy
from ...layers import LayerSpec, Module
from .conversion import Conversion, ConvertedModule
from .convert import ConvertedLayer, as_module, convert_block
from .cut import Stage, cut
from .families import recognise, unknown_family
from .network import is_network, network_parts
from .sources import Origin, create
from .units import check_convertible, find
from .verify import check_first_leaf, check_stages


class Plan(NamedTuple):
    """How a backbone becomes an ensemble.

    Attributes:
        hierarchy: The tree.
        blocks: The layers of each block.
        head: The last linear layer.
        image: Channels, height and width of the images.
        conversion: The table of all modules.
        check: Random images, and the backbone's logits for them.
    """

    hierarchy: Hierarchy
    blocks: list[list[ConvertedLayer]]
    head: nn.Linear
    image: tuple[int, ...]
    conversion: Conversion
    check: tuple[Tensor, Tensor]

    @property
    def specs(self) -> list[list[LayerSpec]]:
        """The specs of the layers of each block."""
        return [[layer.spec for layer in block if layer.spec is not None] for block in self.blocks]


def plan(
    net: nn.Module,
    branches: Sequence[int] | Hierarchy,
    stages: Sequence[Stage] | None,
    head: str | None,
    input_size: int | tuple[int, ...] | None,
) -> Plan:
    """Cut and convert a backbone; see :meth:`hne.HNE.from_backbone`."""
    check_convertible(net)
    tree = branches if isinstance(branches, Hierarchy) else Hierarchy(branches)
    if is_network(net):
        if stages is not None or head is not None:
            raise ValueError("stages, head: expected none, since the network is one of this package, got some")
        own = network_parts(net, tree, input_size)
        table = _table(net, own.blocks, "head", own.head, own.image)
        return Plan(tree, own.blocks, own.head, own.image, table, own.check)
    try:
        parts = cut(net, tree.num_blocks, stages, head, input_size)
        linear = find(net, parts.head)
        assert isinstance(linear, nn.Linear)
        check = check_stages(net, [step for block in parts.blocks for step in block], linear, parts.image)
    except BackboneError as error:
        if stages is None and recognise(net) is None:
            raise unknown_family(net, error) from error
        raise
    blocks = [convert_block(block, last=block is parts.blocks[-1]) for block in parts.blocks]
    for block in blocks:
        if all(layer.spec is None for layer in block):  # a block has at least one layer
            block[0] = as_module(block[0].units, block[0].note)
    table = _table(net, blocks, parts.head, linear, parts.image)
    return Plan(tree, blocks, linear, parts.image, table, check)


def build(
    kind: Any,
    net: nn.Module,
    branches: Sequence[int] | Hierarchy,
    *,
    num_classes: int | None,
    stages: Sequence[Stage] | None,
    head: str | None,
    perturb: float,
    seed: int,
    freeze_trunk: bool,
    input_size: int | tuple[int, ...] | None,
) -> Any:
    """An ensemble of class ``kind`` from a backbone; see :meth:`hne.HNE.from_backbone`."""
    if not isinstance(perturb, int | float) or not 0 <= perturb < float("inf"):
        raise ValueError(f"perturb must be a number of at least 0, got {perturb!r}")
    made = plan(net, branches, stages, head, input_size)
    shared = sum(count == 1 for count in made.hierarchy.branches)
    if freeze_trunk and not shared:
        raise BackboneError(
            f"freeze_trunk: expected a tree whose first block has one branch, got branches {made.hierarchy.branches}"
        )
    classes = made.head.out_features if num_classes is None else num_classes
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # for the heads; torch.manual_seed() reseeds GPUs, too
        model = kind(made.hierarchy, made.specs, num_classes=classes, in_channels=made.image[0])
    parameter = next(net.parameters())
    model.to(parameter.device, parameter.dtype).train(net.training)
    with torch.no_grad():
        for layers, block in zip(made.blocks, model.layers_of_blocks(), strict=True):
            converted = [layer for layer in layers if layer.spec is not None]
            for source, layer in zip(converted, block, strict=True):
                _take_over(layer, source, perturb, generator)
        if classes == made.head.out_features:
            conv = model.head.conv
            conv.weight[:classes] = made.head.weight[:, :, None, None]
            conv.bias[:classes] = 0.0 if made.head.bias is None else made.head.bias
    model.conversion = made.conversion
    if classes == made.head.out_features:
        check_first_leaf(model, *made.check)
    if freeze_trunk:
        model.freeze_blocks_(shared)
    return model


def templates_of(net: nn.Module, hierarchy: Hierarchy, origin: Origin) -> list[nn.Module]:
    """The templates of the ``Module`` layers that a backbone is converted to, in the order of the layers."""
    size = tuple(origin.input_size) if isinstance(origin.input_size, list) else origin.input_size
    specs = plan(net, hierarchy, origin.stages, origin.head, size).specs
    return [spec.template for block in specs for spec in block if isinstance(spec, Module)]


def templates_from_config(config: Mapping[str, Any]) -> Sequence[nn.Module]:
    """The templates of a model's config, if it came from a backbone by its name; none otherwise."""
    layers = [layer for block in config["blocks"] for layer in block]
    if "origin" not in config or not any(layer.get("layer") == Module.__name__ for layer in layers):
        return ()
    origin = Origin(**config["origin"])
    return templates_of(create(origin.architecture), Hierarchy(**config["hierarchy"]), origin)


def _take_over(layer: nn.Module, source: ConvertedLayer, perturb: float, generator: torch.Generator) -> None:
    """Copy the weights of one branch to all branches of a layer; perturb all branches but the first.

    Noise is normal, with ``perturb`` times the standard deviation of the tensor. Statistics of batch norms have none,
    and neither have parameters that require no gradient in the backbone; they require none in the layer.
    """
    if isinstance(source.spec, Module):
        copies: Any = layer.copies
        state = source.spec.template.state_dict(keep_vars=True)
        targets = [module.state_dict(keep_vars=True) for module in copies]
        branches = {name: [target[name] for target in targets] for name in state}
    else:
        state = source.tensors
        branches = {}
        for name, target in layer.state_dict(keep_vars=True).items():
            target.requires_grad_(state[name].requires_grad)
            branches[name] = list(target.view(-1, state[name].numel())) if target.dim() else [target]
    for name, tensor in state.items():
        for index, target in enumerate(branches[name]):
            target.copy_(tensor.reshape(target.shape))
            if index and perturb and tensor.requires_grad:
                noise = torch.randn(target.shape, generator=generator, dtype=torch.float32)
                scale = perturb * float(tensor.detach().std(correction=0))
                target.add_((scale * noise).to(target.device, target.dtype))


def _table(
    net: nn.Module, blocks: list[list[ConvertedLayer]], path: str, head: nn.Linear, image: tuple[int, ...]
) -> Conversion:
    """The table of all modules; the head, at ``path``, comes last."""
    rows = [row for index, block in enumerate(blocks) for layer in block for row in _rows(index, layer)]
    count = sum(p.numel() for p in head.parameters())
    rows.append(ConvertedModule(path, "Linear", len(blocks), f"head: linear {head.out_features}", count))
    return Conversion(type(net).__name__, image, tuple(rows))


def _rows(block: int, layer: ConvertedLayer) -> list[ConvertedModule]:
    """The rows of the table for the units of a layer; the parameters stand in the row of their own module."""
    rows = []
    with_parameters = (step for step in layer.units if any(True for _ in step.unit.module.parameters()))
    main = next(with_parameters, layer.units[0])
    for step in layer.units:
        module = step.unit.module
        if layer.spec is None:
            became = layer.note or "nothing to compute"
        elif step is not main:
            became = f"joined with {main.unit.path}"
        else:
            became = "Module" if isinstance(layer.spec, Module) else f"{type(layer.spec).__name__}: {layer.spec}"
        count = sum(parameter.numel() for parameter in module.parameters())
        note = layer.note if step is main and layer.spec is not None else ""
        rows.append(ConvertedModule(step.unit.path, type(module).__name__, block, became, count, note))
    return rows

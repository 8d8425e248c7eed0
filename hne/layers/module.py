"""Any ``nn.Module`` as a layer: a copy for every branch, called branch by branch in plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from .executor import Executor, Features
from .layer import Layer
from .parameters import Size
from .spec import LayerSpec, check_int
from .submodules import check_never_called, detach_recomputed
from .template import DryRuns, add_noise, check_template, copied, draw_anew


@dataclass(frozen=True, init=False, repr=False)
class Module(LayerSpec):
    """Any module of one input and one output: a feature map ``[batch, channels, height, width]`` or tokens
    ``[batch, tokens, channels]`` to one of these, or to a vector ``[batch, channels]`` (one pixel).

    Each branch has a copy of the template, and each copy its own parameters and running statistics. Equal copies would
    get equal gradients and stay one network. The first copy therefore has the parameters of the template, and further
    copies have new ones, drawn by the ``reset_parameters()`` of their submodules (of all copies, where the template is
    on the meta device). Where no such method reaches a parameter, as one of the template itself, the copy has the value
    of the template with normal noise of a tenth of its root mean square. Parameters that require no gradient are the
    template's in all copies.

    A template that occurs twice in a network makes two layers. The template itself is not part of the network, and
    training leaves it as it is. Its copies begin in training mode, as a new network does. Configs hold the name of its
    class, not its code.

    Args:
        template: The module. It does not change the batch, and has no lazy or quantised modules.
        channels: Output channels of a branch; found by a run with zeros if it is not given.
        input_size: Height and width of the input in this run, or the number of tokens. Needed if the template does not
            run with 32, 64 or 224 pixels or tokens, or if its output channels depend on the size.
        tokens: Whether the template reads tokens, the pixels row by row; if it is not given, a run finds out.
        perturb: Further copies have the parameters of the template with normal noise, relative to the root mean square
            of each tensor, and its running statistics, instead of new ones. For trained templates, for instance 0.1.

    Raises:
        TypeError: An argument has a wrong type, or the ``state_dict`` of the template has other things than tensors.
        ValueError: A number is out of range, or the template has lazy or quantised modules. In a network: the template
            cannot read the features before it, does not return one tensor of these shapes, or shares parameters with
            another template.
    """

    template: nn.Module
    channels: int | None  # type: ignore[assignment]
    input_size: int | Size | None
    tokens: bool | None
    perturb: float | None

    scaled_fields: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        template: nn.Module,
        channels: int | None = None,
        input_size: int | Size | None = None,
        tokens: bool | None = None,
        *,
        perturb: float | None = None,
    ) -> None:
        check_template(template)
        if channels is not None:
            check_int("Module.channels", channels, 1)
        if isinstance(input_size, list | tuple):
            if len(input_size) != 2:
                raise ValueError(f"Module.input_size must be one or two ints, got {input_size!r}")
            input_size = input_size[0], input_size[1]
        for side in input_size if isinstance(input_size, tuple) else (input_size,):
            if side is not None:
                check_int("Module.input_size", side, 1)
        if tokens not in (None, False, True):
            raise TypeError(f"Module.tokens must be a bool or None, got {tokens!r}")
        if perturb is not None and not (isinstance(perturb, int | float) and 0 <= perturb < math.inf):
            raise ValueError(f"Module.perturb must be a number of at least 0, got {perturb!r}")
        values = {
            "template": template, "channels": channels, "input_size": input_size, "tokens": tokens, "perturb": perturb
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return f"Module({type(self.template).__name__})"

    __repr__ = __str__

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies of a network need no template of their own

    def scaled(self, width: float) -> Self:
        if width != 1:
            raise ValueError(f"width must be 1 in a network with modules of other classes ({self}), got {width}")
        return self

    def config(self) -> dict[str, Any]:
        size = list(self.input_size) if isinstance(self.input_size, tuple) else self.input_size
        fields = {"channels": self.channels, "input_size": size, "tokens": self.tokens, "perturb": self.perturb}
        return {"layer": "Module", "template": type(self.template).__qualname__, **fields}

    @classmethod
    def from_fields(cls, fields: dict[str, Any], templates: Iterator[nn.Module]) -> Self:
        name = fields.pop("template", None)
        template = next(templates, None)
        if template is None:
            raise ValueError(f"templates: the code of a layer, a {name}, is not part of the config, and was not given")
        if type(template).__qualname__ != name:
            raise ValueError(f"templates: expected a {name}, got {type(template).__qualname__}")
        return cls(template, **fields)


class ModuleLayer(Layer, spec=Module):
    """Implements :class:`Module`. ``spec`` has the channels and tokens that a run of the template has found.

    Attributes:
        copies: The copy of each branch.
    """

    spec: Module

    def __init__(self, spec: Module, in_channels: int, branches: int, replicate: int) -> None:
        runs = DryRuns(spec.template, in_channels, spec.tokens, spec.input_size)
        if spec.channels not in (None, runs.channels):
            raise ValueError(
                f"Module.channels must be the output channels of the template {type(spec.template).__name__}, "
                f"{runs.channels}, got {spec.channels}"
            )
        spec = dataclasses.replace(spec, channels=runs.channels, tokens=runs.tokens)
        super().__init__(spec, in_channels, branches, replicate)
        self.copies = nn.ModuleList(copied(spec.template) for _ in range(branches)).train()
        self._runs = runs

    def reset_parameters(self) -> None:
        """Initialise as :class:`Module` says: the template's parameters in the first copy, new ones in the others.

        Raises:
            RuntimeError: The state of a copy has other names or shapes than that of the template.
        """
        template = self.spec.template
        empty = any(tensor.is_meta for tensor in (*template.parameters(), *template.buffers()))
        for index, module in enumerate(self.copies):
            if not empty:
                module.load_state_dict(template.state_dict())
            if self.spec.perturb is None and (index > 0 or empty):
                draw_anew(module)
            elif self.spec.perturb is not None and index > 0:
                add_noise(module, self.spec.perturb)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        check_never_called(self.copies, "register the hook on the layer or on a copy")
        maps = executor.to_branches(x, self.in_channels)
        copies = list(self.copies)[branches]
        outputs = [self._call(module, maps[index // replicate]) for index, module in enumerate(copies)]
        return executor.from_branches(outputs)

    def _call(self, module: nn.Module, x: Tensor) -> Tensor:
        y = self._runs.as_map(module(self._runs.read(x)), x)
        self._runs.check_channels(y, x)
        return y

    def macs(self, size: Size) -> int:
        """Multiply-adds of convolutions and matrix products, counted by ``torch.utils.flop_counter``."""
        return self._runs.result(size).macs

    def output_size(self, size: Size) -> Size:
        return self._runs.result(size).size

    def __getstate__(self) -> dict[str, Any]:
        for module in self.copies.modules():
            detach_recomputed(module)
        return self.__dict__.copy()

"""The table of a conversion: which module of a backbone became which layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ConvertedModule:
    """One module of a backbone.

    Attributes:
        path: Its attributes in the backbone; a function of ``forward`` is in parentheses.
        kind: Its class.
        block: The block of the tree, from 0; the number of blocks for the head.
        became: The layer that computes it, or the module that it was joined with.
        parameters: Number of its parameters, of one branch.
        note: Why it became a Module, or what is stored differently.
    """

    path: str
    kind: str
    block: int
    became: str
    parameters: int
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """How a backbone became an ensemble. ``print`` shows it as a table.

    Attributes:
        backbone: The class of the backbone.
        input_shape: Channels, height and width of the images with which it was checked.
        modules: A row per module, in the order of computation.
    """

    backbone: str
    input_shape: tuple[int, ...]
    modules: tuple[ConvertedModule, ...]

    def __iter__(self) -> Iterator[ConvertedModule]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def summary(self) -> str:
        """The parameters, the size of the images, and how many modules are computed in plain PyTorch, in a line."""
        height, width = self.input_shape[1:]
        modules = sum(row.became == "Module" for row in self.modules)
        total = sum(row.parameters for row in self.modules)
        return (
            f"{self.backbone}: {total:,} parameters, checked with images of {height}x{width}; "
            f"{modules} of {len(self.modules)} modules in plain PyTorch (Module)"
        )

    def __str__(self) -> str:
        rows = [("block", "module", "class", "became", "parameters", "note")]
        for m in self.modules:
            rows.append((str(m.block), m.path, m.kind, m.became, f"{m.parameters:,}", m.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [
                text.rjust(width) if index == 4 else text.ljust(width)
                for index, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([self.summary, *lines])

"""Layering: a file imports from lower floors only, and from another package only what its ``__init__`` exports.

The imports are read from the source, so those for type checkers and inside functions count too.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    "hne": "errors extras < files hierarchy distributed averages < layers losses metrics calibration data < "
    "executors < models runtime < inference rivals < evaluation < reporting integrations < training < experiments < "
    "cli < __init__ __main__",
    "hne_kernels": "extension checks tracing < autocast autograd packing quantized_layer allocator state_record < "
    "reference < dispatch < ops < lazy triton flops environment < info < __init__",
}
HEIGHT = {
    (root, unit): height
    for root, floors in FLOORS.items()
    for height, floor in enumerate(floors.split(" < "))
    for unit in floor.split()
}
TREES = {
    path.relative_to(ROOT): ast.parse(path.read_text())
    for root in FLOORS
    for path in sorted((ROOT / root).rglob("*.py"))
}


def imported(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and dotted name of everything that a file imports from this project."""
    for node in ast.walk(TREES[path]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*path.parts[: len(path.parts) - node.level]] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("K", "hne_kernels"):
            names = [f"hne_kernels.{node.attr}"]  # after `import hne_kernels as K`
        for name in names:
            if (parts := tuple(name.split(".")))[0] in FLOORS:
                yield node.lineno, parts


def exports(*package: str) -> set[str]:
    """The names in the ``__all__`` of a package, or without one all names that its ``__init__`` imports."""
    body = TREES[Path(*package, "__init__.py")].body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}


def fault(path: Path, name: tuple[str, ...]) -> str:
    """Describe how an import breaks the rule; "" if it keeps it."""
    here, there = (path.parts[0], path.with_suffix("").parts[1]), (*name, "__init__")[:2]
    package = name[:1]
    if here[0] == there[0]:
        if here == there:
            return ""
        if unknown := {here, there} - HEIGHT.keys():
            return f"no floor for {unknown}"
        if HEIGHT[there] >= HEIGHT[here]:
            return "sideways import" if HEIGHT[there] == HEIGHT[here] else "upward import"
        if here[0] == "hne_kernels" or Path(*there, "__init__.py") not in TREES:
            return ""  # reference, ops and triton mirror each other: a kernel imports from the file of its op
        package = name[:2]
    elif here[0] == "hne_kernels":
        return "upward import"
    if name == package or (len(name) == len(package) + 1 and name[-1] in {"__version__", *exports(*package)}):
        return ""
    return f"not exported by {'.'.join(package)}"


def test_imports_keep_to_the_floors() -> None:
    faults = {
        f"{path}:{line}: {text}: {'.'.join(name)}"
        for path in TREES
        for line, name in imported(path)
        if (text := fault(path, name))
    }
    assert not faults, "\n" + "\n".join(sorted(faults))


def test_no_import_cycle() -> None:
    modules = {path.parts[:-1] if path.stem == "__init__" else path.with_suffix("").parts: path for path in TREES}
    graph = {
        module: {name if name in modules else name[:-1] for _, name in imported(path)} - {module}
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()

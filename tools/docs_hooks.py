"""Hooks of MkDocs: pages of the site that are written elsewhere in the repository, each from its only source.

README.md is the start page, the packages' ``__init__`` files name what the reference has, and the examples are pages.
Links between files of the repository become links between pages.
"""

from __future__ import annotations

import functools
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import EXAMPLES, cells

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_INHERITED = "\n    options: {inherited_members: true}"  # of a class whose methods lie in several files
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of docs/."""
    results = [p.relative_to(ROOT).as_posix() for p in (ROOT / "benchmarks/results").iterdir() if p.suffix != ".json"]
    for source in [*PAGES, "LICENSE", "benchmarks/NOTES.md", *results]:
        files.append(File.generated(config, _site_path(source), abs_src_path=str(ROOT / source)))
    for page in _nav_pages(config.nav):
        if page.startswith("reference/"):
            files.append(File.generated(config, page, content=_reference(page[len("reference/") : -len(".md")])))
    for script in sorted(EXAMPLES.glob("*.py")):
        files.append(File.generated(config, f"examples/{script.stem}.md", content=_example(script)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to pages."""
    path = page.file.src_uri
    source = next((key for key, value in PAGES.items() if value == path), f"docs/{path}")
    if path.startswith("benchmarks/"):
        source = path

    def replaced(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(_site_path(target), posixpath.dirname(path) or ".") + match[3]

    return _LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Show what docstrings say in reStructuredText: references to other names, and colons before code."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        code = f"<code>{name.rpartition('.')[2]}</code>"
        return f'<autoref optional identifier="{name}">{code}</autoref>' if "." in name else code

    return _ROLE.sub(link, html).replace("::</p>", ":</p>")


def _site_path(source: str) -> str:
    """Where a file of the repository is on the site."""
    if source.startswith("examples/"):
        return source.removesuffix(".py") + ".md"
    return PAGES.get(source, source.removeprefix("docs/"))


def _nav_pages(items: Any) -> list[str]:
    if isinstance(items, str):
        return [items]
    values = items.values() if isinstance(items, dict) else items
    return [page for value in values for page in _nav_pages(value)]


def _reference(package: str) -> str:
    """The classes and functions that a package exports, by their docstrings; those of ``hne`` are on its page alone."""
    exports = _exports(package)
    shared = [] if package == "hne" else [name for name in exports if name in _exports("hne")]
    blocks = [
        f"::: {path}{_INHERITED if path == 'hne.HNE' else ''}" for name, path in exports.items() if name not in shared
    ]
    if shared:
        blocks.insert(0, "And in [hne](hne.md): " + ", ".join(f"`{name}`" for name in shared) + ".")
    docstring = _load(package).docstring
    return "\n\n".join([f"# {package}", docstring.value if docstring else "", *blocks])


@functools.cache
def _load(package: str) -> Any:
    """A package, read but not imported."""
    return griffe.load(package, search_paths=[str(ROOT)], resolve_aliases=True)


@functools.cache
def _exports(package: str) -> dict[str, str]:
    """The classes and functions that a package imports from its modules, by name, as their paths."""
    exports = {}
    for name, member in _load(package).members.items():
        if name.startswith("_") or (not member.is_alias and not member.is_module):
            continue
        try:
            found = member.final_target if member.is_alias else member
        except griffe.AliasResolutionError:  # a constant of several in one assignment
            continue
        if found.is_module and name in found.members and found.members[name].is_function:
            exports[name] = f"{found.path}.{name}"  # a function with the name of its module
        elif member.is_alias and (found.is_class or found.is_function) and found.path.startswith("hne"):
            exports[name] = f"{package}.{name}"
    return dict(sorted(exports.items(), key=lambda item: item[0].lower()))


def _example(script: Path) -> str:
    """An example as a page: its text, its code and its plot."""
    parts = [
        source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells(script.read_text())
    ]
    parts.insert(1, f"`python examples/{script.name} --help` lists its options.\n\n![Its plot]({script.stem}.png)")
    return "\n\n".join(parts)

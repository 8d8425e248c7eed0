"""What a study leaves behind: its tables in Markdown and CSV, its figure as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import remove_leftovers, replacing
from .designs import Study
from .figures import FIGURES
from .results import PanelResult
from .tables import TABLES, Table, write_csv


def tables(study: Study, panel: PanelResult) -> tuple[Table, ...]:
    """The tables of a panel; none if nothing of it is finished."""
    return tuple(TABLES[name](panel.results) for name in study.tables) if panel.curves else ()


def write_report(
    folder: Path, name: str, study: Study, panels: Sequence[PanelResult], what: str, about: str
) -> tuple[Path, ...]:
    """Write everything into ``folder``, and return the files.

    Args:
        folder: is made if it is not there.
        name: of the files.
        study: what is reported on.
        panels: what is finished; at least one curve of one panel.
        what: the network and its data in a few words, for the heading.
        about: paragraphs of Markdown under the heading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    finished = [panel for panel in panels if panel.curves]
    title = f"{study.title}: {what}"
    figures = [folder / f"{name}.{kind}" for kind in ("png", "svg")] if study.figure else []
    for path in figures:
        assert study.figure is not None
        FIGURES[study.figure](finished, path, title)
    text = [f"# {title}\n", f"{about}\n"]
    text += [f"![{study.title}]({path.name})\n" for path in figures[:1]]
    for panel in finished:
        if len(panels) > 1:
            text.append(f"## Width {panel.scale:g}\n")
        for table in tables(study, panel):
            text += [f"**{table.title}**\n", table.markdown()]
    markdown, values = folder / f"{name}.md", folder / f"{name}.csv"
    with replacing(markdown) as temporary:
        temporary.write_text("\n".join(text))
    write_csv(values, finished)
    return (markdown, values, *figures)

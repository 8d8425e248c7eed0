"""The report of a study: tables in Markdown and CSV, the figure as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import make_folder, remove_leftovers, write_text
from ..reporting import Table
from .designs import Study
from .figures import FIGURES
from .results import PanelResult
from .tables import TABLES, write_csv


def panel_tables(study: Study, panel: PanelResult) -> tuple[Table, ...]:
    """The tables of a panel; none if it has no results."""
    return tuple(TABLES[name](panel.results) for name in study.tables) if panel.curves else ()


def write_report(
    folder: Path, name: str, study: Study, panels: Sequence[PanelResult], subject: str, about: str
) -> tuple[Path, ...]:
    """Write the report of a study.

    Args:
        folder: Folder of the report; it is created if necessary.
        name: Name of the files without ending.
        study: The study.
        panels: Its results, with at least one curve in one panel.
        subject: Network and data set in a few words, for the heading.
        about: Paragraphs of Markdown below the heading.

    Returns:
        The files: Markdown, CSV and the figure in both formats, if the study has one.
    """
    make_folder(folder)
    remove_leftovers(folder)
    finished = [panel for panel in panels if panel.curves]
    title = f"{study.title}: {subject}"
    figures = []
    if study.figure is not None:
        figures = [folder / f"{name}.png", folder / f"{name}.svg"]
        for path in figures:
            FIGURES[study.figure](finished, path, title)
    text = [f"# {title}\n", f"{about}\n"]
    text += [f"![{study.title}]({path.name})\n" for path in figures[:1]]
    for panel in finished:
        if len(panels) > 1:
            text.append(f"## Width {panel.scale:g}\n")
        for table in panel_tables(study, panel):
            text += [f"**{table.title}**\n", table.markdown()]
    markdown, values = folder / f"{name}.md", folder / f"{name}.csv"
    write_text(markdown, "\n".join(text))
    write_csv(values, finished)
    return (markdown, values, *figures)

"""Names that users choose appear as they are in plots and tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hne.errors import FileError
from hne.evaluation import AnytimeStep, EnsembleMetrics, Evaluation
from hne.reporting import (
    check_plot_path,
    plot_accuracy_against_macs,
    plot_accuracy_against_time,
    plots,
    show_table,
)

NAMES = ["$x$", "_hidden", "50%_$\\frac$", "[red]x[/red]", "[/]", "\udcff ü", "$"]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    figures: list[Figure] = []
    save = plots.save_figure

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def evaluation() -> Evaluation:
    metrics = [EnsembleMetrics(n, 1000 * n, 0.5 + 0.1 * n, 0.4, 0.3, 0.1, 0.2, 0.1, 0.5, 0.1) for n in (1, 2)]
    return Evaluation(tuple(metrics), (0.6, 0.6), 10)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_names_in_plots(kind: str, tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / f"plot.{kind}"
    plot_accuracy_against_macs(dict.fromkeys(NAMES, evaluation()), path, "a $title$_")
    (axes,) = saved[-1].axes
    texts = [axes.title, *axes.get_legend().get_texts()]
    assert [text.get_text() for text in texts] == ["a $title$_", *(name.replace("\udcff", "\\udcff") for name in NAMES)]
    assert not any(text.get_parse_math() for text in texts)
    assert path.stat().st_size > 1000
    for name in NAMES:
        plot_accuracy_against_time([AnytimeStep(1, 1000, 1.0, 1.0, 0.5)], path, name)
        assert not saved[-1].axes[0].title.get_parse_math()


def test_names_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["name", "n"], [(name, 1) for name in NAMES if name.isprintable()], title="[b]title[/b]", caption="[/x]")
    out = capsys.readouterr().out
    assert all(name in out for name in (*NAMES[:5], "[b]title[/b]", "[/x]"))


def test_places_of_plots(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.text: expected a file name that ends in one of .*\.png"):
        check_plot_path(tmp_path / "x.text")
    with pytest.raises(FileError, match="no such folder"):
        check_plot_path(tmp_path / "none" / "x.png")
    for name in ("x.png", "x.svg", "x"):
        check_plot_path(tmp_path / name)

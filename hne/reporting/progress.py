"""A progress bar on the terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import Self

_REFRESH_SECONDS = 0.25


class ProgressBar:
    """A progress bar on standard error, as a context manager; it disappears at the end.

    It shows only where standard error is a terminal. It is drawn by calls alone, without a thread: commands that
    measure times have it, too.

    Args:
        total: Number of units until the end.
        description: What proceeds.
        unit: Short name of a unit.
        hidden: Show nothing.
    """

    def __init__(self, total: int, description: str = "", *, unit: str = "img", hidden: bool = False) -> None:
        self._visible = not hidden and sys.stderr is not None and sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # what is printed there may be a result
            auto_refresh=False,
            disable=not self._visible,
        )
        self._task = self._progress.add_task(description, total=total, note="")
        self._next_draw = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        self._progress.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.refresh()
        self._progress.stop()

    def update(self, count: int = 1) -> bool:
        """Advance by ``count`` units.

        Returns:
            Whether the bar was drawn anew, after a while: a note would be seen.
        """
        self._progress.advance(self._task, count)
        if not self._visible or time.monotonic() < self._next_draw:
            return False
        self._progress.refresh()
        self._next_draw = time.monotonic() + _REFRESH_SECONDS
        return True

    def note(self, text: str) -> None:
        """Show a text beside the bar, when it is drawn next."""
        self._progress.update(self._task, note=text)

    def describe(self, text: str) -> None:
        """Say what proceeds now."""
        self._progress.update(self._task, description=text, refresh=True)


class _Speed(ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} {self._unit}/s")

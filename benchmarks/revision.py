"""The commit of this checkout and the date: known even where the package does not load."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path


def commit() -> str:
    """Short hash of the checkout, with a ``+`` if files differ from it; outside git the value of ``HNE_COMMIT``.

    Changes below benchmarks/results do not count: they come from earlier runs.
    """
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HNE_COMMIT", "unknown")


def describe() -> dict[str, str]:
    """The commit and today's date."""
    return {"commit": commit(), "date": datetime.date.today().isoformat()}

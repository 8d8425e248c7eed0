"""``python -m hne`` runs the command ``hne``."""

from __future__ import annotations

import sys


def main() -> int | str:
    """Run the command; without the packages that it needs, say which."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        return f"hne: error: {error}"
    return run()


if __name__ == "__main__":
    sys.exit(main())

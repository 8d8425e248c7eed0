"""``python -m hne`` runs the command ``hne``."""

import sys

from .cli import main

sys.exit(main())

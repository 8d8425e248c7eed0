"""``python -m hne`` is ``hne``."""

import sys

from .cli import main

sys.exit(main())

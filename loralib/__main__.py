"""``python -m loralib`` is the same as ``loralib``."""

from __future__ import annotations

import sys

from loralib.cli import main

if __name__ == "__main__":
    sys.exit(main())

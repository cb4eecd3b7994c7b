"""`python -m flows.cli`: the command `outliers`, where its script is not on PATH."""

from __future__ import annotations

import sys

from flows.cli.command import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m sparkdeep`: the same as the `sparkdeep` command."""

from __future__ import annotations

import sys

from sparkdeep.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m sparkdeep`: the same as the `sparkdeep` command."""

from __future__ import annotations

from sparkdeep.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

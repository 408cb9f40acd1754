"""`python -m sparkdeep.report`, as people's scripts call it."""

from sparkdeep.tracking.report import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())

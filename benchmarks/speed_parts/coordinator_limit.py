"""The coordinator's own limit: rounds a second, and what passes it, with up to 64 replicas that do no work."""

from __future__ import annotations

from typing import Any, Final

from measuring.rows import row

from speed_parts.fake_replicas import open_fake_fit

__all__ = ["measure"]

MB: Final = 1_000_000
REPLICAS: Final = (1, 2, 4, 8, 16, 32, 64)
SIZES_MB: Final = (1, 4)


def measure(*, pairs: int, quick: bool) -> dict[str, Any]:
    """Rounds a second and MB a second by number of replicas."""
    sizes, counts, pairs = ((1,), (2, 16), min(pairs, 3)) if quick else (SIZES_MB, REPLICAS, pairs)
    rates, flows = [], []
    for size_mb in sizes:
        for replicas in counts:
            times = max(1, 40 // (replicas * size_mb))
            with open_fake_fit(replicas, size_mb * MB // 4) as fit:
                seconds = [sum(fit.round() for _ in range(times)) / times for _ in range(pairs)]
            name, series = f"{size_mb} MB x {replicas}", f"{size_mb} MB"
            rates.append(row(name, "rounds/s", [1 / s for s in seconds], series=series, x=replicas))
            flows.append(row(name, "MB/s", [2 * replicas * size_mb / s for s in seconds], series=series, x=replicas))
    return {
        "title": "The coordinator's limit",
        "x_title": "replicas",
        "rows": rates + flows,
        "notes": [
            (
                "By number of replicas: processes on this machine that take no steps and share its cores with the driver. "
                "MB/s: parameters down and updates up together."
            )
        ],
    }

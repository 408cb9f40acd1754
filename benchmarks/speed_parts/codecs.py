"""What codecs of the exchange cost and save: seconds and bytes of one round."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

from measuring.rows import interleaved, over, row

from sparkdeep.settings.run import LocalSettings
from speed_parts.fake_replicas import FakeFit, open_fake_fit

__all__ = ["CODECS", "coded", "measure"]

CODECS: Final = ("identity", "bf16", "int8")
REPLICAS: Final = 2
SIZE_MB: Final = 40


def coded(codec: Any) -> LocalSettings:
    """Settings with `codec` in both directions."""
    return LocalSettings(batch_size=1, codec=codec, down_codec=codec)


def measure(*, pairs: int, quick: bool) -> dict[str, Any]:
    """The same parameters by every codec, on this machine's loopback."""
    size_mb, pairs = (4, min(pairs, 3)) if quick else (SIZE_MB, pairs)
    fits: dict[str, FakeFit] = {}
    measures: dict[str, Callable[[], float]] = {}
    with contextlib.ExitStack() as stack:
        for codec in CODECS:
            opened = open_fake_fit(REPLICAS, size_mb * 250_000, local=coded(codec))
            fits[codec] = stack.enter_context(opened)
            measures[codec] = fits[codec].round
        for fit in fits.values():
            fit.round()  # the first round of a stage sends whole parameters, this one what changed
        seconds = interleaved(measures, pairs)
        records = {codec: fit.record for codec, fit in fits.items()}
    rows = []
    for codec, values in seconds.items():
        ratios = {"identity": over(values, seconds["identity"])} if codec != "identity" else None
        rows.append(row(codec, "s a round", values, ratios=ratios))
    for unit, field in (("MB down a round", "sent_bytes"), ("MB up a round", "received_bytes")):
        whole = records["identity"][field]
        for codec in CODECS:
            ratios = {"identity": [records[codec][field] / whole]} if codec != "identity" else None
            rows.append(row(codec, unit, [records[codec][field] / 1e6], ratios=ratios))
    return {
        "title": "Codecs",
        "rows": rows,
        "notes": [
            (
                f"{size_mb} MB x {REPLICAS} replicas that take no steps, codec and down_codec alike, over loopback, where "
                "bytes cost next to nothing; see the section on a capped network for where they do."
            )
        ],
    }

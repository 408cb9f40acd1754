"""How many rounds a stage is to run, decided before it opens: Spark cannot rename a running job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

from sparkdeep.tracking.records import RoundRecord

__all__ = ["job_description", "rounds_to_run", "stage_description"]

# Opening costs at most 5 % of the time if 20 times its cost follows it; a quarter more, because rounds vary.
_WORK_PER_OPENING: Final = 25.0
# As above: the rest of max_stage_s is for rounds that take longer than those before.
_SHARE_OF_STAGE: Final = 0.9


def rounds_to_run(
    records: Sequence[RoundRecord], *, left: int, rounds_per_stage: int | Literal["auto"], max_stage_s: float
) -> int | None:
    """Decide how many rounds the next stage runs.

    Args:
        records: of the run so far; the last stage's rounds show how long a round takes, and its first what opening costs.
        left: rounds of the run that are not committed yet; 0 when a stage is opened only to score or keep the last one.
        rounds_per_stage: the setting.
        max_stage_s: the setting: a stage is planned to fit into it, unless a single round does not.

    Returns:
        At most `left`, and at least 1 if `left` is; None for "auto" when nothing was measured yet and several rounds
        are left: such a stage is closed by the clock.
    """
    measured = _last_stage(records)
    limit = left if rounds_per_stage == "auto" else min(rounds_per_stage, left)
    if measured is None:
        return None if rounds_per_stage == "auto" and left > 1 else limit
    round_s, opening_s = measured
    limit = min(limit, max(1, int(_SHARE_OF_STAGE * max_stage_s / round_s)))
    if rounds_per_stage == "auto":
        limit = min(limit, max(1, math.ceil(_WORK_PER_OPENING * opening_s / round_s)))
    return limit


def stage_description(committed: int, planned: int | None, num_rounds: int | None) -> str:
    """What the Spark UI shows of a stage's job."""
    first, of = committed + 1, _of(num_rounds)
    if planned is None:
        return f"sparkdeep fit: rounds from {first}{of}"
    if planned == 0:
        return f"sparkdeep fit: scores and checkpoint of round {committed}{of}"
    return f"sparkdeep fit: rounds {first}-{committed + planned}{of}"


def job_description(what: str, committed: int, num_rounds: int | None) -> str:
    """What the Spark UI shows of a job between rounds."""
    return f"sparkdeep fit: {what} after round {committed}{_of(num_rounds)}"


def _of(num_rounds: int | None) -> str:
    return "" if num_rounds is None else f" of {num_rounds}"


def _last_stage(records: Sequence[RoundRecord]) -> tuple[float, float] | None:
    """Mean seconds of a round, and of opening, in the last stage; None if none was opened."""
    for start in range(len(records) - 1, -1, -1):
        opening_s = records[start].stage_seconds
        if opening_s > 0:
            rounds = records[start:]
            round_s = (sum(record.seconds for record in rounds) - opening_s) / len(rounds)
            return max(round_s, 1e-6), opening_s
    return None

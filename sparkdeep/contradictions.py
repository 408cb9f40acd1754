"""Settings that are fine by themselves and cannot be meant together: refused when a fit is made."""

from __future__ import annotations

from sparkdeep.config import LocalSettings, RunSettings
from sparkdeep.errors import ConfigError

__all__ = ["check_together"]


def check_together(local: LocalSettings, run: RunSettings) -> None:
    """Refuse settings of rounds that the replicas' settings contradict.

    Raises:
        ConfigError: naming both settings.
    """
    _check_aggregation(local, run)
    if local.overlap and run.closing:
        raise ConfigError(
            f"overlap=1 with {', '.join(run.closing)}: a replica that runs ahead cannot go back, and takes a fixed number of "
            "steps. Leave overlap out, or the others."
        )
    if local.down_codec != "identity" and (run.quorum is not None or run.on_nonfinite != "error"):
        raise ConfigError(
            f"down_codec={local.down_codec!r} with {run.closing[0]}: a replica that a round goes on without would miss what "
            "changed in it. Use down_codec='identity'."
        )
    if local.inner_state == "average" and run.fednova:
        raise ConfigError(
            "inner_state='average' with FedNova's weights, which are of parameters: use inner_state='keep' or 'reset', or "
            "weighting='rows'."
        )


def _check_aggregation(local: LocalSettings, run: RunSettings) -> None:
    """Refuse a ring that could not do what the replicas' settings ask for.

    Raises:
        ConfigError: naming both settings.
    """
    if run.aggregation == "ring" and run.closing:
        raise ConfigError(
            f"aggregation='ring' with {', '.join(run.closing)}: in a ring every replica counts, by its rows. Use "
            "aggregation='star' or 'auto', or leave the others out."
        )
    asked = [
        f"{name}={getattr(local, name)!r}" for name in ("codec", "down_codec") if getattr(local, name) != "identity"
    ]
    asked += ["overlap=1"] if local.overlap else []
    if run.aggregation == "ring" and asked:
        raise ConfigError(
            f"aggregation='ring' with {', '.join(asked)}: in a ring parameters travel whole and in time. Use "
            "aggregation='star' or 'auto', or leave the others out."
        )

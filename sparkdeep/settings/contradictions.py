"""Settings that are valid by themselves and contradict each other: refused when a fit is made."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sparkdeep.checks import changed
from sparkdeep.errors import ConfigError
from sparkdeep.optim.drift import Scaffold
from sparkdeep.optim.local_work import WarmStart
from sparkdeep.settings.run import LocalSettings, RunSettings

__all__ = ["check_length", "check_outer", "check_together", "warn_of_effects"]

_LOG = logging.getLogger("sparkdeep")
# How parameters and optimizer state travel between rounds.
_TRAVELS = ("codec", "down_codec", "overlap", "inner_state")


def check_together(local: LocalSettings, run: RunSettings) -> None:
    """Refuse settings of rounds that the replicas' settings contradict.

    Raises:
        ConfigError: naming both settings.
    """
    _check_aggregation(local, run)
    _check_schedule(local, run)
    _check_drift(local, run)
    _check_gradient(local, run)
    _check_asynchronous(local, run)
    _check_aggregator(local, run)
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


def check_outer(run: RunSettings, outer_optimizer: object) -> None:
    """Refuse asynchronous rounds without an outer optimizer.

    Raises:
        ConfigError: with what to give.
    """
    if run.asynchronous is not None and outer_optimizer is None:
        raise ConfigError(
            f"asynchronous={run.asynchronous!r} without outer_optimizer: a push is a change that something must apply, and there is "
            "no round's mean to assign. Use algorithm=downpour() or delayed_nesterov(), or "
            "outer_optimizer=partial(torch.optim.SGD, lr=1 / num_workers)."
        )


def check_length(run: RunSettings, steps: Sequence[int]) -> None:
    """Refuse a warm start that is the whole run.

    Args:
        run: as the driver knows it.
        steps: local steps an epoch, by replica.

    Raises:
        ConfigError: with both numbers, and the remedies.
    """
    if not isinstance(run.schedule, WarmStart) or run.time_budget_s is not None:
        return
    alone, whole = run.schedule.num_steps, run.epochs * max(steps)
    remedy = "Give it fewer steps (WarmStart(n), or warm_start= of the preset; 0 for none), or train for more epochs."
    if alone >= whole and len(steps) > 1:
        raise ConfigError(
            f"schedule={run.schedule!r} with a run of {whole} local steps: only the first replica would train, on its own rows. "
            f"{remedy}"
        )
    if alone > whole / 2 and len(steps) > 1:
        _LOG.warning(
            "schedule=%r: the first replica trains alone for more than half of the run, which has %d local steps. %s",
            run.schedule,
            whole,
            remedy,
        )


def warn_of_effects(run: RunSettings) -> None:
    """Warn about settings that are allowed and do less than their names suggest."""
    counted, why = run.num_workers, f"num_workers={run.num_workers}"
    for name in ("quorum", "min_workers"):
        least = getattr(run, name)
        if least is not None and least < counted:
            counted, why = least, f"{name}={least}"
    if run.aggregator != "mean" and (weakness := run.aggregator.weakness(counted)):
        _LOG.warning("aggregator=%r with %s: %s", run.aggregator, why, weakness)


def _refuse(setting: str, others: Sequence[str], why: str) -> None:
    """Refuse `setting` beside `others`, if there are any."""
    if others:
        raise ConfigError(f"{setting} with {', '.join(others)}: {why}")


def _check_schedule(local: LocalSettings, run: RunSettings) -> None:
    if isinstance(run.schedule, WarmStart) and local.inner_state == "average":
        raise ConfigError(
            f"inner_state='average' with schedule={run.schedule!r}: replicas that wait have no optimizer state that could take a mean. "
            "Use inner_state='keep' or 'reset'."
        )
    if run.schedule is None:
        return
    warm = isinstance(run.schedule, WarmStart) and run.schedule.then is None
    if run.asynchronous is None or not warm:
        _refuse(
            f"schedule={run.schedule!r}",
            changed(run, "time_budget_s"),
            "a rule for the number of local steps contradicts a deadline in seconds, which leaves the number open. Keep one.",
        )
    _refuse(
        f"schedule={run.schedule!r}",
        changed(local, "overlap"),
        "the next round begins before a rule can say how long it is. Leave one out.",
    )
    _refuse(
        f"schedule={run.schedule!r}", changed(run, "work"), "replicas take no local steps there. Leave schedule out."
    )


def _check_drift(local: LocalSettings, run: RunSettings) -> None:
    if local.drift_correction is None:
        return
    name = f"drift_correction={local.drift_correction!r}"
    others = changed(run, "work", "asynchronous") + changed(local, "overlap")
    _refuse(name, others, "it corrects rounds of local steps that all begin at the same parameters. Leave one out.")
    if not isinstance(local.drift_correction, Scaffold):
        return
    unsteady = changed(run, "quorum", "min_workers", "on_nonfinite", "time_budget_s")
    unsteady += [f"schedule={run.schedule!r}"] if run.schedule is not None and not run.schedule.alike else []
    _refuse(
        name,
        unsteady,
        "a control variate belongs to a replica that stays with its rows and counts in every round. Leave the others out, or use "
        "FedProx(mu).",
    )
    clipped = changed(local, "clip_grad_norm")
    _refuse(name, clipped, "a control variate is read off what steps moved, which clipping shortens. Leave one out.")
    traveling = changed(local, "codec")
    traveling += [f"inner_state={local.inner_state!r}"] if local.inner_state == "average" else []
    traveling += [f"weighting={run.shares!r}"] if run.fednova else []
    _refuse(
        name,
        traveling,
        "control variates travel with the parameters, whole, and are averaged by rows. Leave the others out.",
    )


def _check_gradient(local: LocalSettings, run: RunSettings) -> None:
    if run.work == "local":
        why = "portions are of gradients of all rows. Use work='gradient', sync_every='epoch'."
        _refuse("work='local'", changed(run, "portions"), why)
        return
    others = changed(run, "time_budget_s", "quorum", "min_workers", "asynchronous", "on_nonfinite", "aggregator")
    others += changed(run, "weighting") if run.weighting != "rows" else []
    others += changed(local, *_TRAVELS)
    _refuse(
        "work='gradient'",
        others,
        "a gradient is the sum over the rows of every replica, exact and on time. Leave the others out, or use work='local'.",
    )
    if run.portions is not None and run.sync_every != "epoch":
        raise ConfigError(
            f"portions={run.portions!r} with sync_every={run.sync_every!r}: portions are of all rows. Use sync_every='epoch'."
        )


def _check_asynchronous(local: LocalSettings, run: RunSettings) -> None:
    if run.asynchronous is None:
        return
    others = changed(run, "quorum", "divergence_factor", "on_nonfinite", "aggregator", "weighting")
    others += changed(local, *_TRAVELS)
    _refuse(
        f"asynchronous={run.asynchronous!r}",
        others,
        "each push is taken whole and by itself, when it comes. Leave the others out.",
    )
    least = run.asynchronous.least_staleness(run.num_workers)
    bound = run.asynchronous.max_staleness
    if bound is not None and bound < least:
        raise ConfigError(
            f"max_staleness={bound} with num_workers={run.num_workers}, n_fetch={run.asynchronous.n_fetch}, "
            f"n_push={run.asynchronous.n_push}: while a replica works, each of the others must be able to push as often as it does. "
            f"Give at least {least}, or None."
        )


def _check_aggregator(local: LocalSettings, run: RunSettings) -> None:
    if run.aggregator == "mean":
        return
    others = [f"inner_state={local.inner_state!r}"] if local.inner_state == "average" else []
    others += changed(local, "overlap")
    others += [f"drift_correction={local.drift_correction!r}"] if isinstance(local.drift_correction, Scaffold) else []
    others += [f"weighting={run.shares!r}"] if run.fednova else []
    if run.fednova and run.weighting == "auto":
        raise ConfigError(
            f"aggregator={run.aggregator!r} where each replica takes its own number of steps: weighting='auto' is 'fednova' there, which "
            "an aggregator cannot correct by. Set weighting='rows' or 'equal'."
        )
    _refuse(
        f"aggregator={run.aggregator!r}", others, "it is of parameters, and weighs them itself. Leave the others out."
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
    asked = changed(local, "codec", "down_codec", "overlap")
    if run.aggregation == "ring" and asked:
        raise ConfigError(
            f"aggregation='ring' with {', '.join(asked)}: in a ring parameters travel whole and in time. Use "
            "aggregation='star' or 'auto', or leave the others out."
        )

"""Which transport a fit takes, what it cannot do there, and the pieces that a `Fit` is given for it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, TypeAlias

from pyspark.sql import SparkSession

from sparkdeep.errors import ConfigError, PreflightError
from sparkdeep.optim.drift import Scaffold
from sparkdeep.protocol.plans import ReplicaPlan
from sparkdeep.protocol.tls import check_tls
from sparkdeep.rounds.fit import Fit
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.transport import StageOpener
from sparkdeep.spark.fit.settings import FitSettings
from sparkdeep.spark.session.access import ENCRYPTED_CONNECTIONS, ENCRYPTED_DISKS, access_to, is_connect
from sparkdeep.spark.session.task import Shards
from sparkdeep.spark.tasks.barrier import BarrierLauncher
from sparkdeep.spark.tasks.round_jobs import (
    Load,
    RoundJobs,
    RunnerSettings,
    SparkRunner,
    StatelessRunner,
    probe_session,
)
from sparkdeep.stages.coordinator import Coordinator, parse_ports
from sparkdeep.stages.jobs import JobStages
from sparkdeep.stages.opener import SocketStages
from sparkdeep.tensors.parameters import named_tensors

__all__ = ["Transport", "check_load", "chosen", "guarded", "probe", "stages_of", "transport_for"]

Transport: TypeAlias = BarrierLauncher | RoundJobs
# Averaged optimizer state: Adam has two values a parameter, and amsgrad a third.
_MOST_SECTIONS: Final = 3
_PROBE_TIMEOUT_S: Final = 60.0
_GUARDS: Final = ("spark.authenticate", *ENCRYPTED_CONNECTIONS)
_LOG: Final = logging.getLogger("sparkdeep")


def chosen(settings: FitSettings, spark: SparkSession) -> str:
    """What was asked for, or what the session can do: "socket", "spark", or "stateless".

    Raises:
        PreflightError: the session cannot do what was asked for.
        ConfigError: a setting has no meaning with that transport.
    """
    if settings.run.stateless:
        return _stateless(settings)
    transport = settings.transport
    if transport == "auto":
        transport = "spark" if is_connect(spark) else "socket"
    if transport == "socket":
        if is_connect(spark):
            raise PreflightError(
                "transport='socket': this is a Spark Connect session, whose client executors cannot dial; use "
                "transport='spark' or 'auto', or a classic session."
            )
        if settings.exchange_dir is not None:
            raise ConfigError(
                "exchange_dir is for transport='spark'; with 'socket' updates go to the driver. Leave it out, or set "
                "transport='spark'."
            )
        return transport
    if is_connect(spark) and settings.deal == "partitions":
        raise PreflightError(
            "deal='partitions', and petastorm datasets, need a classic session: Spark Connect does not tell how many partitions "
            "a DataFrame has. Use deal='rows' on a DataFrame."
        )
    without: dict[str, tuple[Any, str]] = {
        "rounds_per_stage": (
            settings.run.rounds_per_stage if settings.run.rounds_per_stage not in ("auto", 1) else None,
            "every round is a job of its own",
        ),
        "coordinator_host": (settings.coordinator_host, "no replica dials the driver"),
        "coordinator_port": (settings.coordinator_port, "no port is opened"),
        "tls": (settings.tls if settings.tls is True else None, "no port is opened, and Spark's own encryption holds"),
        "aggregation": (
            "ring" if settings.run.aggregation == "ring" else None,
            "no connection stays open between rounds",
        ),
        "overlap": (settings.local.overlap or None, "a round ends before the next one begins"),
        "down_codec": (
            settings.local.down_codec if settings.local.down_codec != "identity" else None,
            "replicas are built anew for each round, and know no parameters that could have changed",
        ),
        **dict.fromkeys(
            (name.partition("=")[0] for name in settings.run.closing),
            (" ".join(settings.run.closing) or None, "each round is a job of its own that all replicas end together"),
        ),
        "replay": (
            "records of rounds that went on without a replica" if _went_on_without(settings) else None,
            "each round is a job of its own that all replicas end together",
        ),
        "min_workers": (settings.run.min_workers, "the number of replicas does not change there"),
        "worker_process": (
            "spawn" if settings.worker_process == "spawn" else None,
            "replicas train in Spark's Python workers",
        ),
    }
    for name, (value, reason) in without.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} with transport='spark': {reason}. Leave it out, or use transport='socket'."
            )
    return transport


def _went_on_without(settings: FitSettings) -> bool:
    return any(part.dropped for record in settings.replay for part in record.replicas)


def _stateless(settings: FitSettings) -> str:
    run = settings.run
    without: dict[str, tuple[Any, str]] = {
        "transport": (settings.transport if settings.transport == "socket" else None, "no replica dials the driver"),
        "rounds_per_stage": (
            run.rounds_per_stage if run.rounds_per_stage not in ("auto", 1) else None,
            "every evaluation is a job of its own",
        ),
        "coordinator_host": (settings.coordinator_host, "no replica dials the driver"),
        "coordinator_port": (settings.coordinator_port, "no port is opened"),
        "tls": (settings.tls if settings.tls is True else None, "no port is opened, and Spark's own encryption holds"),
        "exchange_dir": (settings.exchange_dir, "gradients go to the driver, which adds them up"),
        "deal": ("partitions" if settings.deal == "partitions" else None, "rows are dealt to portions"),
        "deal_key": (settings.deal_key, "no replica keeps rows: any task may take any portion"),
        "aggregation": ("ring" if run.aggregation == "ring" else None, "no connection stays open between rounds"),
        "worker_process": (
            "spawn" if settings.worker_process == "spawn" else None,
            "portions are worked at in Spark's Python workers",
        ),
    }
    for name, (value, reason) in without.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} with portions={run.portions!r}: {reason}. Leave it out, or set portions=None, which has the "
                "replicas of a barrier stage do it."
            )
    return "stateless"


def guarded(settings: FitSettings, spark: SparkSession) -> FitSettings:
    """The settings as they hold where Spark guards disks and connections: with TLS or without, and without a ring.

    Raises:
        PreflightError: shards would lie in the clear where Spark encrypts disks, or a ring is asked for where connections
            are guarded: gloo's cannot be.
        ConfigError: TLS is needed, and its package is not installed.
    """
    access = access_to(spark)

    def on(*names: str) -> list[str]:
        return [f"{name}=true" for name in names if str(access.conf(name) or "false").strip().lower() == "true"]

    if on(ENCRYPTED_DISKS) and not settings.encrypted_disks:
        raise PreflightError(
            f"{ENCRYPTED_DISKS}=true covers what Spark itself writes: shards and replica states would lie in the clear on the "
            "executors' disks. Have the system encrypt the volumes under spark.local.dir (and shard_dir, exchange_dir), and "
            "say so by encrypted_disks=True."
        )
    if chosen(settings, spark) != "socket":
        return replace(settings, tls=False)
    encrypting = on(*ENCRYPTED_CONNECTIONS)
    tls = bool(encrypting) if settings.tls == "auto" else bool(settings.tls)
    if tls:
        check_tls()
    elif encrypting:
        _LOG.warning(
            "tls=False with %s: parameters and the run's token travel in the clear between replicas and driver.",
            ", ".join(encrypting),
        )
    settings = replace(settings, tls=tls)
    guards = on(*_GUARDS) or (["tls=True"] if tls else [])
    if not guards or settings.run.plain_ring or settings.run.aggregation == "star":
        return settings
    if settings.run.aggregation == "ring":
        raise PreflightError(
            f"aggregation='ring' with {', '.join(guards)}: replicas would exchange parameters over connections that are "
            "neither encrypted nor authenticated. Use aggregation='star', or allow it by plain_ring=True where the network "
            "between executors is trusted."
        )
    return replace(settings, run=replace(settings.run, aggregation="star"))


def probe(settings: FitSettings, spark: SparkSession, run: str, profile: Any) -> None:
    """Find out by a tiny barrier job what the session does not tell: slots, and whether storage is shared.

    Raises:
        PreflightError: too few slots, or executors that do not see each other's files in `exchange_dir`.
    """
    if is_connect(spark) or settings.exchange_dir is not None:
        probe_session(
            spark,
            run,
            settings.run.num_workers,
            profile,
            exchange=settings.exchange_dir,
            timeout_s=min(_PROBE_TIMEOUT_S, settings.run.open_timeout_s),
        )


def transport_for(
    settings: FitSettings,
    spark: SparkSession,
    shards: Shards,
    *,
    plan: ReplicaPlan,
    run: str,
    profile: Any,
    on_busy: Callable[[], None],
) -> Transport:
    """What runs replicas over the persisted shards; `on_busy` hears that they work."""
    if chosen(settings, spark) != "socket":
        runner = StatelessRunner if settings.run.stateless else SparkRunner
        return runner(
            spark,
            shards,
            settings=RunnerSettings(
                run=run,
                num_replicas=settings.run.num_tasks,
                shard_dir=settings.shard_dir,
                exchange=settings.exchange_dir,
                open_timeout_s=settings.run.open_timeout_s,
                stall_timeout_s=settings.run.stall_timeout_s,
                profile=profile,
                on_busy=on_busy,
            ),
        )
    return BarrierLauncher(
        spark,
        shards,
        plan=plan,
        shard_dir=settings.shard_dir,
        worker_process=settings.worker_process,
        profile=profile,
    )


def stages_of(
    transport: Transport, settings: FitSettings, spark: SparkSession, stack: contextlib.ExitStack
) -> StageOpener:
    """How replicas are reached; what is opened is closed with the stack."""
    if isinstance(transport, RoundJobs):
        stack.callback(transport.close)
        return JobStages(runner=transport)
    access = access_to(spark)
    host = access.conf("spark.driver.host") or "localhost"
    coordinator = Coordinator(
        bind_host=access.conf("spark.driver.bindAddress") or host,
        advertised_host=settings.coordinator_host or host,
        ports=parse_ports(settings.coordinator_port),
        tls=settings.tls is True,
    )
    stack.callback(coordinator.close)
    return SocketStages(launcher=transport, coordinator=coordinator)


def check_load(settings: FitSettings, fit: Fit, transport: Transport) -> None:
    """Refuse a fit whose parameters this session cannot carry.

    Raises:
        PreflightError: with the numbers, and what to set.
    """
    if not isinstance(transport, RoundJobs):
        return
    sections = _MOST_SECTIONS if settings.local.inner_state == "average" else 0
    sections += isinstance(settings.local.drift_correction, Scaffold)
    moving = {entry.name for entry in fit.layout.entries} | set(fit.layout.buffers)
    fixed = [tensor for name, tensor in named_tensors(fit.program.model) if name not in moving]
    transport.check(
        Load(
            start_bytes=_buffer_bytes(fit.state) + (1 + sections) * fit.layout.num_bytes,
            fixed_bytes=len(fit.plan.program) + sum(tensor.nbytes for tensor in fixed),
            rounds=fit.rounds_left,
            wide=settings.outer_optimizer is not None,
            durable=transport.keeps_states and (settings.run.replica_state == "durable" or fit.state.committed > 0),
        )
    )


def _buffer_bytes(state: RunState) -> int:
    return sum(tensor.nbytes for tensor in state.buffers.values())

"""Which transport a fit uses, what that rules out, and the stages that a `Fit` is given for it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeAlias

from pyspark.sql import SparkSession

from sparkdeep.errors import ConfigError, PreflightError
from sparkdeep.optim.drift import Scaffold
from sparkdeep.protocol.messages import ReplicaPlan
from sparkdeep.protocol.tls import check_tls
from sparkdeep.rounds.fit import Fit
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.transport import StageOpener
from sparkdeep.spark.fit.settings import FitSettings
from sparkdeep.spark.session.access import CONNECT_CANNOT, ENCRYPTED_CONNECTIONS, ENCRYPTED_DISKS, access_to, is_connect
from sparkdeep.spark.session.task import Shards
from sparkdeep.spark.tasks.replica_tasks import BarrierLauncher
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
_ALL_CAN: Final[Mapping[str, tuple[Any, ...]]] = {
    "transport": ("auto", "spark"),
    "rounds_per_stage": ("auto", 1),
    "coordinator_host": (None,),
    "coordinator_port": (None,),
    "tls": ("auto", False),
    "exchange_dir": (None,),
    "deal": ("rows",),
    "deal_key": (None,),
    "aggregation": ("auto", "star"),
    "overlap": (0,),
    "down_codec": ("identity",),
    "min_workers": (None,),
    "worker_process": ("auto", "reuse"),
}
"""Values that no transport refuses; any other may be refused by its table, `CANNOT`."""


def chosen(settings: FitSettings, spark: SparkSession) -> str:
    """The transport asked for, or the one the session can do: "socket", "spark", or "stateless".

    Raises:
        PreflightError: the session cannot do what was asked for.
        ConfigError: a setting has no meaning with that transport.
    """
    if settings.run.stateless:
        _refuse(
            StatelessRunner.CANNOT,
            settings,
            where=f"with portions={settings.run.portions!r}",
            remedy="set portions=None, which has the replicas of a barrier stage do it",
        )
        return "stateless"
    connect = is_connect(spark)
    if connect:
        _refuse(CONNECT_CANNOT, settings, where="on Spark Connect", remedy="use a classic session", kind=PreflightError)
    if settings.transport == "spark" or (settings.transport == "auto" and connect):
        remedy = "use transport='socket'" + " on a classic session" * connect
        _refuse(SparkRunner.CANNOT, settings, where="with transport='spark'", remedy=remedy)
        return "spark"
    _refuse(BarrierLauncher.CANNOT, settings, where="with transport='socket'", remedy="use transport='spark'")
    return "socket"


def _refuse(
    cannot: Mapping[str, str],
    settings: FitSettings,
    *,
    where: str,
    remedy: str,
    kind: type[ConfigError] = ConfigError,
) -> None:
    """Refuse the first setting that was asked for and is in the table, {setting: reason}."""
    asked = _asked(settings)
    for name in cannot:
        if name in asked:
            raise kind(f"{asked[name]} {where}: {cannot[name]}. Leave it out, or {remedy}.")


def _asked(settings: FitSettings) -> dict[str, str]:
    """What was asked for and not every transport can do: {setting: as it is written, such as `tls=True`}."""
    values = vars(settings) | vars(settings.local) | vars(settings.run)
    asked = {name: f"{name}={values[name]!r}" for name, can in _ALL_CAN.items() if values[name] not in can}
    asked |= {written.partition("=")[0]: written for written in settings.run.closing}
    if any(part.dropped for record in settings.replay for part in record.replicas):
        asked["replay"] = "replay='records of rounds that went on without a replica'"
    return asked


def guarded(settings: FitSettings, spark: SparkSession) -> FitSettings:
    """The settings as they hold where Spark guards disks and connections: with TLS or without, and without a ring.

    Raises:
        PreflightError: shards would lie in the clear where Spark encrypts disks, or a ring is asked for where connections
            are guarded, which those of gloo cannot be.
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
    """Find out with a tiny barrier job what the session does not tell: slots, and whether storage is shared.

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
    """What runs replicas over the persisted shards; `on_busy` is called while they work."""
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

"""A fit of sparkdeep without Spark: its driver here, its replicas in processes of their own, on the real wire."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measuring.process_launcher import ProcessLauncher

from sparkdeep.data.schema import Field, Schema
from sparkdeep.data.shards import Shard, ShardWriter
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import ReplicaPlan, ShardFacts, Ticket
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.stage import Place, live
from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.stages.coordinator import Coordinator
from sparkdeep.stages.opener import SocketStages
from speed_parts.images import Images

__all__ = ["plain_fit", "serve_replica", "write_shards"]


def _schema(images: Images) -> Schema:
    width = images.pixels.shape[1]
    fields = [("features", "float32", (width,)), ("label", "int64", ())]
    return Schema(
        fields=tuple(
            Field(
                name=name,
                role="features" if name == "features" else "label",
                argument=None,
                columns=(name,),
                stacked=False,
                dtype=dtype,
                ragged=False,
                shape=shape,
            )
            for name, dtype, shape in fields
        )
    )


def write_shards(folder: Path, images: Images, replicas: int) -> list[Path]:
    """Deal the training rows, and the held-out ones for validation, to shards below `folder`."""
    share, rows = images.train_rows // replicas, len(images.labels)
    bounds = [images.train_rows + (rows - images.train_rows) * i // replicas for i in range(replicas + 1)]
    paths = []
    for replica in range(replicas):
        path = folder / f"shard-{replica}"
        writer = ShardWriter(path, _schema(images))
        for split, start, stop in (
            ("train", replica * share, (replica + 1) * share),
            ("validation", bounds[replica], bounds[replica + 1]),
        ):
            writer.append(split, {"features": images.pixels[start:stop], "label": images.labels[start:stop]})
        writer.close()
        paths.append(path)
    return paths


def serve_replica(
    number: int, connection: Connection, ticket: Ticket, plan: ReplicaPlan, shards: Sequence[Path], states: Path
) -> None:
    """A replica's process: dials, serves, ends."""
    del connection
    link = ReplicaLink.dial(ticket.address, ticket.token, connect_timeout_s=60.0, who=f"replica {number}")
    place = Place(
        replica=number, host=socket.gethostname(), device="cpu", shard=shards[number], state_dir=states / str(number)
    )
    with contextlib.closing(link):
        live(link, place, run=ticket.run, stage=ticket.stage, plan=lambda: plan)


@contextlib.contextmanager
def plain_fit(
    program: Program,
    local: LocalSettings,
    settings: RunSettings,
    shards: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    inside: Sequence[str] | None = None,
    target: Callable[..., None] = serve_replica,
    **options: Any,
) -> Iterator[Fit]:
    """A fit whose driver is this process.

    Args:
        program: what is trained.
        local: settings of the local work.
        settings: of the run.
        shards: a folder a replica.
        host: where the coordinator listens, and replicas dial.
        inside: the network namespace of each replica.
        target: what each replica's process runs.
        options: further fields of `Fit`.
    """
    facts = []
    for path in shards:
        with contextlib.closing(Shard.open(path)) as shard:
            facts.append(ShardFacts(rows=shard.info.rows, digest=shard.info.digest))
            schema = shard.schema
    plan = plan_of(program, local, schema)
    coordinator = Coordinator(bind_host=host, advertised_host=host, ports=range(1))
    try:
        yield Fit(
            program=program,
            local=local,
            settings=settings,
            plan=plan,
            shards=facts,
            stages=SocketStages(
                launcher=ProcessLauncher(
                    target, len(shards), plan, list(shards), shards[0].parent / f"states-{new_run_id()}", inside=inside
                ),
                coordinator=coordinator,
            ),
            run=new_run_id(),
            **options,
        )
    finally:
        coordinator.close()

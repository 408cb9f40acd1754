"""A replica's life in one job: that of a stage by letter, with one order; its reply is what it said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sparkdeep.errors import NonFiniteError
from sparkdeep.models.program import Program, unpack_program
from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.exchange import Exchange
from sparkdeep.protocol.messages import Failure, Hello, ReplicaPlan, Update, parse
from sparkdeep.protocol.orders import Job, Reply
from sparkdeep.protocol.refusals import check_updates, failed
from sparkdeep.replica.letter import Letter
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.stage import Place, live
from sparkdeep.storage.state_files import StateFiles, own_files
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import pack_tensors

__all__ = ["obey"]


def obey(
    job: Job,
    place: Place,
    letter: Letter,
    *,
    open_program: Callable[[bytes], Program] = unpack_program,
    check: Callable[[], None] = lambda: None,
) -> Reply:
    """Do what the job's order says.

    Args:
        job: the order, and what the replica is made from.
        place: where it is.
        letter: of the job.
        open_program: makes the user's objects.
        check: called while the first replica waits for the updates of others; raises to give up.

    Raises:
        UserCodeError: the user's model, loss or callable raised.
        ReplicaLostError: the environment failed; the order can be repeated.
        ShardLostError, ShardMismatchError, VersionMismatchError: this is not the replica that was meant.
    """
    header: dict[str, Any] = {"job": job.name, "replica": place.replica}
    if job.kind == "state" and not place.problem:  # which needs no model
        with own_files("it read the replica's state"):
            data = StateFiles(place.state_dir, job.name).read(job.opening.kept_round, job.opening.kept_by)
        return Reply(header=header, bodies=(data,))

    def plan() -> ReplicaPlan:
        assert job.program is not None
        return ReplicaPlan(program=bytes(job.program.open()), settings=job.settings, schema=job.schema)

    try:
        replica = live(ReplicaLink(letter), place, run=job.run, stage=job.name, plan=plan, open_program=open_program)
    except Exception as error:
        failure = letter.said.get("error")
        if failure is None or failure["cause"] != "user":
            raise
        raise failed(parse(Failure, failure), parse(Hello, letter.said["hello"])) from error
    header |= letter.said
    if job.exchange is None:
        return Reply(header=header, bodies=letter.bodies)
    assert replica is not None, "a letter lets in no replica without a shard"
    exchange = Exchange(job.exchange, job.run, job.name)
    exchange.put(place.replica, place.host, parse(Update, header["update"]), b"".join(letter.bodies))
    if place.replica != 0:
        return Reply(header=header)
    return _averaged(exchange, job, letter, replica, header, check)


def _averaged(
    exchange: Exchange,
    job: Job,
    letter: Letter,
    replica: Replica,
    header: dict[str, Any],
    check: Callable[[], None],
) -> Reply:
    """The first replica's reply: it has the mean of all updates that are laid down as its body."""

    def watch() -> None:
        letter.try_send("beat")
        check()

    updates, hosts = exchange.headers(len(job.facts), timeout_s=job.timeout_s, check=watch)
    try:
        check_updates(updates, hosts, header["update"]["round"])
    except NonFiniteError:
        return Reply(header=header)  # the driver sees the same headers, and refuses the round by name
    if not any(update.weight for update in updates):
        return Reply(header=header)
    averaging = Averaging(layout=replica.layout, codec=codec_named(job.settings.codec), wide=job.wide)
    known = replica.exchange.known
    vector, pooled = averaging.mean(
        updates,
        lambda i: exchange.body(i, averaging.body_bytes(updates[i])),
        known if averaging.codec.lossy else None,
    )
    letter.try_send("beat")
    narrow = vector.to(replica.layout.dtype)
    buffers = pack_tensors(pooled)
    stored = exchange.put_mean(b"".join([raw_bytes(narrow), buffers]))
    exchange.sweep(job.stale)
    header["mean"] = asdict(stored)
    return Reply(header=header, bodies=(raw_bytes(vector if job.wide else narrow), buffers))

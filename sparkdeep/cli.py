"""The `sparkdeep` command: `sparkdeep doctor`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from sparkdeep.errors import ConfigError

__all__ = ["main"]

_START_TIMEOUT_S = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 nothing fails, 1 something does, 2 wrong arguments."""
    try:
        report = _doctor(_parser().parse_args(arguments))
    except ConfigError as error:
        print(f"sparkdeep doctor: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except Exception as error:  # noqa: BLE001 (no session: that is a finding too, and exit code 1)
        print(f"sparkdeep doctor: no session: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(report)  # noqa: T201
    return 0 if report.ok else 1


def _doctor(options: argparse.Namespace) -> Any:
    from sparkdeep.spark.doctor.doctor import doctor, open_session
    from sparkdeep.stages.coordinator import parse_ports

    parse_ports(options.coordinator_port)  # wrong arguments are told before a session starts
    session = _in_time(
        functools.partial(
            open_session,
            master=options.master,
            remote=options.remote,
            conf=dict(options.conf),
            properties_file=options.properties_file,
        ),
        options.start_timeout,
    )
    try:
        return doctor(
            session,
            num_workers=options.num_workers,
            cpus_per_worker=options.cpus_per_worker,
            gpus_per_worker=options.gpus_per_worker,
            coordinator_host=options.coordinator_host,
            coordinator_port=options.coordinator_port,
            timeout_s=options.timeout,
        )
    finally:
        with contextlib.suppress(Exception):  # the report counts, whatever becomes of the session
            session.stop()


def _in_time(start: Callable[[], Any], timeout_s: float) -> Any:
    """The session that `start` gives; called in a thread, since Spark itself may wait for a cluster for ever."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(start())
        except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits)
            outcome.set_exception(error)

    threading.Thread(target=run, name="sparkdeep-session", daemon=True).start()
    if not wait([outcome], timeout_s).done:
        raise TimeoutError(f"none started within {timeout_s:g} s (--start-timeout).")
    return outcome.result()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparkdeep", description="Train PyTorch networks on Apache Spark DataFrames.")
    command = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser(
        "doctor",
        help="look at a Spark session, and say what to change",
        description="Start a Spark session, look whether sparkdeep can train there, and say what to change. "
        "Exit code: 0 nothing fails, 1 something does, 2 wrong arguments.",
    )
    place = command.add_mutually_exclusive_group()
    place.add_argument("--master", help="such as local[2], spark://host:7077, yarn or k8s://https://host:6443")
    place.add_argument("--remote", help="a Spark Connect server, such as sc://host:15002")
    command.add_argument(
        "--conf", action="append", default=[], type=_pair, metavar="KEY=VALUE", help="a Spark property"
    )
    command.add_argument("--properties-file", metavar="FILE", help="Spark properties, such as conf/yarn.conf")
    command.add_argument("--num-workers", type=_count, help="replicas that must fit at the same time")
    command.add_argument("--cpus-per-worker", type=_count, help="as for TorchEstimator")
    command.add_argument("--gpus-per-worker", type=_count, help="as for TorchEstimator")
    command.add_argument("--coordinator-host", help="as for TorchEstimator")
    command.add_argument("--coordinator-port", help="as for TorchEstimator: a port, or a range 'a-b'")
    command.add_argument("--timeout", type=_seconds, default=30.0, metavar="SECONDS", help="of each small job; 30")
    command.add_argument(
        "--start-timeout", type=_seconds, default=_START_TIMEOUT_S, metavar="SECONDS", help="for the session; 300"
    )
    return parser


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: must be KEY=VALUE")
    return key.strip(), value.strip()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive number of seconds")
    return value

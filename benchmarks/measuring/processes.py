"""Plain processes for the contenders: started cheaply, asked together, with a deadline, killed at the end."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, final

import torch
import torch.distributed as dist
from speed_parts.namespaces import enter

__all__ = ["CONTEXT", "DEADLINE_S", "Processes", "gloo_group", "in_gloo", "together"]

DEADLINE_S: Final = 300.0

# One server imports torch, and every process is a fork of it: hundreds are started, and torch takes seconds to import,
# as does torch._dynamo, which the first optimizer imports.
CONTEXT: Final = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "sparkdeep.rounds.fit"])


@final
class Processes:
    """`count` processes that run `target(rank, connection, *arguments)`, one thread of torch each.

    Args:
        target: a module's function; it answers by `connection.send((False, answer))`.
        count: of processes.
        arguments: of every process.
        inside: the network namespace of each process, by rank; none by default.

    Raises (all methods):
        RuntimeError: a process failed; its traceback is in the message.
        TimeoutError: no answer in time.
    """

    def __init__(
        self, target: Callable[..., None], count: int, *arguments: Any, inside: Sequence[str] | None = None
    ) -> None:
        pipes = [CONTEXT.Pipe() for _ in range(count)]
        self._ends = [own for own, _ in pipes]
        self._processes = [
            # Not daemonic: a driver process among them starts replicas of its own.
            CONTEXT.Process(target=_run, args=(target, rank, pipes[rank][1], arguments, inside[rank] if inside else ""))
            for rank in range(count)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def answers(self, timeout_s: float = DEADLINE_S) -> list[Any]:
        """The next word of every process, in order of rank."""
        deadline = time.monotonic() + timeout_s
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"process {rank} has not answered within {timeout_s:g} s")
            try:
                failed, answer = end.recv()
            except EOFError:
                raise RuntimeError(f"process {rank} died without a word") from None
            if failed:
                raise RuntimeError(f"process {rank} failed:\n{answer}")
            answers.append(answer)
        return answers

    def ask(self, question: Any, timeout_s: float = DEADLINE_S) -> list[Any]:
        """Send `question` to every process, and give their answers."""
        for end in self._ends:
            end.send(question)
        return self.answers(timeout_s)

    def last_words(self) -> str:
        """What a process that failed said, or that it died; empty while all is well. For targets that answer nothing."""
        for rank, (end, process) in enumerate(zip(self._ends, self._processes, strict=True)):
            if not end.closed and end.poll(0.0):
                with contextlib.suppress(EOFError):
                    return f"process {rank} failed:\n{end.recv()[1]}"
            if process.exitcode not in {None, 0}:
                return f"process {rank} died with exit code {process.exitcode}"
        return ""

    def join(self, timeout_s: float) -> bool:
        """Wait for all to end; whether they did."""
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return all(process.exitcode is not None for process in self._processes)

    def kill(self) -> None:
        """End what still runs; idempotent."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10.0)
        for end in self._ends:
            end.close()


def _run(
    target: Callable[..., None], rank: int, connection: Connection, arguments: tuple[Any, ...], inside: str
) -> None:
    try:
        if inside:
            enter(inside)
        torch.set_num_threads(1)
        target(rank, connection, *arguments)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # whoever asked is gone
    except Exception:  # noqa: BLE001 (it is told to whoever asks)
        with contextlib.suppress(OSError):
            connection.send((True, traceback.format_exc()))


def together(target: Callable[..., Any], count: int, *arguments: Any, inside: Sequence[str] | None = None) -> list[Any]:
    """What `target(rank, *arguments)` returns in `count` processes that run at the same time."""
    processes = Processes(_once, count, target, arguments, inside=inside)
    try:
        return processes.answers()
    finally:
        processes.kill()


def _once(rank: int, connection: Connection, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send((False, target(rank, *arguments)))
    connection.recv()  # stays until it is killed: whoever leaves a process group first breaks it for the others


@contextlib.contextmanager
def in_gloo(rank: int, size: int, store: str) -> Iterator[None]:
    """Inside a gloo process group that meets in the file `store`."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=DEADLINE_S)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def gloo_group(size: int, numel: int) -> Iterator[Callable[[int], float]]:
    """Have `size` processes all_reduce (numel,) float32 with gloo; gives a function: how many times -> seconds for one."""
    with tempfile.TemporaryDirectory(prefix="sparkdeep-gloo-") as folder:
        processes = Processes(_reduce, size, size, str(Path(folder) / "store"), numel)
        try:
            processes.answers()
            yield lambda times: max(processes.ask(times))
        finally:
            processes.kill()


def _reduce(rank: int, connection: Connection, size: int, store: str, numel: int) -> None:
    vector = torch.zeros(numel)
    with in_gloo(rank, size, store):
        dist.all_reduce(vector)
        connection.send((False, 0.0))
        while True:
            times = connection.recv()
            dist.barrier()
            began = time.perf_counter()
            for _ in range(times):
                dist.all_reduce(vector)
            connection.send((False, (time.perf_counter() - began) / times))

"""A launcher whose replicas are processes of this machine, without Spark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from measuring.processes import Processes
from sparkdeep.errors import ReplicaLostError
from sparkdeep.protocol.messages import ShardFacts, Ticket
from sparkdeep.stages.staffing import RunningStage

__all__ = ["ProcessLauncher"]


@final
class ProcessLauncher:
    """Starts processes that run `target(number, connection, ticket, *arguments)`.

    Args:
        target: a module's function that dials the ticket's address and serves.
        num_replicas: processes.
        arguments: of every process.
        inside: the network namespace of each.
    """

    def __init__(
        self, target: Callable[..., None], num_replicas: int, *arguments: Any, inside: Sequence[str] | None = None
    ) -> None:
        self.num_replicas = num_replicas
        self._target = target
        self._arguments = arguments
        self._inside = inside

    def launch(self, ticket: Ticket, description: str) -> RunningStage:
        """Start them; each says hello."""
        del description
        return _Running(Processes(self._target, self.num_replicas, ticket, *self._arguments, inside=self._inside))

    def renew(self) -> None:
        """Nothing: shards are the caller's."""

    def slots(self) -> int | None:
        """Not known: processes need none."""
        return None

    def resize(self, num_replicas: int) -> Sequence[ShardFacts]:
        """Never asked for: no settings here allow it."""
        raise AssertionError(f"{num_replicas} replicas")


@final
class _Running:
    """A stage of such processes."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def failure(self) -> BaseException | None:
        """What a process died of, in its own words."""
        try:
            words = self._processes.last_words()
        except OSError as error:
            words = str(error)
        return ReplicaLostError(words) if words else None

    def finish(self, timeout_s: float) -> None:
        """Wait for them, then kill what is left."""
        self._processes.join(timeout_s)
        self._processes.kill()

    def cancel(self) -> None:
        """Kill them."""
        self._processes.kill()

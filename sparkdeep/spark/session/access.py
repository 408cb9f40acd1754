"""What differs between a classic Spark session and a Spark Connect one, behind one small interface.

Spark Connect has no SparkContext: no job groups, no status tracker, no count of slots, and it shows only those of
Spark's own settings that were set. What a session cannot tell is None here; callers must manage without it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol, final

from pyspark.sql import DataFrame, SparkSession

__all__ = ["CONNECT_CANNOT", "ENCRYPTED_CONNECTIONS", "ENCRYPTED_DISKS", "Access", "access_to", "is_connect"]


class Access(Protocol):
    """What a fit needs of its session besides DataFrames."""

    connect: bool

    @property
    def application(self) -> str:
        """Names the application, whose slots its fits share."""

    @property
    def session(self) -> str:
        """Names the session, with which broadcasts and artifacts end."""

    @property
    def master(self) -> str | None:
        """The master's URL, where it is known."""

    def conf(self, name: str, default: str | None = None) -> str | None:
        """One of Spark's settings; `default` where it is unset or unknown."""

    def start(self, work: Callable[[], None], *, tag: str, description: str) -> threading.Thread:
        """Run `work` in a thread in which jobs carry the caller's properties and the tag as well."""

    def cancel(self, tag: str) -> None:
        """Cancel the jobs of that tag."""

    def has_tasks(self, tag: str) -> bool | None:
        """Whether a job of that tag has a running task."""

    def starving(self) -> set[int]:
        """Stages that were submitted and have no slot; on Connect, whose client cannot know, none."""

    def slots(self, profile: Any) -> int | None:
        """Tasks that can run at the same time, whether busy or not."""

    def executors(self) -> int | None:
        """Executors that are up; on a local master the driver is one."""

    def batches(self, frame: DataFrame) -> list[Any]:
        """The rows as Arrow record batches."""

    def heap(self) -> int | None:
        """Bytes that the driver's JVM may use."""


def is_connect(spark: SparkSession) -> bool:
    """Whether the session is one of Spark Connect."""
    return "connect" in type(spark).__module__


def access_to(spark: SparkSession) -> Access:
    """How to ask a session."""
    return _Connect(spark) if is_connect(spark) else _Classic(spark)


@final
class _Classic:
    """A session with a SparkContext in this process."""

    connect = False

    def __init__(self, spark: SparkSession) -> None:
        self._spark = spark
        self._context = spark.sparkContext

    @property
    def application(self) -> str:
        return str(self._context.applicationId)

    @property
    def session(self) -> str:
        return self.application

    @property
    def master(self) -> str | None:
        return str(self._context.master)

    def conf(self, name: str, default: str | None = None) -> str | None:
        value: Any = self._spark.conf.get(name, None)  # what was set in the session, spark.conf.set(), counts first
        value = self._context.getConf().get(name, default) if value is None else value
        return None if value is None else str(value)

    def start(self, work: Callable[[], None], *, tag: str, description: str) -> threading.Thread:
        from pyspark import InheritableThread

        def run() -> None:
            self._context.addJobTag(tag)
            self._context.setJobDescription(description)
            work()

        # Inherits the caller's local properties (job group, scheduler pool) as a copy, so that what is set here stays here.
        thread = InheritableThread(target=run, name=f"sparkdeep-job-{tag}", daemon=True)
        thread.start()
        return thread

    def cancel(self, tag: str) -> None:
        self._context.cancelJobsWithTag(tag)

    def has_tasks(self, tag: str) -> bool | None:
        tracker = self._context.statusTracker()
        ids: Any = self._context._jsc.sc().statusTracker().getJobIdsForTag(tag)
        jobs = (tracker.getJobInfo(job) for job in ids)
        stages = {stage for job in jobs if job is not None for stage in job.stageIds}
        return any(tasks.stageId() in stages and tasks.runningTasks() > 0 for tasks in self._task_sets())

    def starving(self) -> set[int]:
        waiting = (tasks for tasks in self._task_sets() if not tasks.isZombie() and not tasks.runningTasks())
        return {int(tasks.stageId()) for tasks in waiting}

    def _task_sets(self) -> Iterator[Any]:
        """What the scheduler works at; a zombie is one that is over.

        The status tracker's count of running tasks may be the next heartbeat's, ten seconds late: Spark writes it down at most every
        100 ms, and what came in between only with a further event (3.5.9, 4.3.0; AppStatusListener.maybeUpdate).
        """
        scheduler: Any = self._context._jsc.sc().taskScheduler()
        queue = scheduler.rootPool().getSortedTaskSetQueue()
        return (queue.apply(place) for place in range(queue.size()))

    def slots(self, profile: Any) -> int | None:
        context: Any = self._context._jsc.sc()
        if profile is None:
            java_profile = context.resourceProfileManager().defaultResourceProfile()
        else:
            java_profile = profile._java_resource_profile
        return int(context.maxNumConcurrentTasks(java_profile))

    def executors(self) -> int | None:
        tracker: Any = self._context._jsc.sc().statusTracker()
        local = self._context.master == "local" or self._context.master.startswith("local[")
        # The driver counts as an executor, except on a local master, where it is the only one.
        return len(tracker.getExecutorInfos()) - (0 if local else 1)

    def batches(self, frame: DataFrame) -> list[Any]:
        if hasattr(frame, "toArrow"):
            return list(frame.toArrow().to_batches())
        return list(frame._collect_as_arrow())  # Spark 3.5

    def heap(self) -> int | None:
        runtime: Any = self._context._jvm.java.lang.Runtime
        return int(runtime.getRuntime().maxMemory())


@final
class _Connect:
    """A session of Spark Connect."""

    connect = True

    def __init__(self, spark: SparkSession) -> None:
        self._spark: Any = spark
        self._tasks: dict[str, int] = {}
        """Running tasks by tag, as the server last reported them."""

    @property
    def application(self) -> str:
        return self.conf("spark.app.id") or self.session

    @property
    def session(self) -> str:
        return str(self._spark.session_id)

    @property
    def master(self) -> str | None:
        return self.conf("spark.master")

    def conf(self, name: str, default: str | None = None) -> str | None:
        value = self._spark.conf.get(name, default)
        return None if value is None else str(value)

    def start(self, work: Callable[[], None], *, tag: str, description: str) -> threading.Thread:
        del description  # the server names its jobs itself
        inherited = list(self._spark.getTags())

        def run() -> None:
            for one in [*inherited, tag]:
                self._spark.addTag(one)
            own = threading.get_ident()

            def progress(**report: Any) -> None:
                if threading.get_ident() == own:  # handlers hear of every operation of the session
                    self._tasks[tag] = int(report["inflight_tasks"])

            if hasattr(self._spark, "registerProgressHandler"):  # since Spark 4
                self._spark.registerProgressHandler(progress)
            try:
                work()
            finally:
                self._tasks.pop(tag, None)
                with contextlib.suppress(
                    AttributeError, ValueError
                ):  # the session was stopped, and its handlers with it
                    self._spark.removeProgressHandler(progress)

        thread = threading.Thread(target=run, name=f"sparkdeep-job-{tag}", daemon=True)
        thread.start()
        return thread

    def cancel(self, tag: str) -> None:
        self._spark.interruptTag(tag)

    def has_tasks(self, tag: str) -> bool | None:
        running = self._tasks.get(tag)
        return None if running is None else running > 0

    def starving(self) -> set[int]:
        return set()

    def slots(self, profile: Any) -> int | None:
        del profile
        return None

    def executors(self) -> int | None:
        return None

    def batches(self, frame: DataFrame) -> list[Any]:
        return list(frame.toArrow().to_batches())

    def heap(self) -> int | None:
        return None


ENCRYPTED_DISKS: Final = "spark.io.encryption.enabled"
"""With it Spark encrypts what it writes to executors' disks; our own files there are not covered."""


ENCRYPTED_CONNECTIONS: Final = (
    "spark.ssl.enabled",
    "spark.ssl.rpc.enabled",
    "spark.network.crypto.enabled",
    "spark.authenticate.enableSaslEncryption",
)
"""Any of them says that Spark encrypts connections, so that ours have to be encrypted too."""


CONNECT_CANNOT: Final[Mapping[str, str]] = {
    "transport": "executors cannot dial the client",
    "deal": "it does not tell how many partitions a DataFrame has, on which petastorm datasets depend as well",
}
"""{setting: why a Spark Connect session cannot do it}."""

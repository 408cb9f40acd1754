"""The parts of transport="spark" that need no JVM: replies as Arrow, the watch, what fits, what is refused."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow as pa
import pytest

from sparkdeep.errors import ConfigError, PreflightError, ProtocolError, ReplicaLostError
from sparkdeep.optim.aggregators import Median
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.local_work import DyLU
from sparkdeep.protocol.orders import Inline, Reply
from sparkdeep.settings.run import RunSettings
from sparkdeep.spark.fit import transports
from sparkdeep.spark.fit.settings import FitSettings
from sparkdeep.spark.session import parcels
from sparkdeep.spark.session.access import CONNECT_CANNOT
from sparkdeep.spark.session.parcels import CLOSURE_LIMIT_BYTES, carried
from sparkdeep.spark.tasks import round_jobs
from sparkdeep.spark.tasks.replica_tasks import BarrierLauncher
from sparkdeep.spark.tasks.round_jobs import Load, RunnerSettings, SparkRunner, StatelessRunner
from sparkdeep.spark.tasks.round_tasks import _parts, read_replies


def reply(replica, *bodies):
    return Reply(header={"job": "j", "replica": replica}, bodies=bodies)


def sent(*replies, lines=()):
    return [batch for one in replies for batch in _parts(one.header["replica"], one, lines)]


def test_replies_come_back_whole_in_whatever_order_their_parts_do(monkeypatch):
    monkeypatch.setattr("sparkdeep.spark.tasks.round_tasks._PART_BYTES", 3)
    batches = sent(reply(1, b"abcdefgh", b"ij"), reply(0), lines=["said"])
    assert max(len(batch.column("data")[0].as_py() or b"") for batch in batches) == 3
    first, second = read_replies(batches[::-1])
    assert (first.body, second.body) == (b"", b"abcdefghij")
    assert second.header["lines"] == ["said"]


@pytest.mark.fault(rows=[21], phases="RT")
def test_a_reply_of_which_a_part_is_missing_or_damaged_voids_the_round():
    batches = sent(reply(0, b"abc", b"def"))
    with pytest.raises(ReplicaLostError, match="3 bytes of 6"):
        read_replies(batches[:-1])
    damaged = pa.RecordBatch.from_pydict({**batches[-1].to_pydict(), "data": [b"dez"]}, schema=batches[-1].schema)
    with pytest.raises(ReplicaLostError, match="checksum"):
        read_replies([*batches[:-1], damaged])
    with pytest.raises(ProtocolError, match="replied twice"):
        read_replies([*batches, *batches])


_WATCHED = """
import time
from sparkdeep.spark.tasks.round_tasks import _watched
with _watched(1.5, first_s=60.0) as beat:
    time.sleep(2.0)  # building may take longer than a batch
    for _ in range(4):
        time.sleep(0.1)
        beat()
    print("alive", flush=True)
time.sleep(2.0)
print("not watched", flush=True)
with _watched(1.5, first_s=60.0) as beat:
    beat()
    time.sleep(60)
"""


@pytest.mark.fault(rows=[10], phases="TR")
def test_a_process_that_gives_no_sign_of_life_ends_with_its_stack_and_one_that_ended_its_work_is_not_watched():
    # 60 s for its start; then 1.5 s of silence end it while it works, long before its sleep of 60 s is over.
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _WATCHED], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "alive\nnot watched\n")
    assert "Timeout" in done.stderr
    assert time.monotonic() - began < 40


class Access:
    """A session that can tell what it is told."""

    def __init__(self, *, connect, conf=None, heap=None):
        self.connect, self.session, self._conf, self._heap = connect, "s", conf or {}, heap

    def heap(self):
        return self._heap

    def conf(self, name, default=None):
        return self._conf.get(name, default)


def runner(monkeypatch, *, connect, conf=None, exchange=None, taken=0, heap=None, kind=SparkRunner):
    monkeypatch.setattr(round_jobs, "access_to", lambda _: Access(connect=connect, conf=conf, heap=heap))
    monkeypatch.setattr(round_jobs, "carrier_for", lambda *_: None)
    monkeypatch.setattr(round_jobs, "artifact_bytes", lambda _: taken)
    settings = RunnerSettings(
        run="r",
        num_replicas=4,
        shard_dir=None,
        exchange=exchange,
        open_timeout_s=1.0,
        stall_timeout_s=1.0,
        profile=None,
    )
    return kind(None, None, settings=settings)


def load(megabytes, *, rounds=5, wide=False, durable=False, fixed=0):
    return Load(
        start_bytes=int(megabytes * 1e6), fixed_bytes=int(fixed * 1e6), rounds=rounds, wide=wide, durable=durable
    )


@pytest.mark.fault(rows=[31], phases="PF")
def test_what_the_driver_takes_back_is_held_against_its_limit(monkeypatch):
    one_gib = runner(monkeypatch, connect=False)
    one_gib.check(load(220))
    with pytest.raises(PreflightError, match=r"1440 MB to the driver.*allows 1074 MB.*exchange_dir"):
        one_gib.check(load(300))
    runner(monkeypatch, connect=False, exchange="/x").check(load(800))
    with pytest.raises(PreflightError, match=r"1920 MB to the driver"):
        runner(monkeypatch, connect=False, exchange="/x").check(load(800, wide=True))
    runner(monkeypatch, connect=False, conf={"spark.driver.maxResultSize": "0"}).check(load(9000))


def test_what_the_driver_takes_back_is_held_against_its_heap(monkeypatch):
    runner(monkeypatch, connect=False, heap=2 << 30).check(load(220))
    with pytest.raises(
        PreflightError,
        match=r"1056 MB through the driver's JVM.*heap is 1074 MB.*spark.driver.memory to at least 2526m",
    ):
        runner(monkeypatch, connect=False, heap=1 << 30).check(load(220))


def test_where_no_state_is_kept_the_remedy_is_fewer_tasks(monkeypatch):
    def stateless(**session):
        return runner(monkeypatch, kind=StatelessRunner, **session)

    stateless(connect=False).check(load(220))
    with pytest.raises(PreflightError, match=r"portions=4: .* 1440 MB .*allows 1074 MB.*fewer portions="):
        stateless(connect=False).check(load(300))
    with pytest.raises(PreflightError, match=r"portions=4: .* 2112 MB .*JVM has 1074 MB"):
        stateless(connect=False, heap=1 << 30).check(load(220))
    stateless(connect=True).check(load(4.0, rounds=1000, durable=False))
    with pytest.raises(PreflightError, match=r"portions= on Spark Connect: 5.0 MB .*classic session"):
        stateless(connect=True).check(load(5.0))


@pytest.mark.parametrize(
    ("asked", "taken", "fits"),
    [
        (load(4.0, rounds=1000), 0, True),  # in the closure
        (load(5.0, rounds=12), 0, True),  # 13 times 5 MB
        (load(5.0, rounds=13), 0, False),
        (load(5.0, rounds=11, fixed=6), 0, True),
        (load(5.0, rounds=12, fixed=6), 0, False),
        (load(5.0, rounds=6), 30_000_000, True),
        (load(5.0, rounds=6), 35_000_000, False),
        (load(5.0, rounds=1, durable=True), 0, False),
        (load(4.0, rounds=1000, durable=True), 0, True),
    ],
)
@pytest.mark.fault(rows=[31], phases="PF")
def test_artifacts_of_a_connect_session_are_counted_before_anything_trains(monkeypatch, asked, taken, fits):
    client = runner(monkeypatch, connect=True, taken=taken)
    if fits:
        client.check(asked)
    else:
        with pytest.raises(PreflightError, match=r"holds at most 67 MB.*exchange_dir"):
            client.check(asked)
    runner(monkeypatch, connect=True, taken=taken, exchange="/x").check(asked)


def settings(**options):
    return FitSettings.of(
        {"model": object, "optimizer": object, "loss": object, "feature_cols": "x", "label_cols": "y", **options}
    )


@pytest.mark.parametrize(
    ("asked", "connect", "taken"), [("auto", False, "socket"), ("auto", True, "spark"), ("spark", False, "spark")]
)
def test_the_transport_goes_by_the_session(monkeypatch, asked, connect, taken):
    monkeypatch.setattr(transports, "is_connect", lambda _: connect)
    assert transports.chosen(settings(transport=asked), None) == taken


def test_what_a_session_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(transports, "is_connect", lambda _: True)
    with pytest.raises(PreflightError, match="cannot dial"):
        transports.chosen(settings(transport="socket"), None)
    with pytest.raises(PreflightError, match="deal='partitions'"):
        transports.chosen(settings(deal="partitions"), None)
    with pytest.raises(ConfigError, match=r"rounds_per_stage=2.*own"):
        transports.chosen(settings(rounds_per_stage=2), None)
    assert transports.chosen(settings(rounds_per_stage=1), None) == "spark"
    with pytest.raises(ConfigError, match="transport='udp'"):
        settings(transport="udp")
    for folder in ("/mnt/x", "s3://bucket/x"):
        settings(exchange_dir=folder)
    with pytest.raises(ConfigError, match="absolute path"):
        settings(exchange_dir="x")


ONLY_THE_DRIVER = {
    "quorum": 1,
    "on_nonfinite": "drop",
    "time_budget_s": 1.0,
    "weighting": "equal",
    "schedule": DyLU(),
    "work": "gradient",
    "asynchronous": Asynchronous(n_fetch=1, n_push=1),
    "aggregator": Median(),
}


def test_tables_name_settings_that_are_asked_for_and_everything_that_only_the_driver_can_do():
    asked = RunSettings(**ONLY_THE_DRIVER).closing
    assert {written.partition("=")[0] for written in asked} == set(ONLY_THE_DRIVER) <= set(SparkRunner.CANNOT)
    known = {*transports._ALL_CAN, *ONLY_THE_DRIVER, "replay"}
    for table in (BarrierLauncher.CANNOT, SparkRunner.CANNOT, StatelessRunner.CANNOT, CONNECT_CANNOT):
        assert set(table) <= known
    plain = settings()
    for name, can in transports._ALL_CAN.items():
        assert (vars(plain) | vars(plain.local) | vars(plain.run))[name] in can, "a default is refused nowhere"


class Client:
    """A Spark Connect session that takes artifacts."""

    def __init__(self):
        self.session_id, self.files = f"{id(self)}", {}

    def addArtifacts(self, path, file):
        assert file
        with open(path, "rb") as content:
            self.files[path.rpartition("/")[2]] = content.read()


Client.__module__ = "pyspark.sql.connect.session"


def test_a_model_is_carried_by_its_size(monkeypatch):
    import dataclasses

    @dataclasses.dataclass
    class Scorer:
        uid: str
        tensors: bytes

    client = Client()
    small = carried(client, Scorer("a", b"1"))
    assert (small.value.uid, small.value.tensors, client.files) == ("a", b"1", {})
    data = bytes(CLOSURE_LIMIT_BYTES + 1)
    large = carried(client, Scorer("b", data))
    assert [len(content) for content in client.files.values()] == [len(data)]
    assert parcels.artifact_bytes(client) == len(data)
    assert large.scorer.tensors == b""
    (name,) = client.files
    assert large.tensors.name == name
    for _ in range(14):
        carried(client, Scorer("c", data))
    with pytest.raises(PreflightError, match="score on a classic session"):
        carried(client, Scorer("d", bytes(2 * len(data))))
    context = SimpleNamespace(broadcast=lambda value: ("broadcast", value.uid))
    assert carried(SimpleNamespace(sparkContext=context), Scorer("e", data)) == ("broadcast", "e")


@pytest.mark.fault(rows=[38], phases="TR")
def test_the_same_bytes_are_shipped_once(monkeypatch):
    made, destroyed = [], []

    def broadcast(value):
        made.append(len(value))
        return SimpleNamespace(value=value, destroy=lambda: destroyed.append(len(value)))

    carrier = parcels.carrier_for(SimpleNamespace(sparkContext=SimpleNamespace(broadcast=broadcast)), "r", None, None)
    assert isinstance(carrier.ship("start", b"small"), Inline)
    data = bytes(2 << 20)
    first = carrier.ship("start", data)
    assert carrier.ship("start", bytes(data)) is first
    carrier.ship("start", data + b"1")
    assert (made, destroyed) == ([2 << 20, (2 << 20) + 1], [2 << 20])
    carrier.close()
    assert destroyed == [2 << 20, (2 << 20) + 1]


def test_a_clean_up_task_does_not_wait_for_torch():
    # In a new worker, after others were killed, the import would take longer than all else that the task does.
    program = "import sys; import {}; print('torch' in sys.modules)"

    def imports_torch(module):
        done = subprocess.run(
            [sys.executable, "-c", program.format(module)], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert imports_torch("sparkdeep.spark.tasks.cleaning") == "False"
    assert imports_torch("sparkdeep.spark.tasks.replica_tasks") == "True"

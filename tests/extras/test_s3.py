"""Checkpoints in S3: moto's server on a loopback address, spoken to over HTTP as any other."""

from __future__ import annotations

import errno
import socket
import threading
import warnings
from functools import partial

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from pyarrow import fs as pafs
from store_contract import StoreContract
from torch import nn
from torch.optim import AdamW
from twin import deal, flat, local_coordinator, make_fit, schema_of
from twin_faults import marked_table

from sparkdeep.errors import CheckpointError, ConfigError, FencedError
from sparkdeep.models.program import Program
from sparkdeep.storage import s3
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.opening import ArrowStore, open_store
from sparkdeep.storage.s3 import S3Store

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SECRET = "hunter2"


@pytest.fixture(scope="session")
def server():
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, request):
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    client(server).create_bucket(Bucket=name)
    return name


@pytest.fixture(autouse=True)
def _one_attempt(monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def client(server):
    return boto3.session.Session().client(
        "s3", endpoint_url=f"http://{server}", region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )


def uri(bucket, server, folder="run folder/é"):
    return f"s3://key:{SECRET}@{bucket}/{folder}?scheme=http&endpoint_override={server}&region=us-east-1"


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, bucket, server):
        return open_store(uri(bucket, server))


class TestS3StoreAtTheBucketsRoot(StoreContract):
    @pytest.fixture
    def store(self, bucket, server):
        return open_store(uri(bucket, server, ""))


def test_s3_is_opened_over_boto3_and_is_conditional_and_nothing_secret_is_shown(bucket, server):
    store = open_store(uri(bucket, server))
    assert isinstance(store, S3Store)
    assert store.conditional
    assert store.uri == f"s3://***@{bucket}/run folder/é"
    assert SECRET not in repr(vars(store))


def test_without_boto3_pyarrow_opens_it(bucket, server, monkeypatch):
    monkeypatch.setattr("sparkdeep.storage.opening.boto3_at_hand", lambda: False)
    store = open_store(uri(bucket, server, "run"))
    assert isinstance(store, ArrowStore)
    assert not store.conditional
    store.write("a", b"x")
    assert client(server).get_object(Bucket=bucket, Key="run/a")["Body"].read() == b"x"


def test_what_pyarrow_wrote_is_read_and_its_markers_of_folders_are_not_listed(bucket, server):
    arrow = pafs.S3FileSystem(
        access_key="k", secret_key="s", endpoint_override=server, scheme="http", region="us-east-1"
    )
    arrow.create_dir(f"{bucket}/run/rounds")
    with arrow.open_output_stream(f"{bucket}/run/rounds/a") as stream:
        stream.write(b"x")
    store = open_store(uri(bucket, server, "run"))
    assert store.list("") == ["rounds/a"]
    store.delete("rounds")
    assert store.list("") == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (f"s3://key:{SECRET}@/run", "names no bucket"),
        (
            f"s3://key:{SECRET}@b/run?regoin=x",
            r"has the options \['regoin'\]; known: region, scheme, endpoint_override",
        ),
        (f"s3://key:{SECRET}@b/run?endpoint_override=not a host", "cannot be opened"),
    ],
)
def test_a_uri_that_cannot_be_meant_is_refused_without_its_secret(given, said):
    with pytest.raises(ConfigError, match=said) as raised:
        open_store(given)
    assert SECRET not in str(raised.value)


def test_a_bucket_that_is_not_there_and_a_server_that_is_not_there_are_errors_without_secrets(server):
    gone = open_store(uri("no-such-bucket", server))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = open_store(uri("b", f"127.0.0.1:{unused.getsockname()[1]}"))
        for store, said in ((gone, "NoSuchBucket"), (dead, "EndpointConnectionError")):
            for call in (
                partial(store.write, "a", b""),
                partial(store.create, "a", b""),
                partial(store.read, "a"),
                partial(store.list, ""),
                partial(store.delete, "a"),
            ):
                with pytest.raises(OSError, match=said) as raised:
                    call()
                assert raised.value.errno == errno.EIO
                assert SECRET not in str(raised.value)
                assert SECRET not in repr(raised.value.__cause__)


def test_a_large_object_goes_in_parts_and_a_folder_of_many_is_deleted(bucket, server, monkeypatch):
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3, "_DELETED_AT_ONCE", 3)
    store = open_store(uri(bucket, server))
    data = bytes(range(256)) * (45_000)  # 11.5 MB: three parts
    store.write("folder/large", memoryview(data))
    assert store.read("folder/large") == data
    head = client(server).head_object(Bucket=bucket, Key="run folder/é/folder/large")
    assert head["ETag"].strip('"').endswith("-3")
    for number in range(7):
        store.write(f"folder/{number}", b"")
    store.write("folders", b"")
    store.delete("folder")
    assert store.list("") == ["folders"]


class Answering:
    """A client whose conditional puts are answered by a list of (done, code)."""

    def __init__(self, real, answers):
        self._real, self._answers, self.exceptions = real, answers, real.exceptions
        self.asked = 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def put_object(self, **given):
        if "IfNoneMatch" not in given:
            return self._real.put_object(**given)
        self.asked += 1
        done, code = self._answers.pop(0)
        if done:
            self._real.put_object(**given)
        if code:
            raise self.exceptions.ClientError({"Error": {"Code": code, "Message": "injected"}}, "PutObject")
        return None


def answering(bucket, server, *answers):
    return S3Store(Answering(client(server), list(answers)), bucket, "run", uri=f"s3://{bucket}/run")


def test_a_put_that_is_repeated_after_a_lost_answer_counts_as_ours(bucket, server):
    store = answering(bucket, server, (True, "PreconditionFailed"))
    assert store.create("a", b"ours") is True
    assert answering(bucket, server, (False, "PreconditionFailed")).create("a", b"mine") is False
    assert answering(bucket, server, (False, "PreconditionFailed")).create("a", b"more than ours") is False


def test_a_conflict_is_tried_again_and_given_up_at_some_time(bucket, server):
    conflict = (False, "ConditionalRequestConflict")
    assert answering(bucket, server, conflict, conflict, (True, "")).create("a", b"x") is True
    with pytest.raises(OSError, match="ConditionalRequestConflict"):
        answering(bucket, server, *[conflict] * 5).create("b", b"x")


def test_of_a_store_without_conditional_puts_create_looks_and_writes_and_says_so(bucket, server):
    store = answering(bucket, server, (False, "NotImplemented"))
    assert store.conditional
    assert store.create("a", b"1") is True
    assert not store.conditional
    assert store.create("a", b"2") is False
    assert store.read("a") == b"1"


def test_denied_is_a_lack_of_permission(bucket, server):
    store = answering(bucket, server, (False, "AccessDenied"))
    with pytest.raises(PermissionError, match="AccessDenied") as raised:
        store.create("a", b"1")
    assert raised.value.errno == errno.EACCES


# --- checkpoints


def directory(bucket, server, **options):
    return CheckpointDirectory(open_store(uri(bucket, server)), identity={"run": 1}, **options)


def save(checkpoints, *rounds, by=b"x"):
    for number in rounds:
        checkpoints.save(number, {"model": b"%d by %s" % (number, by) * 100, "empty": b""}, {"round": number})


def test_of_two_drivers_the_later_goes_on_and_the_earlier_is_fenced(bucket, server):
    first = directory(bucket, server, keep=2)
    assert first.begin() is None
    save(first, 0, 1, 2)
    second = directory(bucket, server, keep=2)
    assert second.begin().round_number == 2
    before = open_store(uri(bucket, server)).list("")
    with pytest.raises(FencedError, match="is now written by process"):
        save(first, 3)
    assert open_store(uri(bucket, server)).list("") == before
    save(second, 3, by=b"second")
    assert directory(bucket, server).rounds() == [2, 3]
    assert directory(bucket, server).latest().files["model"] == b"3 by second" * 100
    assert open_store(uri(bucket, server)).list("leases") == ["leases/000002.json"]


def test_a_driver_that_slips_in_between_look_and_commit_does_not_count(bucket, server):
    first, second = directory(bucket, server), directory(bucket, server)
    save(first, 1)
    create = first._store.create

    def slow(name, data):
        second.begin()
        return create(name, data)

    first._store.create = slow
    with pytest.raises(FencedError):
        save(first, 2, by=b"first")
    assert directory(bucket, server).rounds() == [1]
    save(second, 2, by=b"second")
    assert directory(bucket, server).latest().files["model"] == b"2 by second" * 100


def go(tmp_path, checkpoints, *, stop_after=None):
    x, y = marked_table([12, 8])
    torch.manual_seed(3)
    program = Program(
        model=nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1)),
        loss=nn.MSELoss(),
        optimizer=partial(AdamW, lr=0.01),
    )
    coordinator = local_coordinator()
    try:
        fit = make_fit(
            tmp_path,
            program,
            deal(x, y, [12, 8]),
            schema_of(x, y),
            coordinator=coordinator,
            checkpoints=checkpoints,
            replica_state="durable",
            checkpoint_every=1,
            epochs=1,
            batch_size=4,
            sync_every=1,
        )
        rounds = fit.rounds()
        for record in rounds:
            if record.round == stop_after:
                break
        rounds.close()
        fit.load_result()
        return flat(program.model), fit
    finally:
        coordinator.close()


def test_a_fit_that_is_stopped_goes_on_from_s3_to_the_same_bits(tmp_path, bucket, server):
    expected, _ = go(tmp_path, None)
    go(tmp_path, directory(bucket, server), stop_after=2)
    values, fit = go(tmp_path, directory(bucket, server))
    assert fit.resumed_from == 2
    assert torch.equal(values, expected)


class Line:
    """A line to the server that goes dead once so many bytes were sent over it; then nobody answers any more."""

    def __init__(self, server):
        host, port = server.split(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.left = 1 << 40
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.left <= 0:
                near.close()
                continue
            far = socket.create_connection(self._server, timeout=10)
            self._open += [near, far]
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source, sink, counted):
        try:
            while data := source.recv(256 if counted else 1 << 16):
                if counted:
                    data, self.left = data[: max(0, self.left)], self.left - len(data)
                if self.left <= 0:
                    sink.sendall(data)
                    break
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink) if self.left > 0 else self._open:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self):
        self._listener.close()
        self.left = 0
        for each in self._open:
            each.close()


def test_a_server_that_dies_in_the_middle_of_a_save_leaves_the_old_round_or_the_new_one(bucket, server):
    save(directory(bucket, server, keep=2), 1)
    measure = Line(server)
    checkpoints = directory(bucket, measure.address, keep=2)
    checkpoints.begin()
    begun = measure.left
    save(checkpoints, 2)
    whole = begun - measure.left
    measure.close()
    outcomes, failures, last = set(), [], 2
    cuts = [whole * step // 24 for step in range(1, 25)]
    for cut in cuts:
        line = Line(server)
        checkpoints = directory(bucket, line.address, keep=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "checkpoint of round .* is damaged")
            assert checkpoints.begin().round_number == last
        line.left = cut
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "round .* is committed, but older rounds")
                save(checkpoints, last + 1)
            outcome = "saved"
        except CheckpointError as error:
            outcome = "failed"
            failures.append(str(error))
        line.close()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = directory(bucket, server).latest()
        # moto keeps what came of a body that was cut off, which S3 does not: where it was the commit, that is noticed.
        assert [f"round {last + 1} " in str(w.message) and "is damaged" in str(w.message) for w in caught] in (
            [],
            [True],
        )
        assert not (caught and outcome == "saved")
        assert loaded.files["model"] == b"%d by x" % loaded.round_number * 100
        assert loaded.round_number in ({last, last + 1} if outcome == "failed" else {last + 1})
        outcomes.add((outcome, loaded.round_number - last))
        last = loaded.round_number
    assert len(failures) > len(cuts) // 2
    assert all("could not be written" in message and SECRET not in message for message in failures)
    assert {("failed", 0), ("saved", 1)} <= outcomes

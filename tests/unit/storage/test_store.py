import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pyarrow import fs as pafs
from store_contract import StoreContract

from sparkdeep.errors import ConfigError
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.opening import ArrowStore, open_store


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return LocalStore(tmp_path / "new folder" / "é")


class TestArrowStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return ArrowStore(pafs.LocalFileSystem(), f"{tmp_path}/new folder/é", uri=f"file://{tmp_path}")


class WholePuts:
    """A stand-in for an object store's file system: a put needs no folder, and nothing may be moved."""

    type_name = "s3"

    def __init__(self):
        self._fs = pafs.LocalFileSystem()

    def __getattr__(self, name):
        assert name not in {"move", "create_dir"}
        return getattr(self._fs, name)

    def open_output_stream(self, path, **options):
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        return self._fs.open_output_stream(path, **options)


class TestArrowStoreOfObjects(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return ArrowStore(WholePuts(), f"{tmp_path}/bucket/run", uri="s3://bucket/run")


def test_local_files_are_private(tmp_path):
    store = LocalStore(tmp_path / "run")
    old = os.umask(0)
    try:
        store.write("rounds/1/model", b"x")
        store.create("commits/1", b"x")
    finally:
        os.umask(old)
    for folder, _, files in os.walk(tmp_path / "run"):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for file in files:
            assert stat.S_IMODE(os.stat(Path(folder) / file).st_mode) == 0o600


@pytest.mark.parametrize("operation", ["read", "write", "create", "list"])
def test_a_link_below_the_folder_is_not_followed(tmp_path, operation):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store = LocalStore(tmp_path / "run")
    store.write("a", b"")
    (tmp_path / "run" / "link").symlink_to(outside)
    (tmp_path / "run" / "file").symlink_to(outside / "secret")
    call = {
        "read": lambda name: store.read(name),
        "write": lambda name: store.write(name, b"x"),
        "create": lambda name: store.create(name, b"x"),
        "list": lambda name: store.list(name),
    }[operation]
    for name in ("link/secret", "file"):
        with pytest.raises(OSError) as raised:
            call(name)
        assert raised.value.errno == errno.ELOOP
    assert (outside / "secret").read_bytes() == b"secret"
    assert store.list("") == ["a"]


def test_delete_removes_a_link_and_not_what_it_names(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"x")
    store = LocalStore(tmp_path / "run")
    store.write("r/a", b"")
    (tmp_path / "run" / "link").symlink_to(outside)
    (tmp_path / "run" / "r" / "link").symlink_to(outside)
    store.delete("link")
    store.delete("r")
    assert (outside / "kept").exists()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_link_to_the_folder_itself_is_the_users_business(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    LocalStore(tmp_path / "run").write("a", b"x")
    assert (tmp_path / "real" / "a").read_bytes() == b"x"


class Fault:
    """Makes the k-th call among the named functions of `os` fail (before or after it took effect)."""

    def __init__(self, monkeypatch, names, at, *, after=False):
        self.calls = 0
        for name in names:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name), at, after))

    def _wrap(self, function, at, after):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == at and not after:
                raise OSError(errno.EIO, "injected")
            result = function(*args, **kwargs)
            if self.calls == at and after:
                raise OSError(errno.EIO, "injected")
            return result

        return call


PRIMITIVES = ["fsync", "rename", "link"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 12))
def test_a_failed_primitive_leaves_the_old_or_the_new_file(tmp_path, monkeypatch, at, after):
    store = LocalStore(tmp_path)
    store.write("a", b"old")
    with monkeypatch.context() as patch:
        fault = Fault(patch, PRIMITIVES, at, after=after)
        failed = False
        try:
            store.write("a", b"new!")
            store.create("sub/b", b"made")
        except OSError:
            failed = True
    assert failed == (fault.calls >= at)
    assert failed == (at <= 7)  # write: file, rename, folder; create: new folder's parent, file, link, folder
    assert store.read("a") in {b"old", b"new!"}
    if failed and at <= 2 and not after:
        assert store.read("a") == b"old"
    assert all(store.read(name) == b"made" for name in store.list("sub"))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_write_syncs_the_file_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    trace = []
    real = {name: getattr(os, name) for name in PRIMITIVES}

    def fsync(descriptor):
        trace.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "link"):
        monkeypatch.setattr(
            os, name, lambda *args, _name=name, **kwargs: (trace.append(_name), real[_name](*args, **kwargs))
        )
    store = LocalStore(tmp_path)
    store.write("a", b"x")
    assert trace == ["sync file", "rename", "sync folder"]
    trace.clear()
    store.create("b", b"x")
    assert trace == ["sync file", "link", "sync folder"]


@pytest.mark.fault(rows=[22], phases="CK")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from sparkdeep.storage.opening import LocalStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "store = LocalStore(sys.argv[1])\n"
        "store.write('a', b'old')\n"
        "try: store.write('a', b'n' * 5000)\n"
        "except OSError as exc: print(exc.errno, store.read('a'), store.list(''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"{errno.EFBIG} b'old' ['a']", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_many_creators_one_wins(tmp_path):
    store = LocalStore(tmp_path)
    start = threading.Barrier(8)
    won = []

    def race(number):
        for attempt in range(20):
            start.wait(timeout=30)
            if store.create(f"c/{attempt}", str(number).encode()):
                won.append((attempt, number))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(attempt for attempt, _ in won) == list(range(20))
    assert all(store.read(f"c/{attempt}") == str(number).encode() for attempt, number in won)


def test_without_hard_links_create_checks_and_renames_and_says_so(tmp_path, monkeypatch):
    def no_links(*_args, **_kwargs):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    store = LocalStore(tmp_path)
    assert store.conditional
    assert store.create("a", b"1") is True
    assert store.create("a", b"2") is False
    assert store.read("a") == b"1"
    assert not store.conditional
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_repeated_link_request_that_had_succeeded_counts_as_ours(tmp_path, monkeypatch):
    real = os.link

    def twice(*args, **kwargs):
        real(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, "file exists")

    monkeypatch.setattr(os, "link", twice)
    assert LocalStore(tmp_path).create("a", b"1") is True


def test_where_folders_cannot_be_synced_a_write_still_succeeds(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "cannot sync a folder")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    LocalStore(tmp_path).write("a", b"1")
    assert LocalStore(tmp_path).read("a") == b"1"


@pytest.mark.parametrize(
    "uri",
    ["{path}/a b", "file:{path}/a b", "file://{path}/a%20b", "file://localhost{path}/a b", "FILE:///{path}/a b"],
)
def test_local_folders_are_opened_however_they_are_spelled(tmp_path, uri):
    store = open_store(uri.format(path=tmp_path))
    assert isinstance(store, LocalStore)
    store.write("x", b"1")
    assert (tmp_path / "a b" / "x").read_bytes() == b"1"


def test_mounted_paths_are_local():
    for uri in ("/dbfs/tmp/run", "/Volumes/main/default/run", "runs/digits"):
        assert isinstance(open_store(uri), LocalStore)


def test_opening_makes_nothing(tmp_path):
    open_store(f"{tmp_path}/new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("uri", ["s3a://bucket/run", "dbfs:/run", "wasbs://c@a.blob.core.windows.net/run", "runs:1"])
def test_what_pyarrow_refuses_goes_to_the_fallback_or_is_refused_with_the_remedy(uri):
    asked = []
    marker = LocalStore("/nowhere")
    assert open_store(uri, fallback=lambda given: asked.append(given) or marker) is marker
    assert asked == [uri]
    with pytest.raises(ConfigError, match=r"cannot be opened: pyarrow says .*use a local path.*or do it from Spark"):
        open_store(uri)


def test_a_password_in_a_uri_is_not_shown():
    with pytest.raises(ConfigError) as raised:
        open_store("s3a://key:hunter2@bucket/run")
    assert "hunter2" not in str(raised.value)
    assert raised.value.__suppress_context__  # nor in the traceback
    store = ArrowStore(pafs.LocalFileSystem(), "/tmp", uri="s3://key:hunter2@bucket/run")
    assert store.uri == "s3://***@bucket/run"


@pytest.mark.parametrize("uri", ["", "a\0b", "file://host/a", "file:a"])
def test_what_names_no_folder_is_refused(uri):
    with pytest.raises(ConfigError, match=r"names no local folder|is no folder"):
        open_store(uri)


def test_a_failed_arrow_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    store = ArrowStore(pafs.LocalFileSystem(), str(tmp_path), uri="x")
    store.write("a", b"old")
    real = ArrowStore._put

    def torn(self, path, data):
        real(self, path, data[:1])
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(ArrowStore, "_put", torn)
    with pytest.raises(OSError, match="injected"):
        store.write("a", b"new")
    assert store.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not store.conditional

import errno

import pytest
from store_contract import StoreContract

from sparkdeep.errors import ConfigError
from sparkdeep.spark.session import hadoop
from sparkdeep.spark.session.hadoop import HadoopStore
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.opening import open_store

pytestmark = pytest.mark.spark


class TestHadoopStore(StoreContract):
    @pytest.fixture
    def store(self, spark, tmp_path, monkeypatch):
        monkeypatch.setattr(hadoop, "CHUNK_BYTES", 1000)  # so that small files take several messages
        return HadoopStore(spark, f"file:{tmp_path}/new folder/é")


def test_large_files_pass_in_chunks(spark, tmp_path):
    data = bytes(range(256)) * (70_000)  # 17.9 MB, more than two chunks
    store = HadoopStore(spark, f"file:{tmp_path}")
    store.write("large", data)
    assert (tmp_path / "large").read_bytes() == data
    assert store.read("large") == data


def test_a_failed_write_leaves_the_old_file_and_nothing_else(spark, tmp_path, monkeypatch):
    store = HadoopStore(spark, f"file:{tmp_path}")
    store.write("a", b"old")
    real = HadoopStore._put

    def torn(self, path, data, *, overwrite):
        real(self, path, data[:1], overwrite=overwrite)
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(HadoopStore, "_put", torn)
    with pytest.raises(OSError, match="injected"):
        store.write("a", b"new")
    assert store.read("a") == b"old"
    assert {path.name for path in tmp_path.iterdir()} <= {"a", ".a.crc"}


@pytest.mark.parametrize("method", ["write", "create"])
def test_a_file_cut_short_is_removed(spark, tmp_path, monkeypatch, method):
    store = HadoopStore(spark, f"file:{tmp_path}")
    monkeypatch.setattr(hadoop, "CHUNK_BYTES", 0)  # fails after the file was begun
    with pytest.raises(ValueError, match="must not be zero"):
        getattr(store, method)("a", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_local_disk_through_hadoop_is_not_conditional(spark, tmp_path):
    assert HadoopStore(spark, f"file:{tmp_path}").conditional is False


def test_checkpoints_work_over_it(spark, tmp_path):
    for last in range(1, 4):
        store = open_store(f"no-such-scheme:{tmp_path}", fallback=lambda _: HadoopStore(spark, f"file:{tmp_path}"))
        checkpoints = CheckpointDirectory(store, identity={"a": 1}, keep=2)
        assert (checkpoints.latest() is None) == (last == 1)
        checkpoints.save(last, {"model": bytes([last]) * 10}, {"round": last})
    loaded = CheckpointDirectory(LocalStore(tmp_path), identity={"a": 1}).latest()
    assert loaded.round_number == 3
    assert dict(loaded.files) == {"model": b"\3" * 10}
    assert checkpoints.rounds() == [2, 3]


def test_an_unknown_scheme_says_what_to_add(spark):
    with pytest.raises(
        ConfigError, match=r"'nosuch://\*\*\*@b/x' cannot be opened by Spark: .*add the file system's"
    ) as raised:
        HadoopStore(spark, "nosuch://user:hunter2@b/x")
    assert "hunter2" not in str(raised.value)


def test_a_session_without_a_jvm_is_refused():
    class Remote:
        _jvm = None

    with pytest.raises(ConfigError, match=r"\(Spark Connect\) has no JVM at hand; use a path that pyarrow opens"):
        HadoopStore(Remote(), "s3a://b/x")

"""What every Store promises, run by each implementation's tests."""

import errno
import random

import pytest

from sparkdeep.errors import ConfigError
from sparkdeep.storage.store import Store

CLIMBING = ["", ".", "..", "/etc/passwd", "a/../b", "a//b", "a/", "a\\b", "a\0b", ".tmp-x", "a/.tmp-x/b", "./a"]


class StoreContract:
    """Subclasses give a fixture `store`: empty, in a folder that does not exist yet."""

    def test_what_was_written_is_read_back(self, store: Store):
        data = random.Random(0).randbytes(100_003)
        for kind in (bytes, bytearray, memoryview):
            store.write("deep/er/name.bin", kind(data))
            assert store.read("deep/er/name.bin") == data

    def test_the_empty_file_exists(self, store: Store):
        store.write("empty", b"")
        assert store.read("empty") == b""
        assert store.list("") == ["empty"]

    def test_write_replaces(self, store: Store):
        store.write("a", b"long old content")
        store.write("a", b"new")
        assert store.read("a") == b"new"
        assert store.list("") == ["a"]

    def test_create_is_only_if_absent(self, store: Store):
        assert store.create("commits/1.json", b"first") is True
        assert store.create("commits/1.json", b"second") is False
        assert store.read("commits/1.json") == b"first"
        assert store.list("commits") == ["commits/1.json"]

    def test_an_absent_file_is_file_not_found(self, store: Store):
        with pytest.raises(FileNotFoundError):
            store.read("nothing")
        store.write("folder/file", b"x")
        with pytest.raises(FileNotFoundError):
            store.read("folder")

    def test_a_longer_file_than_expected_is_refused(self, store: Store):
        store.write("a", b"12345")
        assert store.read("a", max_bytes=5) == b"12345"
        with pytest.raises(OSError, match="5 bytes where at most 4 were expected") as raised:
            store.read("a", max_bytes=4)
        assert raised.value.errno == errno.EFBIG

    def test_list_is_sorted_recursive_and_by_folder(self, store: Store):
        for name in ["b/2", "b/1", "b/c/3", "bb/4", "a"]:
            store.write(name, b"")
        assert store.list("b") == ["b/1", "b/2", "b/c/3"]
        assert store.list("") == ["a", "b/1", "b/2", "b/c/3", "bb/4"]

    def test_list_of_nothing_is_empty(self, store: Store):
        assert store.list("") == []
        assert store.list("absent") == []

    def test_delete_takes_a_file_or_a_folder_and_nothing_beside_it(self, store: Store):
        for name in ["r/1.a/x", "r/1.a/y/z", "r/1.ab/x", "r/1"]:
            store.write(name, b"")
        store.delete("r/1.a")
        assert store.list("") == ["r/1", "r/1.ab/x"]
        store.delete("r/1")
        assert store.list("") == ["r/1.ab/x"]
        store.delete("r/1")
        store.delete("absent/as/well")

    @pytest.mark.parametrize("name", CLIMBING)
    def test_names_that_leave_the_folder_are_refused(self, store: Store, name: str):
        for call in (
            lambda: store.write(name, b""),
            lambda: store.create(name, b""),
            lambda: store.read(name),
            lambda: store.delete(name),
        ):
            with pytest.raises(ConfigError, match="is no name in a store"):
                call()
        if name:
            with pytest.raises(ConfigError, match="is no name in a store"):
                store.list(name)

    def test_names_with_spaces_and_accents(self, store: Store):
        store.write("a b/é %20#?.bin", b"x")
        assert store.list("") == ["a b/é %20#?.bin"]
        assert store.read("a b/é %20#?.bin") == b"x"

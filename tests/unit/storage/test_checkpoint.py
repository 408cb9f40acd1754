import hashlib
import json
import os
import random
import re
import warnings
from pathlib import Path

import pytest

from sparkdeep.errors import CheckpointError, ConfigError
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.manifest import MAX_FILE_BYTES, MAX_MANIFEST_BYTES, encode

IDENTITY = {"model": "Net", "replicas": 2, "seed": 0}


def files_of(round_number):
    content = random.Random(round_number)
    return {"model.safetensors": content.randbytes(700), "replicas/0.bin": content.randbytes(300), "empty": b""}


def state_of(round_number):
    return {"round": round_number, "losses": [0.1 * r for r in range(round_number % 1000)], "best": float("inf")}


def directory(store, **options):
    return CheckpointDirectory(store, identity=IDENTITY, **options)


def save(checkpoints, *rounds):
    for round_number in rounds:
        checkpoints.save(round_number, files_of(round_number), state_of(round_number))


def assert_is_round(loaded, round_number):
    assert loaded.round_number == round_number
    assert loaded.state == state_of(round_number)
    assert dict(loaded.files) == files_of(round_number)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "run")


def test_nothing_committed_is_none(store):
    assert directory(store).latest() is None
    store.write("rounds/000001.0000000000000000/model", b"uncommitted")
    assert directory(store).latest() is None


def test_the_newest_round_comes_back_whole(store):
    save(directory(store), 0, 1, 2)
    loaded = directory(store).latest()
    assert_is_round(loaded, 2)
    assert loaded.skipped == ()
    assert "nothing" not in loaded.files
    with pytest.raises(KeyError):
        loaded.files["nothing"]


def test_rounds_past_six_digits_stay_in_order(store):
    save(directory(store), 999_998, 999_999, 1_000_000, 1_000_001)
    assert directory(store).rounds() == [999_999, 1_000_000, 1_000_001]
    assert_is_round(directory(store).latest(), 1_000_001)


def test_the_manifest_is_json_that_says_what_it_is(store):
    save(directory(store), 3)
    commit = json.loads(store.read("commits/000003.000001.json"))["manifest"]
    assert commit["format_version"] == 2
    assert commit["epoch"] == 1
    assert commit["round"] == 3
    assert commit["identity"] == IDENTITY
    model = files_of(3)["model.safetensors"]
    assert commit["files"]["model.safetensors"] == {"bytes": 700, "sha256": hashlib.sha256(model).hexdigest()}
    assert set(commit["versions"]) == {"python", "torch", "sparkdeep"}
    assert re.match(r"\d{4}-\d\d-\d\dT", commit["created"])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_saved(store, kind):
    directory(store).save(1, {"a": kind(b"content")}, {})
    assert directory(store).latest().files["a"] == b"content"


# --- retention


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_the_newest_keep_rounds_stay_and_the_folders_of_others_go(store, keep):
    checkpoints = directory(store, keep=keep)
    for last in range(1, 8):
        save(checkpoints, last)
        expected = list(range(max(1, last - keep + 1), last + 1))
        assert checkpoints.rounds() == expected
        kept = {name.split("/")[1].split(".")[0] for name in store.list("rounds")}
        assert kept == {f"{number:06d}" for number in expected}


def test_what_this_run_did_not_write_is_not_deleted(store):
    CheckpointDirectory(store, identity={"model": "Other"}).save(1, {"a": b"other"}, {})
    strangers = [
        "rounds/000002.ffffffffffffffff/left",
        "notes.txt",
        "commits/README",
        "commits/7.json",
        "leases/7.json",
    ]
    for name in strangers:
        store.write(name, b"mine")
    before = [name for name in store.list("") if not name.startswith("leases/")]
    save(directory(store, keep=1), 2, 3, 4)
    after = store.list("")
    assert set(before) <= set(after)
    assert directory(store).rounds() == [1, 4]


def test_a_failed_removal_warns_and_the_next_save_tries_again(store, monkeypatch):
    checkpoints = directory(store, keep=1)
    save(checkpoints, 1)
    real = LocalStore.delete

    def refuse(self, prefix):
        if prefix.startswith("rounds/"):
            raise OSError(5, "injected")
        real(self, prefix)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", refuse)
        with pytest.warns(RuntimeWarning, match=r"round 2 is committed, but older rounds .*injected.*will grow"):
            save(checkpoints, 2)
    assert len({name.split("/")[1] for name in store.list("rounds")}) == 2
    save(checkpoints, 3)
    assert len({name.split("/")[1] for name in store.list("rounds")}) == 1


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_nothing_is_refused(store, keep):
    with pytest.raises(ConfigError, match=f"keep={keep}, but at least one round"):
        directory(store, keep=keep)


# --- crashes


@pytest.fixture
def unsynced(monkeypatch):
    """These crashes are of the process, which the page cache outlives."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


class Crash(BaseException):
    pass


class CrashingStore:
    """Dies at the k-th changing operation: before it, after it, or half-way through a write to a plain name."""

    conditional = True

    def __init__(self, store, at, moment):
        self.store, self.at, self.moment, self.calls = store, at, moment, 0
        self.uri = store.uri

    def _call(self, function, name, *data):
        self.calls += 1
        if self.calls > self.at:
            raise Crash  # a dead process does nothing more
        if self.calls < self.at:
            return function(name, *data)
        if self.moment == "after":
            function(name, *data)
        if self.moment == "half" and data:
            self.store.write(name, data[0][: len(data[0]) // 2])
        if self.moment == "half" and not data:
            for file in self.store.list(name)[:1]:
                self.store.delete(file)
        raise Crash

    def write(self, name, data):
        return self._call(self.store.write, name, data)

    def create(self, name, data):
        return self._call(self.store.create, name, data)

    def delete(self, prefix):
        return self._call(self.store.delete, prefix)

    def read(self, name, *, max_bytes=None):
        return self.store.read(name, max_bytes=max_bytes)

    def list(self, prefix):
        return self.store.list(prefix)


@pytest.mark.parametrize("moment", ["before", "half", "after"])
@pytest.mark.fault(rows=[23], phases="CK,CM")
def test_a_crash_at_any_operation_leaves_old_or_new_and_the_run_goes_on(tmp_path, moment, unsynced, record_property):
    outcomes = []
    for at in range(1, 50):
        store = LocalStore(tmp_path / f"{moment}-{at}")
        save(directory(store, keep=2), 1, 2)
        crashing = CrashingStore(store, at, moment)
        try:
            checkpoints = directory(crashing, keep=2)
            checkpoints.begin()
            save(checkpoints, 3)
        except Crash:
            pass
        else:
            break
        resumed = directory(store, keep=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = resumed.begin()
        # A store whose create() and write() are not whole may leave a lease or commit cut: it must be noticed.
        # Nothing else may warn.
        assert bool(caught) == (moment == "half" and at in {1, 2, 6})
        assert_is_round(loaded, loaded.round_number)
        outcomes.append(loaded.round_number)
        save(resumed, *range(loaded.round_number + 1, 6))
        assert_is_round(directory(store).latest(), 5)
        assert directory(store).rounds() == [4, 5]
        assert len(store.list("leases")) == 1
        assert (
            len({name.split("/")[1] for name in store.list("rounds")}) <= 3
        )  # a crash may leave one that is not named
    record_property("crash points: operations of a store", len(outcomes))
    # The lease, and where it starts; three files, the commit; then the removal of round 1's commit, the old lease and
    # round 1's folder.
    assert outcomes == ([2] * 5 + [3] * 4 if moment == "after" else [2] * 6 + [3] * 3)


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_crash_while_starting_over_leaves_the_old_rounds_or_none(tmp_path, moment, unsynced):
    outcomes = []
    for at in range(1, 50):
        store = LocalStore(tmp_path / f"{moment}-{at}")
        save(directory(store), 1, 2)
        try:
            directory(CrashingStore(store, at, moment)).discard()
        except Crash:
            pass
        else:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a lease that is cut, as above
            loaded = directory(store).begin()
        outcomes.append(None if loaded is None else loaded.round_number)
        fresh = directory(store)
        fresh.discard()
        save(fresh, 0)
        assert_is_round(directory(store).latest(), 0)
        assert store.list("commits") == [f"commits/000000.{fresh._lease.epoch:06d}.json"]
    # The lease; where it starts, which makes all rounds void at once; then two commits and two folders are removed.
    assert outcomes == ([2] + [None] * 5 if moment == "after" else [2, 2] + [None] * 4)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.fault(rows=[22], phases="CK")
def test_a_failed_system_call_at_any_place_leaves_old_or_new(tmp_path, monkeypatch, after, record_property):
    seen = set()
    for at in range(1, 90):
        store = LocalStore(tmp_path / f"{after}-{at}")
        save(directory(store, keep=1), 1)
        calls = 0

        def failing(real, at=at):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == at and not after:
                    raise OSError(28, "no space left")
                result = real(*args, **kwargs)
                if calls == at:
                    raise OSError(28, "no space left")
                return result

            return call

        outcome = "saved"
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in ("fsync", "rename", "link", "unlink", "rmdir"):
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                save(directory(store, keep=1), 2)
            except CheckpointError as exc:
                outcome, message = "failed", str(exc)
        loaded = directory(store).latest()
        assert_is_round(loaded, loaded.round_number)
        if outcome == "saved":
            assert loaded.round_number == 2
        else:
            assert not caught
            assert re.search("(round 2 could not be written|could not be taken over).*no space left", message)
        seen.add((outcome, loaded.round_number, bool(caught)))
        if calls < at:
            break
    else:
        pytest.fail("the last call was never reached")
    record_property("crash points: system calls that fail", at - 1)
    # Failed with the old round there, failed on the last sync of the commit, saved but not tidied, and saved.
    assert seen == {("failed", 1, False), ("failed", 2, False), ("saved", 2, True), ("saved", 2, False)}


def test_a_failed_write_leaves_nothing_behind(store, monkeypatch):
    checkpoints = directory(store)
    save(checkpoints, 1)
    before = store.list("")
    real = LocalStore.write

    def full(self, name, data):
        if name.endswith("replicas/0.bin"):
            raise OSError(28, "no space left")
        real(self, name, data)

    monkeypatch.setattr(LocalStore, "write", full)
    with pytest.raises(CheckpointError, match=r"round 2 could not be written to .*no space left.*the run resumes"):
        save(checkpoints, 2)
    assert store.list("") == before


# --- damage


def paths_of(store):
    return [Path(store.uri) / name for name in store.list("")]


@pytest.mark.fault(rows=[24], phases="RS")
def test_a_changed_byte_anywhere_is_detected(store):
    save(directory(store), 1)
    store_2 = LocalStore(f"{store.uri}-2")
    save(directory(store_2), 1)
    changes = random.Random(0)
    checked = 0
    for path in paths_of(store):
        content = path.read_bytes()
        if not content or path.parent.name == "leases":
            continue
        for _ in range(150):
            place, bits = changes.randrange(len(content)), changes.randrange(1, 256)
            path.write_bytes(content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
            with (
                pytest.warns(RuntimeWarning, match="checkpoint of round 1 in .* is damaged"),
                pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact"),
            ):
                directory(store).latest()
            checked += 1
        path.write_bytes(content)
    assert checked == 450
    assert_is_round(directory(store).latest(), 1)


@pytest.mark.parametrize(
    ("part", "harm"),
    [
        (part, harm)
        for part in ("commits/000002.000001.json", "model.safetensors", "replicas/0.bin", "empty")
        for harm in ("cut", "longer", "missing", "folder", "link")
        if (part, harm) != ("empty", "cut")
    ],
)
@pytest.mark.fault(rows=[24], phases="RS")
def test_a_damaged_file_is_named_and_the_round_before_is_used(store, tmp_path, part, harm):
    save(directory(store), 1, 2)
    (path,) = [path for path in paths_of(store) if f"/{path}".endswith(f"/{part}") and "000002" in str(path)]
    content = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[:-1])
    elif harm == "longer":
        path.write_bytes(content + b"\0")
    elif harm == "folder":
        path.mkdir()
    elif harm == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    if part.startswith("commits") and harm in {"missing", "folder", "link"}:
        assert_is_round(directory(store).latest(), 1)  # no commit: never happened
        return
    with pytest.warns(RuntimeWarning, match=f"round 2 .* is damaged .*{'' if 'commits' in part else part}"):
        loaded = directory(store).latest()
    assert_is_round(loaded, 1)
    assert len(loaded.skipped) == 1
    assert loaded.skipped[0].startswith("commits/000002.000001.json: ")


@pytest.mark.parametrize("part", ["commits", "rounds"])
def test_a_damaged_round_can_be_committed_anew(store, part):
    save(directory(store), 1, 2, 3)
    for path in paths_of(store):
        if re.search(rf"{part}/00000[23]", str(path)) and path.stat().st_size:
            path.write_bytes(path.read_bytes()[:-1])
    resumed = directory(store, keep=1)
    with pytest.warns(RuntimeWarning):
        loaded = resumed.latest()
    assert_is_round(loaded, 1)
    assert len(loaded.skipped) == 2
    save(resumed, 2)
    assert_is_round(directory(store).latest(), 2)  # round 3 is void since round 2 was taken up again
    save(resumed, 3)
    assert_is_round(directory(store).latest(), 3)
    assert directory(store).rounds() == [3]


def test_a_damaged_round_does_not_count_among_those_kept(store):
    save(directory(store), 1, 2, 3)
    store.write("commits/000003.000001.json", b"garbage")
    resumed = directory(store, keep=2)
    with pytest.warns(RuntimeWarning, match="round 3"):
        resumed.latest()
    save(resumed, 5)
    store.write("commits/000005.000002.json", b"garbage")
    with pytest.warns(RuntimeWarning, match="round 5"):
        assert_is_round(directory(store).latest(), 2)
    assert not [name for name in store.list("commits") if "000003" in name]


def test_a_file_that_changes_after_it_was_verified_is_refused(store):
    save(directory(store), 1)
    loaded = directory(store).latest()
    (path,) = [path for path in paths_of(store) if path.name == "model.safetensors"]
    path.write_bytes(b"x" * 700)
    with pytest.raises(CheckpointError, match="changed or went away after it was verified"):
        loaded.files["model.safetensors"]


def test_a_store_that_cannot_be_read_is_not_taken_for_damage(store, monkeypatch):
    save(directory(store), 1, 2)

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(LocalStore, "read", refuse)
    with pytest.raises(CheckpointError, match=r"could not be read: .*denied"):
        directory(store).latest()


# --- manifests made to do harm


def forged(store, **changes):
    """Commit round 2 by hand, with a digest that fits."""
    prefix = "rounds/000002.0123456789abcdef"
    store.write(f"{prefix}/a", b"x")
    body = {
        "format_version": 2,
        "round": 2,
        "epoch": 1,
        "prefix": prefix,
        "files": {"a": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}},
        "state": {},
        "identity": IDENTITY,
    }
    store.write("commits/000002.000001.json", encode({**body, **changes}))


ENTRY = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../../secret": ENTRY}},
        {"files": {"/etc/passwd": ENTRY}},
        {"files": {"a/../../../secret": ENTRY}},
        {"files": {"a\\b": ENTRY}},
        {"files": {"a": {**ENTRY, "bytes": 2**62}}},
        {"files": {"a": {**ENTRY, "bytes": MAX_FILE_BYTES + 1}}},
        {"files": {"a": {**ENTRY, "bytes": 10**12}}},
        {"files": {"a": {**ENTRY, "bytes": -1}}},
        {"files": {"a": {**ENTRY, "bytes": True}}},
        {"files": {"a": {**ENTRY, "bytes": "1"}}},
        {"files": {"a": {**ENTRY, "bytes": 1.0}}},
        {"files": {"a": {**ENTRY, "sha256": "00"}}},
        {"files": {"a": {**ENTRY, "sha256": None}}},
        {"files": {"a": {"bytes": 1}}},
        {"files": {"a": []}},
        {"files": ["a"]},
        {"files": None},
        {"prefix": "rounds/../.."},
        {"prefix": "rounds/000001.0123456789abcdef"},
        {"prefix": "/tmp"},
        {"prefix": 7},
        {"round": 3},
        {"round": "2"},
        {"epoch": 2},
        {"epoch": None},
        {"state": []},
        {"identity": "Net"},
    ],
)
@pytest.mark.fault(rows=[26], phases="RS")
def test_a_forged_manifest_is_refused(store, changes):
    (Path(store.uri).parent / "secret").write_bytes(b"x")
    save(directory(store), 1)
    forged(store)
    assert directory(store).latest().round_number == 2  # the forgery is good but for the change
    forged(store, **changes)
    with pytest.warns(RuntimeWarning, match="round 2 .* is damaged"):
        assert_is_round(directory(store).latest(), 1)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"null", b"\x80\x04K\x01.", b"[" * 100_000, b'{"sha256":"' + b"0" * 200]
)
def test_what_is_no_manifest_is_refused(store, content):
    save(directory(store), 1)
    store.write("commits/000002.000001.json", content)
    with pytest.warns(RuntimeWarning, match="round 2 .* is damaged"):
        assert_is_round(directory(store).latest(), 1)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[1]", b"{'a': 1}", b'{"a": ' + b"9" * 10_000 + b"}", b"\xff"])
def test_a_fitting_digest_does_not_make_a_manifest(store, text):
    save(directory(store), 1)
    digest = hashlib.sha256(text).hexdigest().encode()
    store.write("commits/000002.000001.json", b'{"sha256":"' + digest + b'","manifest":' + text + b"}\n")
    with pytest.warns(RuntimeWarning, match="round 2 .* is damaged"):
        assert_is_round(directory(store).latest(), 1)


@pytest.mark.fault(rows=[26], phases="RS")
def test_a_huge_manifest_is_not_read(store):
    save(directory(store), 1)
    path = Path(store.uri) / "commits/000002.000001.json"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: it would not fit into memory
    with pytest.warns(RuntimeWarning, match=f"1099511627776 bytes where at most {MAX_MANIFEST_BYTES} were expected"):
        assert_is_round(directory(store).latest(), 1)


@pytest.mark.fault(rows=[26], phases="RS")
def test_a_file_beyond_the_bound_is_not_read_though_its_manifest_fits(store):
    save(directory(store), 1)
    forged(store, files={"a": {**ENTRY, "bytes": MAX_FILE_BYTES + 1}})
    os.truncate(Path(store.uri) / "rounds/000002.0123456789abcdef/a", MAX_FILE_BYTES + 1)  # a hole
    with pytest.warns(RuntimeWarning, match=f"the entry of 'a' is .* it must have bytes from 0 to {MAX_FILE_BYTES}"):
        assert_is_round(directory(store).latest(), 1)


# --- whose checkpoint it is


@pytest.mark.fault(rows=[25], phases="RS")
def test_another_runs_checkpoint_is_refused_with_what_differs(store):
    theirs = {"model": {"name": "Net", "layers": [1, 2]}, "seed": 0, "replicas": 2, "old": True}
    CheckpointDirectory(store, identity=theirs).save(1, {}, {})
    ours = {"model": {"name": "Net", "layers": (1, 3)}, "seed": 0, "replicas": 4, "new": None}
    with pytest.raises(CheckpointError) as raised:
        CheckpointDirectory(store, identity=ours).latest()
    message = str(raised.value)
    assert (
        "model.layers: [1, 2] vs. [1, 3]; new: (absent) vs. null; old: true vs. (absent); replicas: 2 vs. 4" in message
    )
    assert "seed" not in message
    assert "another checkpoint_dir, or resume=False" in message


def test_identity_is_compared_as_json(store):
    CheckpointDirectory(store, identity={"a": (1, 2), "b": float("nan")}).save(1, {}, {})
    assert CheckpointDirectory(store, identity={"b": float("nan"), "a": [1, 2]}).latest().round_number == 1
    for other in ({"a": [1, 2.0], "b": float("nan")}, {"a": [True, 2], "b": float("nan")}):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            CheckpointDirectory(store, identity=other).latest()


def test_another_format_is_refused_and_not_passed_over(store):
    save(directory(store), 1)
    forged(store, format_version=3, versions={"sparkdeep": "9.0"})
    with pytest.raises(CheckpointError, match=r"round 2 has format 3; .* reads format 2.*9\.0"):
        directory(store).latest()


def test_a_folder_of_the_format_without_leases_is_refused(store):
    store.write("commits/000007.json", encode({"format_version": 1, "versions": {"sparkdeep": "0.1"}}))
    for refused in (directory(store).latest, directory(store).begin):
        with pytest.raises(CheckpointError, match=r"round 7 has format 1; .* reads format 2.*0\.1"):
            refused()
    directory(store).discard()
    assert directory(store).begin() is None


def test_discard_forgets_every_round_and_then_the_folder_can_be_used_anew(store):
    CheckpointDirectory(store, identity={"model": "Other"}).save(1, {"a": b""}, {})
    save(directory(store), 2, 3)
    store.write("commits/000004.000001.json", b"garbage")
    store.write("notes.txt", b"mine")
    fresh = directory(store)
    fresh.discard()
    assert [name for name in store.list("") if not name.startswith("leases/")] == ["notes.txt"]
    assert fresh.latest() is None
    save(fresh, 0, 1)
    assert_is_round(directory(store).latest(), 1)
    assert len(store.list("leases")) == 1


# --- what cannot be stored


@pytest.mark.parametrize("state", [{"a": object()}, {"a": {1, 2}}, {"a": b"x"}])
def test_a_state_that_is_not_json_is_refused_by_key(store, state):
    with pytest.raises(ConfigError, match=r"state\['a'\] is \w+, which JSON cannot hold"):
        directory(store).save(1, {}, state)
    assert store.list("") == []


def test_an_identity_that_is_not_json_is_refused_by_key(store):
    with pytest.raises(ConfigError, match=r"identity\['loss'\] is type, which JSON cannot hold"):
        CheckpointDirectory(store, identity={"loss": dict})


def test_file_names_are_checked_before_anything_is_written(store):
    with pytest.raises(ConfigError, match="is no name in a store"):
        directory(store).save(1, {"good": b"x", "../bad": b"x"}, {})
    assert store.list("") == []


def test_a_negative_round_is_refused(store):
    with pytest.raises(ConfigError, match="round -1 cannot be committed"):
        save(directory(store), -1)


def test_a_round_that_the_same_driver_finds_damaged_is_committed_anew(store):
    own = directory(store)
    own.begin()
    save(own, 1, 2)
    name = next(name for name in store.list("rounds") if name.startswith("rounds/000002"))
    store.write(name, b"damaged")
    with pytest.warns(RuntimeWarning, match="round 2 .* is damaged"):
        assert own.latest().round_number == 1
    save(own, 2)
    assert_is_round(directory(store).latest(), 2)

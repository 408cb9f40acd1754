"""Two drivers on one folder: the later one goes on, the earlier is stopped, and nothing of theirs mixes."""

import os
import random
import threading
import warnings
from pathlib import Path

import pytest

from sparkdeep.errors import CheckpointError, FencedError
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.lease import Fences, Lease, epochs, newest_lease, state_start, take_lease
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.manifest import DamagedError, encode

IDENTITY = {"run": 1}


def directory(store, **options):
    return CheckpointDirectory(store, identity=IDENTITY, **options)


def save(checkpoints, *rounds, by=b""):
    for number in rounds:
        checkpoints.save(number, {"model": b"%d by %s" % (number, by)}, {})


def model(loaded):
    return loaded.files["model"]


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "run")


class Stalling:
    """A store of one driver that stops just before, or just after, its n-th call of a method; it is another's turn."""

    def __init__(self, store, method, name, meanwhile, *, after=False, conditional=True):
        self.store, self.uri, self.conditional = store, store.uri, conditional
        self._stall = (method, name)
        self._meanwhile, self._after = meanwhile, after
        self.stalled = 0

    def __getattr__(self, method):
        real = getattr(self.store, method)

        def call(name, *args, **kwargs):
            here = (method, name.split("/")[0]) == self._stall and not self.stalled
            if here and not self._after:
                self.stalled += 1
                self._meanwhile()
            if here and method == "create" and not self.conditional and not self._after:
                # The look at whether the name is free was before the pause, the write comes after it.
                self.store.write(name, *args)
                return True
            result = real(name, *args, **kwargs)
            if here and self._after:
                self.stalled += 1
                self._meanwhile()
            return result

        return call


def test_an_epoch_is_taken_once_and_says_by_whom(store):
    first = take_lease(store, least=0)
    second = take_lease(store, least=0)
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.owner != second.owner
    assert newest_lease(store) == second
    assert second.pid == os.getpid()
    assert take_lease(store, least=10).epoch == 11


def test_fences_say_what_is_void_and_forget_what_they_need_not_know():
    fences = Fences().and_then(2, 5).and_then(3, 5).and_then(4, 8)
    assert fences.takeovers == ((3, 5), (4, 8))
    assert [fences.void(1, r) for r in (5, 6)] == [False, True]
    assert [fences.void(3, r) for r in (8, 9)] == [False, True]
    assert not fences.void(4, 99)
    assert fences.and_then(5, -1).takeovers == ((5, -1),)


@pytest.mark.parametrize("seed", range(20))
def test_compacted_fences_agree_with_the_whole_history(seed):
    chance = random.Random(seed)
    history = [(epoch, chance.randrange(-1, 9)) for epoch in range(1, 12)]
    fences = Fences()
    for epoch, after in history:
        fences = fences.and_then(epoch, after)
    for epoch in range(12):
        for number in range(10):
            expected = any(epoch < taker and number > after for taker, after in history)
            assert fences.void(epoch, number) == expected


@pytest.mark.parametrize(
    "change", [{"epoch": 2}, {"after": "1"}, {"after": True}, {"takeovers": [[1]]}, {"takeovers": None}, {"pid": None}]
)
def test_a_forged_lease_is_damaged(store, change):
    body = {"format_version": 1, "epoch": 1, "after": 3, "takeovers": [[1, 2]], "owner": "x", "host": "h", "pid": 7}
    assert Lease.from_bytes(encode({**body, "since": "now"}), 1).fences.takeovers == ((1, 2),)
    with pytest.raises(DamagedError):
        Lease.from_bytes(encode({**body, "since": "now", **change}), 1)


def test_a_lease_of_another_format_is_refused(store):
    store.write("leases/000001.json", encode({"format_version": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this sparkdeep reads format 1"):
        directory(store).begin()


@pytest.mark.fault(rows=[17], phases="CK,CM")
def test_the_later_driver_goes_on_and_the_earlier_is_stopped_at_its_next_save(store):
    first = directory(store)
    assert first.begin() is None
    save(first, 0, 1, by=b"first")
    second = directory(store)
    assert model(second.begin()) == b"1 by first"
    before = store.list("")
    with pytest.raises(FencedError, match=rf"is now written by process {os.getpid()} on .*, which took over at 20.*"):
        save(first, 2, by=b"first")
    with pytest.raises(FencedError):
        first.latest()
    assert store.list("") == before
    save(second, 2, 3, by=b"second")
    with pytest.raises(FencedError):
        save(first, 4, by=b"first")
    assert model(directory(store).latest()) == b"3 by second"
    assert epochs(store) == [2]


def test_a_folder_of_another_run_is_refused_and_its_writer_left_alone(store):
    first = directory(store)
    save(first, 0)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        CheckpointDirectory(store, identity={"run": 2}).begin()
    save(first, 1)
    assert epochs(store) == [1]


@pytest.mark.fault(rows=[17], phases="CK,CM")
@pytest.mark.parametrize(
    ("method", "name", "after", "counts"),
    [
        ("write", "rounds", False, False),  # before its files
        ("create", "commits", False, False),  # between the look at the leases and the commit
        (
            "create",
            "commits",
            True,
            True,
        ),  # between the commit and the look that follows: the other one goes on from it
    ],
)
def test_an_earlier_driver_that_stalls_at_any_place_never_mixes_with_the_later(store, method, name, after, counts):
    second = directory(store)

    def take_over():
        loaded = second.begin()
        assert loaded.round_number == (2 if counts else 1)

    stalling = Stalling(store, method, name, take_over, after=after)
    first = directory(stalling)
    save(directory(store), 1, by=b"before")
    first.begin()
    with pytest.raises(FencedError):
        save(first, 2, by=b"first")
    assert stalling.stalled == 1
    assert directory(store).rounds() == ([1, 2] if counts else [1])
    if not counts:
        assert not [name for name in store.list("rounds") if b"first" in store.read(name)]
        save(second, 2, by=b"second")
    save(second, 3, by=b"second")
    assert model(directory(store).latest()) == b"3 by second"
    models = {1: b"before", 2: b"first" if counts else b"second", 3: b"second"}
    found = {store.read(name) for name in store.list("rounds")}
    assert found == {b"%d by %s" % pair for pair in models.items()}


def test_what_a_dead_earlier_driver_left_behind_after_a_takeover_does_not_count_and_is_removed(store):
    """It slipped in between the look and the commit, and died before it could take that back."""

    class Died(BaseException):
        pass

    second = directory(store)
    stalling = Stalling(store, "create", "commits", second.begin)
    first = directory(stalling)
    real = stalling.store.delete

    def die(_prefix):
        raise Died

    store.delete = die
    with pytest.raises(Died):
        save(first, 5, by=b"first")
    store.delete = real
    assert store.list("commits") == ["commits/000005.000001.json"]
    assert directory(store).latest() is None  # it is void: the second driver went on from nothing
    save(second, 1, by=b"second")
    assert store.list("commits") == ["commits/000001.000002.json"]
    assert {store.read(name) for name in store.list("rounds")} == {b"1 by second"}


def test_a_round_that_is_void_stays_void_when_its_lease_is_long_gone(store):
    save(directory(store), 1, 2)
    stale = {name: store.read(name) for name in store.list("") if "000002" in name}
    second = directory(store, keep=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointDirectory, "_load", lambda self, key, skipped: _only_round_1(self, key))
        with pytest.warns(RuntimeWarning):
            second.begin()
    save(second, 2, by=b"second")
    for _ in range(3):
        later = directory(store, keep=1)
        later.begin()
        save(later, later._newest + 1, by=b"later")
    assert epochs(store) == [5]
    for name, data in stale.items():
        store.write(name, data)
    assert 2 not in directory(store).rounds()


def _only_round_1(self, key):
    if key[0] == 2:
        raise DamagedError("injected")
    return _load(self, key, [])


_load = CheckpointDirectory._load


def test_a_driver_that_died_while_it_took_over_changes_nothing(store):
    save(directory(store), 1, 2)
    take_lease(store, least=0)  # it has not said where it goes on
    assert directory(store).rounds() == [1, 2]
    Path(store.uri, "leases/000002.json").write_bytes(b'{"sha256":"')
    third = directory(store)
    with pytest.warns(RuntimeWarning, match=r"lease leases/000002.json .* is damaged .* the one before it is believed"):
        assert third.begin().round_number == 2
    save(third, 3)
    assert epochs(store) == [3]


def test_epochs_never_go_back_though_every_lease_is_lost(store):
    first = directory(store)
    save(first, 1)
    second = directory(store)
    second.begin()
    save(second, 2)
    store.delete("leases")
    third = directory(store)
    third.begin()
    assert epochs(store) == [3]
    with pytest.raises(FencedError):
        save(second, 3)


def test_starting_over_fences_the_driver_before(store):
    first = directory(store)
    save(first, 1, 2)
    second = directory(store)
    second.discard()
    with pytest.raises(FencedError):
        save(first, 3)
    assert directory(store).latest() is None
    save(second, 0)
    assert directory(store).rounds() == [0]


@pytest.mark.fault(rows=[17], phases="CK,CM")
def test_many_drivers_at_once_end_with_one_that_may_write(store):
    save(directory(store), 0, by=b"start")
    start = threading.Barrier(6)
    fenced, saved, failures = [], [], []

    def drive(number):
        checkpoints = directory(store)
        try:
            start.wait(timeout=30)
            loaded = checkpoints.begin()
            for further in range(1, 5):
                save(checkpoints, loaded.round_number + further, by=b"%d" % number)
                saved.append((number, loaded.round_number + further))
        except FencedError:
            fenced.append(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    winner = newest_lease(store)
    rounds = directory(store, keep=9).rounds()
    assert rounds == list(range(rounds[0], rounds[-1] + 1))  # no gap
    loaded = directory(store).latest()
    (last,) = {number for number in range(6) if number not in fenced}
    assert model(loaded) == b"%d by %d" % (loaded.round_number, last)
    assert f"{winner.epoch:06d}" in store.list("commits")[-1]


# --- a store without an atomic create


class TwoSteps:
    """A stand-in for stores whose `create` looks and then writes."""

    def __init__(self, store):
        self.store, self.uri, self.conditional = store, store.uri, False

    def __getattr__(self, name):
        return getattr(self.store, name)


def test_without_an_atomic_create_two_that_hold_one_epoch_are_told_apart_at_the_next_save(store):
    second = directory(TwoSteps(store))
    stalling = Stalling(store, "create", "leases", second.begin, conditional=False)
    first = directory(stalling)
    first.begin()
    assert epochs(store) == [1]  # both believe that it is theirs
    with pytest.raises(FencedError):
        save(second, 0, by=b"second")
    save(first, 0, by=b"first")
    assert model(directory(store).latest()) == b"0 by first"


def test_state_start_is_readable_and_counts_at_once(store):
    save(directory(store), 1, 2, 3)
    lease = take_lease(store, least=0)
    assert directory(store).rounds() == [1, 2, 3]
    told = state_start(store, lease, 1)
    assert newest_lease(store) == told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert directory(store).rounds() == [1]

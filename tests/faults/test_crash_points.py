"""The driver dies at every change of the disk of a whole run; from each disk a new fit ends with the same bits."""

import pytest
from crash_points import crash_everywhere

from sparkdeep.storage.checkpoints import CheckpointDirectory

pytestmark = pytest.mark.fault(rows=[23], phases="CK,CM")


def test_from_every_disk_that_a_crash_leaves_a_new_fit_goes_on_to_the_same_result(capsys, record_property):
    crashes = crash_everywhere()
    with capsys.disabled():
        print(
            f"\n{crashes.points} crash points and {crashes.unsynced} losses of power: {crashes.disks} different disks, "
            f"{crashes.recovered} recovered"
        )
    record_property("crash points: operations of a whole run", crashes.points)
    record_property("crash points: losses of power", crashes.unsynced)
    assert (crashes.points, crashes.unsynced) == (191, 96)
    assert crashes.wrong == []
    assert crashes.recovered == crashes.disks


def test_the_enumeration_sees_a_commit_that_comes_before_its_files(monkeypatch):
    """The control: with the order of writes reversed, some disks cannot be recovered from."""
    order = []

    def commit_first(self, prefix, files):
        order.append((self._store, prefix, files))

    real = CheckpointDirectory._commit

    def then_files(self, lease, number, prefix, commit):
        real(self, lease, number, prefix, commit)
        for name, data in order.pop()[2].items():
            self._store.write(f"{prefix}/{name}", data)

    monkeypatch.setattr(CheckpointDirectory, "_write_files", commit_first)
    monkeypatch.setattr(CheckpointDirectory, "_commit", then_files)
    with pytest.raises((RuntimeWarning, AssertionError), match="damaged"):
        crash_everywhere()

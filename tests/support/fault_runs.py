"""What every test of a fault asserts of the run that it struck: the invariants, against the undisturbed run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cluster_fixtures import HOSTS

from sparkdeep.storage.manifest import Commit, commit_keys, commit_name
from sparkdeep.storage.opening import open_store


@dataclass
class Reference:
    """The undisturbed run."""

    weights: dict
    rows: list[int]
    """Of each round."""

    def check(self, model, *, retries=None):
        """I1, I2 and I3: the same bits, from the same rows, in rounds without a gap.

        Args:
            model: that the disturbed fit returned.
            retries: failed attempts that its records must tell of, all together.
        """
        assert [record.round for record in model.history] == list(range(1, len(self.rows) + 1))
        assert [record.rows for record in model.history] == self.rows
        for record in model.history:
            assert record.rows == sum(replica.rows for replica in record.replicas)
        differing = [name for name, value in weights_of(model).items() if not torch.equal(value, self.weights[name])]
        assert differing == []
        if retries is not None:
            assert sum(record.retries for record in model.history) == retries, [r.retries for r in model.history]


def weights_of(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def verified_rounds(folder):
    """The committed rounds of a checkpoint folder, each file read and held against its digest."""
    store = open_store(str(folder))
    keys = commit_keys(store.list("commits"))
    for key in keys:
        commit = Commit.from_bytes(store.read(commit_name(key), max_bytes=1 << 24), key)
        for name in commit.entries:
            commit.read(store, name)
    return sorted(number for number, _ in keys)


@pytest.fixture(scope="session")
def fault_frame(fault_session):
    from fault_models import rows

    frame = rows(fault_session).cache()
    frame.count()
    return frame


@pytest.fixture(scope="session")
def reference(fault_frame):
    from fault_models import ROWS, estimator

    model = estimator().fit(fault_frame)
    found = Reference(weights=weights_of(model), rows=[record.rows for record in model.history])
    per_epoch = len(found.rows) // 2
    assert sum(found.rows[:per_epoch]) == sum(found.rows[per_epoch:]) == ROWS
    found.check(model, retries=0)
    return found


@pytest.fixture
def leaks(fault_session, fault_cluster):
    from leaks import Leaks

    return Leaks(fault_session, [fault_cluster.local_dir(host) for host in HOSTS])

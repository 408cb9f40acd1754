"""Which replica a key goes to: the rule by itself, and the settings that contradict it."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sparkdeep.errors import ConfigError
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.spark.fit.settings import FitSettings, described, digest_of
from sparkdeep.spark.ingest.dealing_by_key import keys_dealt


def loads_of(counts, places, num_workers):
    return [sum(counts[key] for key, own in places.items() if own == i) for i in range(num_workers)]


def test_the_largest_key_goes_first_to_the_emptiest_replica():
    counts = {10: 7, 11: 5, 12: 4, 13: 3, 14: 3}
    assert keys_dealt(counts, 2) == {10: 0, 11: 1, 12: 1, 13: 0, 14: 1}
    assert keys_dealt({3: 1, 1: 1, 2: 1}, 3) == {1: 0, 2: 1, 3: 2}, "ties go by the key and the replica"


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_no_replica_is_empty_and_none_has_more_than_grahams_bound(num_workers):
    rng = np.random.default_rng(num_workers)
    for _ in range(30):
        counts = {
            int(key): int(rows) for key, rows in enumerate(rng.integers(1, 60, size=int(rng.integers(num_workers, 8))))
        }
        places = keys_dealt(counts, num_workers)
        loads = loads_of(counts, places, num_workers)
        assert min(loads) > 0
        best = min(
            max(loads_of(counts, dict(zip(counts, dealt, strict=True)), num_workers))
            for dealt in itertools.product(range(num_workers), repeat=len(counts))
        )
        assert max(loads) <= (4 / 3 - 1 / (3 * num_workers)) * best + 1e-9


def test_a_hash_of_few_keys_would_leave_replicas_empty():
    """Ten labels on four replicas by a hash: often one has none, which is why they are dealt by their rows."""
    rng = np.random.default_rng(0)
    empty = sum(len(set(rng.integers(0, 4, size=10))) < 4 for _ in range(1000))
    assert empty > 150
    even = dict.fromkeys(range(10), 100)
    assert sorted(loads_of(even, keys_dealt(even, 4), 4)) == [200, 200, 300, 300]


def settings(**options):
    run = RunSettings(**{name: options.pop(name) for name in ("min_workers",) if name in options})
    return FitSettings(
        local=LocalSettings(), run=run, model=nn.Linear(1, 1), loss=nn.MSELoss(), feature_cols="x", label_cols="y",
        optimizer=partial(torch.optim.SGD, lr=0.1), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"deal": "partitions"}, "deal_key='user' with deal='partitions'.*Leave one out"),
        ({"min_workers": 1}, "deal_key='user' with min_workers=1: keys stay with their replicas.*Leave one out"),
    ],
)
def test_what_a_key_contradicts_is_refused(options, why):
    with pytest.raises(ConfigError, match=why):
        settings(deal_key="user", **options)
    settings(**options)


@pytest.mark.parametrize("value", ["", 3, ["user"]])
def test_a_key_that_is_no_columns_name_is_refused(value):
    with pytest.raises(ConfigError, match=r"deal_key=.*must be a column's name"):
        settings(deal_key=value)


def test_a_search_tells_fits_of_other_keys_apart():
    assert described(settings(deal_key="user"))["deal_key"] == "user"
    digests = {digest_of(settings(deal_key=key), {}) for key in (None, "user", "label")}
    assert len(digests) == 3

"""The exchange's settings on Spark: the ring's bits are the star's, and codes and overlap learn what plain averaging does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from spark_models import estimator
from twin import flat

pytestmark = pytest.mark.spark


def fitted(blobs, **options):
    return estimator(optimizer=partial(torch.optim.SGD, lr=0.2), epochs=3, sync_every=2, **options).fit(blobs)


def test_the_ring_of_two_workers_gives_the_bits_of_the_star_and_codes_and_overlap_learn_as_well(blobs):
    star = fitted(blobs, aggregation="star")
    ring = fitted(blobs, aggregation="ring")
    assert torch.equal(flat(star.model), flat(ring.model))
    assert {record.aggregation for record in ring.history} == {"ring"}
    coded = fitted(blobs, codec="int8", down_codec="bf16", error_feedback=True, overlap=1)
    assert not torch.equal(flat(coded.model), flat(star.model))
    assert coded.history[-1].loss < 0.5 * coded.history[0].loss
    assert 0 < coded.history[-1].received_bytes < star.history[-1].received_bytes

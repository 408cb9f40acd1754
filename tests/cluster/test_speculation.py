"""A portion that straggles on one host is worked at on the other as well, and the first answer counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cluster_fixtures import both_up, session_on
from cluster_models import HOSTS, Plain, Straggler, estimator, rows

from sparkdeep.algorithms import lbfgs

pytestmark = [pytest.mark.cluster, pytest.mark.algorithms]


@pytest.fixture(scope="module")
def speculating(cluster):
    cluster.end_session()
    session = session_on(
        cluster.url,
        **{
            "spark.speculation": "true",
            "spark.speculation.interval": "100ms",
            "spark.speculation.quantile": "0.5",
            "spark.speculation.multiplier": "1.2",
            "spark.speculation.minTaskRuntime": "200ms",
            "spark.locality.wait": "0s",
        },
    )
    both_up(cluster, session)
    yield session
    session.stop()


def test_a_straggling_portion_is_backed_up_on_the_other_host(speculating, tmp_path):
    frame = rows(speculating, 400).cache()

    def fit(seconds, name):
        (tmp_path / name).mkdir()
        straggler = Straggler(tmp_path / name, seconds)
        options = {"optimizer": None, "algorithm": lbfgs(), "sync_every": "epoch", "epochs": 2, "portions": 4}
        return estimator(model=Plain, preprocess=straggler, **options).fit(frame)

    calm = fit(0.0, "calm")
    delayed = fit(120.0, "delayed")
    portion, host = (Path(tmp_path) / "delayed" / "straggles").read_text().split()
    assert host in HOSTS
    assert delayed.history[0].replicas[int(portion)].host in set(HOSTS) - {host}
    assert delayed.history[0].seconds < 120.0, "nobody waited for the first attempt"
    assert [one.loss for r in delayed.history for one in r.evaluations] == [
        one.loss for r in calm.history for one in r.evaluations
    ], "each portion counts once"
    for one, other in zip(calm.model.state_dict().values(), delayed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    print(f"with a task that sleeps 120 s: {delayed.history[0].seconds:.1f} s, calm {calm.history[0].seconds:.1f} s")

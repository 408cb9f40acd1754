"""transport="spark" on a classic session: the same bits as over sockets, and no port."""

from __future__ import annotations

from functools import partial

import psutil
import pytest
import torch
from transport_contract import *  # noqa: F403 (the contract's tests, collected here with this session)
from transport_models import blob_rows, estimator, same_bits

from sparkdeep.errors import ConfigError, PreflightError

pytestmark = pytest.mark.jobs


@pytest.fixture(scope="module")
def blobs(spark):
    return spark.createDataFrame(blob_rows(200), "id int, pixels array<double>, label bigint").cache()


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2, "validation": 0.2, "validate_every": 1},
        {"inner_state": "average"},
        {"outer_optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)},
    ],
    ids=["plain", "average", "outer"],
)
def test_not_a_bit_differs_from_sockets(blobs, tmp_path, options):
    over_sockets = estimator(**{**options, "transport": "auto"}).fit(blobs)
    for exchange in (None, str(tmp_path / "exchange")):
        model = estimator(**options, exchange_dir=exchange).fit(blobs)
        assert same_bits(over_sockets, model)
        assert [(r.loss, r.rows, r.metrics) for r in model.history] == [
            (r.loss, r.rows, r.metrics) for r in over_sockets.history
        ]
    other = estimator(**{**options, "seed": 1}).fit(blobs)
    assert not same_bits(over_sockets, other)


def test_no_port_is_opened(blobs):
    def ports():
        return {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}

    before = ports()
    seen = []
    estimator(callbacks=[lambda _: seen.append(ports())]).fit(blobs)
    assert seen
    assert all(now == before for now in seen)
    assert ports() == before
    # Negative control: with sockets there is one.
    estimator(transport="socket", callbacks=[lambda _: seen.append(ports())]).fit(blobs)
    assert len(seen[-1] - before) == 1
    assert ports() == before  # and it went with the fit


def test_an_exchange_without_its_transport_is_refused(blobs, tmp_path):
    with pytest.raises(ConfigError, match=r"exchange_dir=.* with transport='socket': updates go to the driver"):
        estimator(transport="socket", exchange_dir=str(tmp_path)).fit(blobs)


@pytest.mark.fault(rows=[31], phases="PF")
def test_results_that_the_driver_would_not_take_are_refused_with_the_numbers(spark, blobs, monkeypatch):
    real = type(spark.sparkContext.getConf()).get

    def get(self, name, default=None):
        return "10m" if name == "spark.driver.maxResultSize" else real(self, name, default)

    monkeypatch.setattr(type(spark.sparkContext.getConf()), "get", get)
    from transport_models import Wide

    with pytest.raises(PreflightError, match=r"14 MB to the driver.*allows 10 MB.*exchange_dir"):
        estimator(model=Wide, model_args={"megabytes": 6}).fit(blobs)

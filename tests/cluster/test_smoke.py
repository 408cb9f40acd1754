"""Two hosts on the Spark 3.5 stack: a DataFrame, and a petastorm dataset that both hosts read."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cluster_models import HOSTS, estimator, rows

from sparkdeep import petastorm

pytestmark = pytest.mark.lts  # .ci/lts.sh runs it; the tier `cluster` has larger ones of its own


def test_a_dataframe_is_fitted_and_transformed_on_two_hosts(cluster, cluster_session):
    frame = rows(cluster_session, 400).cache()
    seen = set()

    def look(record):
        seen.update(host for host in HOSTS if any(cluster.local_dir(host).rglob("sparkdeep-*/shard-*")))

    fast = partial(torch.optim.AdamW, lr=0.02)
    model = estimator(epochs=8, optimizer=fast, prediction="argmax", callbacks=[look]).fit(frame)
    assert seen == set(HOSTS)
    right = model.transform(frame).selectExpr("avg(double(y = prediction))").first()[0]
    assert right > 0.7


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_both_hosts_read_their_row_groups_through_petastorm(cluster_session, tmp_path):
    from petastorm.spark import SparkDatasetConverter, make_spark_converter

    cluster_session.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, f"file://{tmp_path}")
    converter = make_spark_converter(rows(cluster_session, 400).repartition(5))
    model = estimator(epochs=4).fit(converter)
    again = estimator(epochs=4).fit(petastorm.open(converter.cache_dir_url, reader="make_batch_reader"))
    assert sum(record.rows for record in model.history) == 4 * 400
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    converter.delete()

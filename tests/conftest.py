"""Fixtures for every test: one thread a process, and one Spark session for the tests that are marked `spark`."""

from __future__ import annotations

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("launcher_contract", "store_contract", "leaks", "fault_runs")

from cluster_fixtures import BRIEF, cluster, cluster_session, fault_cluster, fault_session  # noqa: E402, F401 (fixtures)
from fault_runs import fault_frame, leaks, reference  # noqa: E402, F401 (as above)
from run_alone import pytest_terminal_summary  # noqa: E402, F401 (a hook)

# The same examples in every run: a gate that fails by luck teaches people to run it again.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.load_profile("gate")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def spark():
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.master("local[2]")
        .appName("sparkdeep-tests")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "2")
        # Small plans are over before their code is compiled; tests of jobs and of two workers run generated code.
        .config("spark.sql.codegen.wholeStage", "false")
        .config("spark.sql.codegen.factoryMode", "NO_CODEGEN")
        .config("spark.driver.extraJavaOptions", BRIEF)
        .getOrCreate()
    )
    yield session
    session.stop()

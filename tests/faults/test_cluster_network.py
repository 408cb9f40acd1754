"""The line between a replica and the driver breaks, goes dead or slow while an update is on it."""

from __future__ import annotations

import pytest
from cluster_fixtures import free_port
from fault_models import estimator
from tcp_proxy import LineFault, TcpProxy, Touch

from sparkdeep.stages import coordinator
from sparkdeep.testing.injection import Injector

pytestmark = pytest.mark.cluster

# An update is some 430 KB: this far into it, it is neither begun nor done.
INSIDE = 150_000
_MBIT = 1e6 / 8


@pytest.fixture
def through(monkeypatch):
    """Settings that send replicas through a proxy, and where that has to listen and to forward."""
    # Replicas of this host would come by the Unix socket, which is no line that could break.
    monkeypatch.setattr(coordinator, "_listen_nearby", lambda: None)
    port = free_port()
    return {"coordinator_host": "127.0.0.9", "coordinator_port": port}, ("127.0.0.9", port), ("127.0.0.1", port)


@pytest.mark.fault(rows=[12], phases="RT")
def test_a_line_that_breaks_or_goes_dead_in_the_middle_of_an_update_voids_the_round_and_nothing_else(
    fault_frame, reference, leaks, tmp_path, caplog, through
):
    settings, near, far = through
    faults = [
        LineFault(tmp_path / "cut", 1, "cut", after_bytes=INSIDE),
        LineFault(tmp_path / "dead", 0, "dead", after_bytes=INSIDE),
    ]
    injector = Injector(tmp_path / "plan")
    injector.call_at("transfer", 3, 1, action=Touch(faults[0].sign))
    injector.call_at("transfer", 5, 0, action=Touch(faults[1].sign))
    with injector.installed(), TcpProxy(near, far, faults) as proxy:
        model = estimator(injector, stall_timeout_s=12.0, **settings).fit(fault_frame)
    injector.check_fired()
    proxy.check_fired()
    reference.check(model, retries=2)
    assert [record.round for record in model.history if record.retries] == [3, 5]
    assert "replica 0 on 127.0.0." in caplog.text
    assert "sent nothing for 12 s" in caplog.text
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[12], phases="RT")
def test_a_line_that_crawls_is_given_up_at_the_rounds_deadline_though_it_is_never_silent(
    fault_frame, reference, leaks, tmp_path, caplog, through
):
    settings, near, far = through
    # 54 s for an update, a piece every 2 s.
    slow = LineFault(tmp_path / "slow", 1, "slow", bytes_per_s=8_000)
    injector = Injector(tmp_path / "plan").call_at("transfer", 7, 1, action=Touch(slow.sign))
    limits = {"stall_timeout_s": 20.0, "min_round_timeout_s": 6.0}
    with injector.installed(), TcpProxy(near, far, [slow]) as proxy:
        model = estimator(injector, **limits, **settings).fit(fault_frame)
    injector.check_fired()
    proxy.check_fired()
    reference.check(model, retries=1)
    assert [record.round for record in model.history if record.retries] == [7]
    assert "replica 1 on 127.0.0." in caplog.text
    assert "deadline" in caplog.text
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[12], phases="RT")
def test_a_line_of_one_megabit_slows_its_round_down_and_changes_nothing(
    fault_frame, reference, leaks, tmp_path, through
):
    settings, near, far = through
    slow = LineFault(tmp_path / "slow", 1, "slow", bytes_per_s=_MBIT)
    injector = Injector(tmp_path / "plan").call_at("transfer", 7, 1, action=Touch(slow.sign))
    with injector.installed(), TcpProxy(near, far, [slow]) as proxy:
        model = estimator(injector, stall_timeout_s=12.0, checkpoint_every=8, **settings).fit(fault_frame)
    injector.check_fired()
    proxy.check_fired()
    reference.check(model, retries=0)
    by_round = {record.round: record.exchange_seconds for record in model.history}
    assert by_round[7] > 3 > by_round[6]
    leaks.check()

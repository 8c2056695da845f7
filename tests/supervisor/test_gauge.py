"""What is said of a job: rates and ages that are those of the job, and not of its restarts."""

from __future__ import annotations

import pytest

from ckptd.supervisor import machine
from ckptd.supervisor.gauge import Gauge, summary
from ckptd.supervisor.policy import Policy

POLICY = Policy()


def facts(gauge: Gauge, now_s: float, **ledger: object) -> dict:
    state = machine.State(POLICY, machine.Attached(0.0), machine.Ledger(**ledger))
    return gauge.facts(state, now_s, attempt=1, page=None, works=True)


def test_the_rate_is_that_of_this_attempt() -> None:
    """Steps that came back with a checkpoint were not made now, and its start is no training."""
    gauge = Gauge(POLICY, 0.0, continued=True)
    gauge.started(0.0, from_memory=False)
    for now_s, step, begins in [(1, 0, True), (9, 1000, True), (11, 1020, False)]:
        gauge.moved(float(now_s), step, begins=begins)
    assert facts(gauge, 11.0)["rate"] == 10.0
    assert "10 steps/s" in summary(facts(gauge, 11.0))


@pytest.mark.parametrize(("from_memory", "power"), [(False, "5 s"), (True, "90 s")])
def test_a_power_cut_costs_what_is_not_durable(from_memory: bool, power: str) -> None:
    """An attempt from memory may stand on what the disk has never had."""
    gauge = Gauge(POLICY, 10.0, continued=False)
    gauge.started(95.0, from_memory=from_memory)
    assert f"power cut: ≤ {power}" in facts(gauge, 100.0)["would cost"]


def test_the_age_of_what_is_durable_is_that_of_its_state() -> None:
    """And not of the end of its write; a disk that refuses is known."""
    gauge = Gauge(POLICY, 0.0, continued=False)
    gauge.started(0.0, from_memory=False)
    gauge.taken(50.0, 0.5)
    gauge.write_began(51.0)
    assert gauge.written(70.0, 50.0) == 19.0
    assert "power cut: ≤ 30 s" in facts(gauge, 80.0)["would cost"]
    refused = facts(gauge, 80.0, failed="no space")["would cost"]
    assert refused.startswith("SIGTERM: ≤ 30 s, unless the disk takes it again")


def test_restarts() -> None:
    """The first start of a job is none; that of a job that was begun before is one."""
    for continued in (False, True):
        gauge = Gauge(POLICY, 0.0, continued=continued)
        gauge.started(0.0, from_memory=False)
        assert facts(gauge, 1.0)["restarts"] == int(continued)

"""The event simulation, against times that can be worked out by hand."""

from __future__ import annotations

import pytest

from siirl.planning.events import Compute, Meet, Process, Request, Serve, Simulation


def process(*requests: Request) -> Process:
    yield from requests


def test_processes_with_a_device_each_run_side_by_side() -> None:
    simulation = Simulation([0, 0, 1], devices=2)
    assert simulation.run([process(Compute(1.0)), process(Compute(2.0)), process(Compute(1.5))]) == 2.0
    assert simulation.computing == [1.0, 2.0, 1.5]


def test_processes_share_devices_evenly() -> None:
    # three of 1 s on two devices: each has two thirds of one, all end after 1.5 s
    simulation = Simulation([0] * 3, devices=2)
    assert simulation.run([process(Compute(1.0)) for _ in range(3)]) == pytest.approx(1.5)
    # with one of 2 s, 1 s of it is left then, alone
    assert Simulation([0] * 3, 2).run([process(Compute(s)) for s in (1.0, 1.0, 2.0)]) == pytest.approx(2.5)


def test_busy_neighbours_slow_each_other_down() -> None:
    # both take 1.5 times as long until the first ends at 1.5 s, when 1 s of the other's work is left
    assert Simulation([0, 0], 2, 1.5).run([process(Compute(1.0)), process(Compute(2.0))]) == pytest.approx(2.5)


def test_a_meeting_waits_for_the_last() -> None:
    met = [process(Compute(s), Meet("all", 3, 0.25), Compute(1.0)) for s in (1.0, 3.0, 2.0)]
    assert Simulation(range(3), 1).run(met) == pytest.approx(3.0 + 0.25 + 1.0)


def test_a_server_serves_in_the_order_of_arrival() -> None:
    # arrivals at 0.1, 0.2 and 5 s, a second each: served from 0.1, 1.1 and 5 s on
    queue = [process(Compute(s), Serve("network", 1.0)) for s in (0.2, 0.1, 5.0)]
    assert Simulation(range(3), 1).run(queue) == pytest.approx(6.0)
    assert Simulation(range(2), 1).run(queue_of(0.2, 0.1)) == pytest.approx(2.1)


def queue_of(*arrivals: float) -> list[Process]:
    return [process(Compute(s), Serve("network", 1.0)) for s in arrivals]


def test_a_meeting_that_never_fills_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="nobody else comes"):
        Simulation([0], 1).run([process(Meet("all", 2, 0.0))])

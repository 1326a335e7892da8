from __future__ import annotations

from pdstack.deploy.progress import Heartbeat


def test_a_short_task_says_nothing() -> None:
    heartbeat = Heartbeat(interval=15)
    heartbeat.start("Build the image", 100.0)
    assert heartbeat.line(114.9) is None


def test_a_long_task_says_its_name_and_age_once_an_interval() -> None:
    heartbeat = Heartbeat(interval=15)
    heartbeat.start("Build the image", 100.0)
    assert heartbeat.line(115.0) == "  ... still running after 15 s: Build the image"
    assert heartbeat.line(129.0) is None
    assert heartbeat.line(131.0) == "  ... still running after 31 s: Build the image"


def test_the_next_task_starts_afresh() -> None:
    heartbeat = Heartbeat(interval=15)
    heartbeat.start("one", 0.0)
    assert heartbeat.line(20.0)
    heartbeat.start("two", 21.0)
    assert heartbeat.line(35.0) is None
    assert "two" in (heartbeat.line(36.0) or "")


def test_nothing_is_said_when_nothing_runs() -> None:
    heartbeat = Heartbeat(interval=15)
    assert heartbeat.line(1000.0) is None
    heartbeat.start("one", 0.0)
    heartbeat.stop()
    assert heartbeat.line(1000.0) is None

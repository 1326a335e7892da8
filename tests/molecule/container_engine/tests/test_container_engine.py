from __future__ import annotations

import json

from testinfra.host import Host


def test_the_engine_runs_and_starts_with_the_host(host: Host) -> None:
    assert host.service("docker").is_running
    assert host.service("docker").is_enabled


def test_the_engine_answers_and_keeps_containers_over_a_restart(host: Host) -> None:
    info = json.loads(host.check_output("docker info --format '{{json .}}'"))
    assert info["ServerVersion"]
    assert info["LiveRestoreEnabled"]


def test_a_setting_that_was_there_before_is_kept(host: Host) -> None:
    settings = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert settings["log-level"] == "warn"
    assert settings["live-restore"] is True


def test_what_is_ours_is_remembered(host: Host) -> None:
    state = json.loads(host.file("/var/lib/pdstack/engine.json").content_string)
    assert state["started"] is True
    assert state["detached"] is False
    assert "docker.io" in state["packages"]


def test_nobody_else_may_talk_to_the_engine(host: Host) -> None:
    socket = host.file("/var/run/docker.sock")
    assert socket.user == "root"
    assert socket.mode & 0o007 == 0

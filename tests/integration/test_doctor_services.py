"""What the probe says of a real etcd and a real NATS server, and the checks that read it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import Coordination, Ports, find_program, start, wait_for

from pdstack.doctor import checks, plan, probe


def asked(*options: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, probe.__file__, *options], capture_output=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["errors"] == []
    return found


def verdicts(found: dict[str, Any], **wanted: Any) -> dict[int, checks.Result]:
    return {result.number: result for result in checks.evaluate(found, {**plan.empty(), **wanted})}


def test_running_services(coordination: Coordination) -> None:
    target = coordination.etcd_url.removeprefix("http://")
    found = asked("--etcd", coordination.etcd_url, "--nats", coordination.nats_url, "--reach", target)
    said = found["etcd"][coordination.etcd_url]
    assert (said["healthy"], said["readable"]) == (True, True)
    assert 0 < said["fsync_p99_s"] < 60
    assert found["nats"][coordination.nats_url]["jetstream"] is True
    assert found["reach"] == {target: "ok"}
    told = verdicts(found, etcd_member=coordination.etcd_url)
    assert [told[number].verdict for number in (41, 46, 47)] == ["ok", "ok", "ok"]
    assert told[48].verdict in ("ok", "warn")
    assert verdicts(found, nats_auth=True)[47].found.endswith("lets anyone in")


def test_services_that_do_not_run(ports: Ports) -> None:
    etcd, nats = f"http://127.0.0.1:{ports.take()}", f"nats://127.0.0.1:{ports.take()}"
    found = asked("--etcd", etcd, "--nats", nats)
    assert [verdicts(found)[number].verdict for number in (46, 47)] == ["skip", "skip"]


def test_a_nats_server_that_wants_a_login_and_has_no_jetstream(tmp_path: Path, ports: Ports) -> None:
    port = ports.take()
    program = find_program("nats-server")
    assert program
    command = [program, "--addr", "127.0.0.1", "--port", str(port), "--user", "a", "--pass", "b"]
    server = start("nats", command, tmp_path)
    try:
        wait_for("NATS listens", lambda: probe.reach(f"127.0.0.1:{port}") == "ok")
        found = asked("--nats", f"nats://127.0.0.1:{port}")
    finally:
        server.stop()
    said = found["nats"][f"nats://127.0.0.1:{port}"]
    assert (said["auth_required"], said["jetstream"], said["tls_required"]) == (True, False, False)
    assert "no JetStream" in verdicts(found)[47].found


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_what_is_no_nats_server_is_told(ports: Ports, greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(greeting)

        threading.Thread(target=answer, daemon=True).start()
        url = f"nats://127.0.0.1:{server.getsockname()[1]}"
        found = asked("--nats", url)
    assert verdicts(found)[47].verdict == "fail"
    assert "does not speak NATS" in verdicts(found)[47].found

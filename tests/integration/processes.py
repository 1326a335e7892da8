"""Start and stop the real programs that the integration tests talk to: etcd, NATS, Dynamo's frontend, our workers."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src"
# Everything of these tests lives in this range; a person's own deployment does not.
PORTS = range(23100, 23900)
POLL_S = 0.02


def find_program(name: str) -> str | None:
    """Look in PDSTACK_TEST_BIN (a path list), then in PATH and where distributions put servers."""
    places = [os.environ.get("PDSTACK_TEST_BIN", ""), os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]
    return shutil.which(name, path=os.pathsep.join(p for p in places if p))


class Ports:
    """Hands out free ports of the range, each once."""

    def __init__(self) -> None:
        self._left = iter(PORTS)

    def take(self) -> int:
        for port in self._left:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            return port
        raise RuntimeError(f"no free port left in {PORTS}")


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Poll until `condition` gives something true and return that; AssertionError with `what` otherwise."""
    deadline = time.monotonic() + timeout_s
    last: Any = None
    while time.monotonic() < deadline:
        try:
            last = condition()
        except OSError as error:
            last = error
        else:
            if last:
                return last
        time.sleep(POLL_S)
    raise AssertionError(f"{what}: not within {timeout_s:g} s (last: {last!r})")


def get(url: str, timeout_s: float = 5.0) -> tuple[int, Any]:
    """GET; returns status and decoded JSON (or the text if it is none)."""
    authority, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(authority, timeout=timeout_s)
    try:
        connection.request("GET", "/" + path)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    try:
        return response.status, json.loads(text)
    except json.JSONDecodeError:
        return response.status, text


@dataclass
class Program:
    """One child process; its output goes to a file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> int:
        """SIGTERM, then SIGKILL; returns the exit code."""
        if self.alive():
            self.send(signal.SIGTERM)
            try:
                return self.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
        return self.wait()

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: ours, without settings of the programs under test."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("DYN_", "UCX_", "ETCD_", "NATS_", "NIXL_"))}
    return {**ours, "PYTHONPATH": str(SOURCE), "RUST_BACKTRACE": "0", "PYTHONUNBUFFERED": "1", **more}


def start(name: str, command: list[str], folder: Path, env: dict[str, str] | None = None) -> Program:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(**(env or {})), cwd=folder
        )
    return Program(name, process, log)


@dataclass
class Coordination:
    """A one-member etcd and a NATS server with JetStream."""

    folder: Path
    ports: Ports
    etcd_url: str = ""
    nats_url: str = ""
    programs: dict[str, Program] = field(default_factory=dict)
    _commands: dict[str, list[str]] = field(default_factory=dict)

    def prepare(self) -> None:
        client, peer, nats = self.ports.take(), self.ports.take(), self.ports.take()
        self.etcd_url, self.nats_url = f"http://127.0.0.1:{client}", f"nats://127.0.0.1:{nats}"
        etcd, nats_server = find_program("etcd"), find_program("nats-server")
        assert etcd and nats_server
        self._commands["etcd"] = [
            *(etcd, "--data-dir", str(self.folder / "etcd"), "--listen-client-urls", self.etcd_url),
            *("--advertise-client-urls", self.etcd_url, "--listen-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--initial-cluster", f"default=http://127.0.0.1:{peer}", "--unsafe-no-fsync"),
        ]
        self._commands["nats"] = [
            *(nats_server, "--addr", "127.0.0.1", "--port", str(nats), "--jetstream"),
            *("--store_dir", str(self.folder / "nats")),
        ]

    def start(self, *names: str) -> None:
        for name in names or ("etcd", "nats"):
            command = self._commands[name]
            if name == "etcd" and "--unsafe-no-fsync" in command and not _etcd_knows_no_fsync(command[0]):
                command.remove("--unsafe-no-fsync")
            self.programs[name] = start(name, command, self.folder)
        etcd_ready, nats_port = self.etcd_url + "/health", int(self.nats_url.rpartition(":")[2])
        wait_for("etcd is healthy", lambda: get(etcd_ready)[1].get("health") == "true")
        wait_for("NATS listens", lambda: _listens(nats_port))

    def stop(self) -> None:
        for program in self.programs.values():
            program.stop()


def _etcd_knows_no_fsync(program: str) -> bool:
    return "unsafe-no-fsync" in subprocess.run([program, "--help"], capture_output=True, text=True).stdout


def _listens(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 1.0):
        return True


@dataclass
class Worker:
    """One worker process and its status pages."""

    name: str
    role: str
    program: Program
    status_url: str
    config: dict[str, Any]

    def health(self) -> tuple[int, Any]:
        return get(self.status_url + "/health")

    def ready(self) -> bool:
        if not self.program.alive():
            raise AssertionError(f"{self.name} ended with {self.program.wait()}:\n{self.program.text()[-3000:]}")
        return self.health()[0] == 200

    def transfer(self) -> dict[str, Any]:
        return dict(get(self.status_url + "/transfer")[1])

    def metrics(self) -> dict[str, float]:
        text = get(self.status_url + "/metrics")[1]
        rows = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def finished(self, request_id: str) -> dict[str, Any] | None:
        status, record = get(f"{self.status_url}/requests/{request_id}")
        return record if status == 200 else None

    def used_blocks(self) -> float:
        return self.metrics()["pdstack_engine_used_blocks"]


@dataclass
class Stack:
    """A namespace with a frontend and workers."""

    folder: Path
    ports: Ports
    coordination: Coordination
    namespace: str
    model_path: Path
    backend: str
    model_name: str = "tiny"
    engine: dict[str, Any] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    frontends: list[Program] = field(default_factory=list)
    url: str = ""

    def env(self) -> dict[str, str]:
        return {"ETCD_ENDPOINTS": self.coordination.etcd_url, "NATS_SERVER": self.coordination.nats_url}

    def program_env(self) -> dict[str, str]:
        """The whole environment of a program that is to find etcd and NATS."""
        return environment(**self.env())

    def start_frontend(self, *options: str) -> Program:
        port = self.ports.take()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
        command += ["--namespace", self.namespace, *options]
        env = {**self.env(), "DYN_LOG": "info", "DYN_SDK_DISABLE_ANSI_LOGGING": "1"}
        self.frontends.append(start(f"frontend-{port}", command, self.folder, env))
        return self.frontends[-1]

    def start_worker(self, name: str, role: str, wait: bool = True, **changes: Any) -> Worker:
        key = self.folder / "cluster.key"
        key.parent.mkdir(parents=True, exist_ok=True)
        if not key.exists():
            key.write_text("5f" * 32 + "\n")
            key.chmod(0o640)
        port = self.ports.take()
        config: dict[str, Any] = {
            "name": name,
            "role": role,
            "namespace": self.namespace,
            "model_name": self.model_name,
            "model_path": str(self.model_path),
            "etcd_endpoints": [self.coordination.etcd_url],
            "nats_server": self.coordination.nats_url,
            "status": {"host": "127.0.0.1", "port": port},
            "engine": {"kv_blocks": 256, "max_context": 1024, "threads": 1, "queue_timeout_s": 10.0, **self.engine},
            "drain_timeout_s": 20.0,
            "migration_limit": 3,
        }
        if role != "aggregated":
            config["transfer"] = {
                "backend": self.backend,
                "cluster_key_file": str(key),
                "listen": {"host": "127.0.0.1", "port": self.ports.take()},
                "advertise": "127.0.0.1",
                # Short, so that tests see the end of tickets that nobody took up.
                "ticket_ttl_s": 5.0,
            }
        for section, values in changes.items():
            if isinstance(values, dict):
                config[section].update(values)
            else:
                config[section] = values
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(config))
        command = [sys.executable, "-m", "pdstack.worker", "--config", str(file)]
        program = start(name, command, self.folder, {"UCX_MODULES": "^ib", "OPENBLAS_NUM_THREADS": "1"})
        worker = Worker(name, role, program, f"http://127.0.0.1:{port}", config)
        self.workers[name] = worker
        if wait:
            wait_for(f"{name} is ready", worker.ready, 90.0)
        return worker

    def wait_serving(self, timeout_s: float = 60.0) -> None:
        """Wait for a real answer: the list of models alone does not prove that requests work."""
        wait_for(
            "the frontend answers a request", lambda: self.complete("hello", max_tokens=1).status == 200, timeout_s
        )

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 60.0) -> http.client.HTTPResponse:
        """POST without reading the answer; close the response to go away."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=timeout_s)
        payload = json.dumps({"model": self.model_name, **body})
        connection.request("POST", path, payload, {"Content-Type": "application/json"})
        return connection.getresponse()

    def send_and_leave(self, body: dict[str, Any], seconds: float) -> None:
        """Send a request and close the connection after `seconds` without reading."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"))
        payload = json.dumps({"model": self.model_name, **body})
        connection.request("POST", "/v1/completions", payload, {"Content-Type": "application/json"})
        time.sleep(seconds)
        connection.close()

    def complete(self, prompt: str | list[int], path: str = "/v1/completions", **options: Any) -> Completion:
        """One request, answered in one piece."""
        body = {"prompt": prompt, "temperature": 0, **options}
        if path.endswith("/chat/completions"):
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        response = self.post(path, body)
        text = response.read().decode()
        return Completion(response.status, text)

    def stream(self, prompt: str | list[int], **options: Any) -> Iterator[str]:
        """One streamed completion: yields the lines that are not empty, as they come."""
        response = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, "stream": True, **options})
        assert response.status == 200, response.read()
        try:
            for line in response:
                if line.strip():
                    yield line.decode().strip()
        finally:
            response.close()

    def stop(self) -> None:
        # A frontend takes 5 s and more to leave after SIGTERM, and holds nothing that is worth the wait.
        for frontend in self.frontends:
            frontend.kill()
        for worker in self.workers.values():
            if worker.program.alive():
                worker.program.send(signal.SIGTERM)
        for worker in self.workers.values():
            worker.program.stop()


@dataclass
class Completion:
    """Status and body of an answer."""

    status: int
    text: str

    @property
    def body(self) -> dict[str, Any]:
        return dict(json.loads(self.text))

    @property
    def request_id(self) -> str:
        """Dynamo's request id, out of the id of the completion."""
        return str(self.body["id"]).removeprefix("chatcmpl-").removeprefix("cmpl-")

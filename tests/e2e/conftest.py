"""Drive a real deployment with the commands a person uses, on this machine, under the name `e2e`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pdstack.deploy import ask, proof
from pdstack.deploy.load import Load

ROOT = Path(__file__).resolve().parents[2]
INVENTORIES = ("inventories/common", "tests/e2e/inventory")
NAME = "e2e"
ANSWER_TOKENS = 24
PROMPTS = 40
SERVICES = ("etcd", "nats", "frontend")
RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


@dataclass
class Run:
    """What a playbook run said. `changed` is the sum over all hosts."""

    status: int
    output: str
    seconds: float

    @property
    def changed(self) -> int:
        recap = RECAP.findall(self.output)
        assert recap, self.output[-3000:]
        return sum(int(host[2]) for host in recap)


@dataclass
class Stack:
    """The deployment under test, and what was measured of it (printed at the end)."""

    report: dict[str, Any] = field(default_factory=dict)
    backend: str = "nixl"

    @property
    def state_dir(self) -> Path:
        return ROOT / ".pdstack" / NAME

    def play(self, playbook: str, *arguments: str) -> Run:
        """Run a playbook; its output is shown as it comes."""
        inventories = [word for inventory in INVENTORIES for word in ("-i", inventory)]
        command = ["ansible-playbook", *inventories, playbook, "-e", f"kv_transfer_backend={self.backend}", *arguments]
        print(f"\n$ {' '.join(command)}", flush=True)
        started = time.monotonic()
        lines = []
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout
            for line in process.stdout:
                sys.stdout.write(line)
                lines.append(line)
        return Run(process.returncode, "".join(lines), time.monotonic() - started)

    def deploy(self, *arguments: str) -> Run:
        run = self.play("site.yml", *arguments)
        assert run.status == 0, run.output[-3000:]
        return run

    def verify(self) -> None:
        """Run the full verification by itself."""
        run = self.play("playbooks/verify.yml", "-e", "verify__depth=full")
        assert run.status == 0, run.output[-5000:]

    def results(self) -> dict[str, Any]:
        """Return what the last verification wrote."""
        return json.loads((self.state_dir / "verify.json").read_text())

    def measured(self) -> dict[str, Any]:
        """Return what the step kv_path has kept."""
        return json.loads((self.state_dir / "kv_path.json").read_text())

    @property
    def deployed(self) -> bool:
        return (self.state_dir / "deployment.json").exists()

    @property
    def deployment(self) -> dict[str, Any]:
        return json.loads((self.state_dir / "deployment.json").read_text())

    @property
    def topology(self) -> dict[str, Any]:
        return self.deployment["topology"]

    @property
    def frontend(self) -> str:
        return self.topology["frontends"][0]["url"]

    @property
    def model(self) -> str:
        return self.deployment["model"]["name"]

    def started(self) -> dict[str, str]:
        """When each container was started, by service."""
        return {name: entry["State"]["StartedAt"] for name, entry in self.inspect().items()}

    def inspect(self) -> dict[str, dict[str, Any]]:
        """`docker inspect` of each container of the deployment, by service."""
        try:
            names = docker("ps", "--all", "--quiet", "--filter", f"name=^pdstack-{NAME}-").split()
        except (FileNotFoundError, subprocess.CalledProcessError):
            return {}  # no engine, so no container: the rehearsal begins there when these tests run alone
        entries = json.loads(docker("container", "inspect", *names)) if names else []
        return {entry["Name"].removeprefix(f"/pdstack-{NAME}-"): entry for entry in entries}

    def kill(self, service: str) -> int:
        """Kill the service's process as a crash would (not by the engine, which would take it for an order)."""
        pid = self.inspect()[service]["State"]["Pid"]
        assert pid > 1
        os.kill(pid, signal.SIGKILL)
        return pid

    def metric(self, worker: str, name: str, **labels: str) -> float:
        url = next(entry["status_url"] for entry in self.topology["workers"] if entry["name"] == worker)
        status, text = ask.get(f"{url}/metrics")
        assert status == 200
        return proof.metric(text, name, **labels)


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout


def until(what: str, condition: Callable[[], Any], timeout_s: float) -> Any:
    """Poll until `condition` gives something true and return it; AssertionError with `what` otherwise."""
    deadline = time.monotonic() + timeout_s
    last: Any = None
    while time.monotonic() < deadline:
        try:
            last = condition()
        except (OSError, AssertionError) as error:
            last = error
        else:
            if last:
                return last
        time.sleep(0.2)
    raise AssertionError(f"after {timeout_s:.0f} s still not: {what} (last: {last})")


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    running = Stack()
    running.play("playbooks/lifecycle/destroy.yml")  # what an earlier, interrupted run left
    yield running
    if running.deployed:
        running.play("playbooks/lifecycle/destroy.yml")
    print("\nend to end:\n" + json.dumps(running.report, indent=2))


@pytest.fixture(scope="session")
def wait_until() -> Callable[[str, Callable[[], Any], float], Any]:
    return until


@pytest.fixture(scope="session")
def engine_command() -> Callable[..., str]:
    return docker


@pytest.fixture(scope="session")
def deployed(stack: Stack) -> Stack:
    """The deployment that the tests before have left, or a new one when a file of tests is run by itself."""
    if not stack.deployed:
        stack.deploy()
    return stack


@pytest.fixture(scope="session")
def prompts(deployed: Stack) -> list[list[int]]:
    """Token ids of prompts of many lengths."""
    config = json.loads((Path(deployed.deployment["model"]["path"]) / "config.json").read_text())
    lengths = [1 + (37 * number) % 300 for number in range(PROMPTS)]
    return proof.prompts(lengths, config["vocab_size"], seed=7)


@pytest.fixture(scope="session")
def undisturbed(stack: Stack, prompts: list[list[int]]) -> list[str]:
    """The text that each prompt gives when nothing is in its way."""
    answers = [ask.complete(stack.frontend, stack.model, prompt, ANSWER_TOKENS) for prompt in prompts]
    problems = [answer.problem() for answer in answers if not answer.good]
    assert not problems, "\n".join(problems)
    texts = [answer.text for answer in answers]
    assert len(set(texts)) > PROMPTS / 2, "the prompts' answers are too much alike to tell a wrong one"
    return texts


@pytest.fixture
def load(stack: Stack, prompts: list[list[int]], undisturbed: list[str]) -> Callable[[int], Load]:
    """Make a load of so many streams; use it in a `with`."""
    frontend, model = stack.frontend, stack.model

    def make(streams: int) -> Load:
        return Load(
            lambda prompt: ask.complete(frontend, model, prompts[prompt], ANSWER_TOKENS, timeout_s=60),
            undisturbed,
            streams,
        )

    return make

"""A deployment over the lab's hosts, driven by the commands a person uses, and what is asked of it while it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab import hosts

from pdstack.deploy import ask

ROOT = Path(__file__).resolve().parents[2]
RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)
ANSWER_TOKENS = 24
# Leaves the hosts as they are at the end, and takes those of an earlier run.
KEEP = os.environ.get("PDSTACK_LAB_KEEP") == "1"


@dataclass
class Run:
    """What a playbook run said."""

    status: int
    output: str
    seconds: float

    @property
    def changed(self) -> dict[str, int]:
        """Changed tasks by host, of the hosts that have any."""
        recap = RECAP.findall(self.output)
        assert recap, self.output[-3000:]
        return {host[0]: int(host[2]) for host in recap if int(host[2])}

    @property
    def said(self) -> str:
        """The output with single spaces."""
        return re.sub(r"\s+", " ", self.output)


def play(playbook: str, inventories: Sequence[str], *arguments: str, quiet: bool = False) -> Run:
    """Run a playbook over inventories/common and `inventories`; its output is shown as it comes."""
    chain = [word for inventory in ("inventories/common", *inventories) for word in ("-i", inventory)]
    command = [str(Path(sys.executable).parent / "ansible-playbook"), *chain, playbook, *arguments]
    environment = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    if not quiet:
        print(f"\n$ {' '.join(command[1:])}", flush=True)
    started, lines = time.monotonic(), []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            if not quiet:
                sys.stdout.write(line)
            lines.append(line)
    return Run(process.returncode, "".join(lines), time.monotonic() - started)


@dataclass
class Cluster:
    """The deployment `name` of `inventories` (after inventories/common)."""

    name: str
    inventories: Sequence[str]
    options: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def play(self, playbook: str, *arguments: str) -> Run:
        return play(playbook, self.inventories, *self.options, *arguments)

    def deploy(self, *arguments: str) -> Run:
        run = self.play("site.yml", *arguments)
        assert run.status == 0, run.output[-5000:]
        return run

    @property
    def state_dir(self) -> Path:
        return ROOT / ".pdstack" / self.name

    @property
    def deployment(self) -> dict[str, Any]:
        return json.loads((self.state_dir / "deployment.json").read_text())

    def results(self) -> dict[str, Any]:
        """Return what the last verification wrote."""
        return json.loads((self.state_dir / "verify.json").read_text())

    @property
    def topology(self) -> dict[str, Any]:
        return self.deployment["topology"]

    @property
    def workers(self) -> list[str]:
        return [worker["name"] for worker in self.topology["workers"]]

    def inspect(self) -> dict[str, dict[str, Any]]:
        """`docker inspect` of each container of the deployment, by `HOST/SERVICE`."""
        found = {}
        for host in hosts.running():
            listed = hosts.docker(
                "exec", host, "docker", "ps", "--all", "--quiet", "--filter", f"name=^pdstack-{self.name}-", check=False
            ).split()
            if listed:
                for entry in json.loads(hosts.docker("exec", host, "docker", "inspect", *listed)):
                    service = entry["Name"].removeprefix(f"/pdstack-{self.name}-")
                    found[f"{host.removeprefix('pdstack-')}/{service}"] = entry
        return found

    def started(self) -> dict[str, str]:
        """When each container was started."""
        return {name: entry["State"]["StartedAt"] for name, entry in self.inspect().items()}


@dataclass
class Watch:
    """Asks URLs again and again, and remembers which did not answer 200 at the same time; use it in a `with`."""

    urls: dict[str, str]
    down: list[frozenset[str]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def _ask(self) -> None:
        while not self._stop.is_set():
            missing = frozenset(name for name, url in self.urls.items() if not answers(url))
            if not self.down or self.down[-1] != missing:
                self.down.append(missing)
            self._stop.wait(0.1)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread
        self._thread.join()

    @property
    def most(self) -> frozenset[str]:
        """The largest set that was down at once."""
        return max(self.down, key=len, default=frozenset())

    @property
    def ever(self) -> frozenset[str]:
        """All that were down at some time."""
        return frozenset().union(*self.down)


def answers(url: str) -> bool:
    try:
        return ask.get(url, timeout_s=2)[0] == 200
    except OSError:
        return False


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
        time.sleep(0.3)
    raise AssertionError(f"after {timeout_s:.0f} s still not: {what} (last: {last})")

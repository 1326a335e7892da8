"""The doctor over all hosts of an inventory: the command that each is asked with, and the report over their answers."""

from __future__ import annotations

import base64
import json
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdstack.doctor import checks, plan
from pdstack.doctor import report as written

# Compressed, the probe fits on a command line however often the way there quotes it (ssh, sudo, a login shell).
UNPACK = 'import base64,zlib;exec(zlib.decompress(base64.b64decode("{}")).decode())'


def commands(
    topology: Mapping[str, Any],
    hosts: Sequence[str],
    settings: Mapping[str, Any],
    hostvars: Mapping[str, Mapping[str, Any]],
    *,
    image: str = "",
    perf: bool = False,
) -> dict[str, str]:
    """Return host -> shell command that runs the probe there.

    The probe comes with the command: it needs no file and none of Ansible's modules on the host, whose Python may be
    too old for them.
    """
    packed = zlib.compress((Path(__file__).parent / "probe.py").read_bytes(), 9)
    script = UNPACK.format(base64.b64encode(packed).decode())
    known, found = Known(hostvars), {}
    for host in hosts:
        variables = known[host]
        root = str(variables.get("pdstack_probe_root") or "/")
        options = plan.probe_options(plan.build(topology, host, settings, known), root, image=image, perf=perf)
        python = str(variables.get("pdstack_python") or "/usr/bin/python3")
        found[host] = shlex.join([python, "-c", script, *options])
    return found


def answer(said: Any) -> tuple[Mapping[str, Any] | None, str]:
    """Return the facts in what Ansible registered of a host's probe, and the reason when there are none."""
    if not isinstance(said, Mapping):
        return None, "it was not asked"
    if said.get("unreachable"):
        return None, " ".join(str(said.get("msg") or "no answer").split())[:200]
    output = str(said.get("stdout") or "")
    # A login shell may print its greeting before.
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line), ""
            except ValueError:
                break
    complaint = " ".join(f"{output} {said.get('stderr') or ''} {said.get('msg') or ''}".split())
    return None, f"the probe gave no facts: {complaint[-200:]}"


class Known(Mapping[str, Mapping[str, Any]]):
    """Every host's variables, with the facts that were read just now. Each is looked up once: Ansible templates it."""

    def __init__(
        self, hostvars: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any] | None] | None = None
    ) -> None:
        self.hostvars, self.facts = hostvars, facts or {}
        self.seen: dict[str, Mapping[str, Any]] = {}

    def __getitem__(self, host: str) -> Mapping[str, Any]:
        if host not in self.seen:
            self.seen[host] = _Once(self.hostvars[host], {"pdstack_probe": self.facts.get(host)})
        return self.seen[host]

    def __iter__(self) -> Iterator[str]:
        return iter(self.hostvars)

    def __len__(self) -> int:
        return len(self.hostvars)


class _Once(Mapping[str, Any]):
    """Variables that remember what was looked up."""

    def __init__(self, variables: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        self.variables, self.known = variables, dict(known)

    def __getitem__(self, name: str) -> Any:
        if name not in self.known:
            self.known[name] = self.variables.get(name, KeyError)
        if self.known[name] is KeyError:
            raise KeyError(name)
        return self.known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.variables)

    def __len__(self) -> int:
        return len(self.variables)


def report(
    topology: Mapping[str, Any],
    hosts: Sequence[str],
    settings: Mapping[str, Any],
    hostvars: Mapping[str, Mapping[str, Any]],
    register: str = "pdstack_r_probe",
    *,
    limited: bool = False,
) -> dict[str, Any]:
    """Return the report over what the hosts answered, kept in their variable `register`.

    `limited` says that only some of them were asked on purpose; the others are then left out.
    """
    said = {host: hostvars[host].get(register) for host in hosts}
    answers = {host: answer(words) for host, words in said.items() if words is not None or not limited}
    known = Known(hostvars, {host: facts for host, (facts, _) in answers.items()})
    rows = {}
    for host, (facts, reason) in answers.items():
        if facts is None:
            rows[host] = [checks.unreachable(host, reason).as_dict()]
        else:
            wanted = plan.build(topology, host, settings, known)
            rows[host] = [result.as_dict() for result in checks.evaluate(facts, wanted)]
    return written.report(rows)

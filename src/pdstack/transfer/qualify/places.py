"""Where the ends of a measurement are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdstack.transfer.roles import Role

_PORTS = 3


@dataclass(frozen=True)
class Place:
    """Where an agent is: its address for others, and what it must not share while it is measured.

    Either `command` starts its end, or one listens on port `control` of `host` already. A prefill end listens on
    `stream` and `limit` for what is measured; 0 takes any free port.
    """

    name: str
    command: tuple[str, ...]
    host: str
    shares: str
    control: int = 0
    stream: int = 0
    limit: int = 0


def local(role: Role, number: int) -> Place:
    """An end on this machine."""
    command = (sys.executable, "-m", "pdstack.transfer.qualify.end")
    return Place(f"{role.value}-{number}", command, "127.0.0.1", "this host")


def read_places(file: Path) -> dict[Role, list[Place]]:
    """Where the agents are, from JSON: ``{"prefill": [{"name", "command", "host", "shares"}, ...], "decode": [...]}``.

    Instead of `command` there may be `ports`: those of control, stream and limit (of decode control alone). Raises
    ValueError, saying what is wrong with the file.
    """
    try:
        found = json.loads(file.read_text())
        places = {role: [_place(entry) for entry in found[role.value]] for role in Role}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not say where agents are: {type(error).__name__}: {error}") from error
    names = [place.name for role in Role for place in places[role]]
    if not all(places.values()) or len(set(names)) < len(names):
        raise ValueError(f"{file} has the agents {', '.join(names)}, wanted some of each role, each with its own name")
    return places


def _place(entry: Mapping[str, Any]) -> Place:
    texts = [entry[field] for field in ("name", "host", "shares")]
    command, ports = entry.get("command", []), entry.get("ports", [])
    if not isinstance(command, list) or not all(isinstance(text, str) and text for text in [*texts, *command]):
        raise ValueError(f"{entry!r:.200} has something else than text, or nothing, where text belongs")
    if bool(command) == bool(ports):
        raise ValueError(f"{entry!r:.200} has both a command and ports, or neither")
    if not isinstance(ports, list) or len(ports) > _PORTS or not all(_is_port(port) for port in ports):
        raise ValueError(f"{entry!r:.200} has the ports {ports!r}, wanted up to {_PORTS} numbers from 1 to 65535")
    return Place(texts[0], tuple(command), texts[1], texts[2], *ports)


def _is_port(port: object) -> bool:
    return isinstance(port, int) and not isinstance(port, bool) and 0 < port < 1 << 16

"""The one who asks: starts the ends, has all pairs measured in their rounds, and collects the results.

An end is a command that speaks as :mod:`pdstack.transfer.qualify.end` does. Locally that is a Python process; ``ssh
HOST docker run -i ...`` would serve as well, with `host` being the address under which decode reaches it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdstack.transfer.qualify.facts import Facts
from pdstack.transfer.qualify.measure import Measured
from pdstack.transfer.qualify.schedule import Pair, rounds
from pdstack.transfer.roles import Role

_OPEN_S = 60.0
_PING_S = 5.0


class EndFailed(RuntimeError):
    """An end died, was silent for too long, or refused a request. The message says which and why."""


class End:
    """One process that answers. Raises :class:`EndFailed`; after that it is dead and has to be started again."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=dict(environment), bufsize=0)
        self._rest = b""

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a request."""
        source, target = self._process.stdout, self._process.stdin
        if source is None or target is None:
            raise EndFailed(f"{self.name} was started without pipes")
        limit = time.monotonic() + timeout_s
        try:
            target.write(json.dumps(request).encode() + b"\n")
            while b"\n" not in self._rest:
                if not select.select([source], [], [], max(0.0, limit - time.monotonic()))[0]:
                    self.close()
                    raise EndFailed(f"{self.name} did not answer {request['do']!r} within {timeout_s:g} s: ended it")
                more = os.read(source.fileno(), 1 << 20)
                if not more:
                    raise BrokenPipeError
                self._rest += more
        except BrokenPipeError:
            code = self._process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise EndFailed(f"{self.name} ended with {how} at {request['do']!r}: see its standard error") from None
        line, self._rest = self._rest.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise EndFailed(f"{self.name} could not {request['do']}: {answer['failed']}")
        return answer

    @property
    def alive(self) -> bool:
        """False once it has ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it, at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass(frozen=True)
class Place:
    """Where an agent is: what to run there, its address for others, and what it must not share while measured."""

    name: str
    command: tuple[str, ...]
    host: str
    shares: str


def local(role: Role, number: int) -> Place:
    """An end on this machine."""
    command = (sys.executable, "-m", "pdstack.transfer.qualify.end")
    return Place(f"{role.value}-{number}", command, "127.0.0.1", "this host")


def read_places(file: Path) -> dict[Role, list[Place]]:
    """Where the agents are, from JSON: ``{"prefill": [{"name", "command", "host", "shares"}, ...], "decode": [...]}``.

    Raises ValueError, saying what is wrong with the file.
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
    command = entry["command"]
    if not all(isinstance(text, str) and text for text in [*texts, *command]) or not isinstance(command, list):
        raise ValueError(f"{entry!r:.200} has something else than text, or nothing, where text belongs")
    if not command:
        raise ValueError(f"{entry!r:.200} has no command")
    return Place(texts[0], tuple(command), texts[1], texts[2])


@dataclass(frozen=True)
class Wish:
    """What to measure: paths, block sizes and bytes of a read, rounds a size, and how long a path may take."""

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    nbytes: int
    rounds: int
    timeout_s: float


@dataclass(frozen=True)
class PairFound:
    """All paths of one pair, in the order asked, and the surroundings of its ends.

    `first` is what an earlier measurement of the same pair found, if it was measured again.
    """

    prefill: str
    decode: str
    one_host: bool
    paths: tuple[Measured, ...]
    prefill_facts: Facts
    decode_facts: Facts
    first: PairFound | None = None


class _Agent:
    """An end that is started when it is needed, and again after it was lost."""

    def __init__(self, place: Place, role: Role, owner: int, key: str, wish: Wish, environment: Mapping[str, str]):
        self.place, self._environment = place, environment
        self._end: End | None = None
        self._request: dict[str, Any] = {
            "do": "open",
            "role": role.value,
            "name": place.name,
            "owner": owner,
            "key": key,
        }
        self._request |= {"nbytes": 2 * wish.nbytes, "host": place.host, "paths": wish.paths}
        self.owner = owner
        self.opened: dict[str, Any] = {}

    def ready(self) -> End:
        if self._end is None or not self._end.alive:
            self.close()
            self._end = End(self.place.name, self.place.command, self._environment)
            self.opened = self._end.ask(self._request, _OPEN_S)
        return self._end

    def check(self) -> None:
        """End it if it does not answer: decode may have waited for it in vain, and the next pairs shall not."""
        if self._end is not None and self._end.alive:
            with contextlib.suppress(EndFailed):
                self._end.ask({"do": "ping"}, _PING_S)

    def facts(self) -> Facts:
        return Facts.parse(self.opened.get("facts", {}))

    def close(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.close()


def qualify(
    prefill: Sequence[Place],
    decode: Sequence[Place],
    wish: Wish,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[str], object] = lambda _: None,
    again: Callable[[PairFound], bool] = lambda _: False,
) -> list[PairFound]:
    """Measure every pair, and those once more for which `again` is true when all are done.

    What fails is in the result; only an end that cannot be started raises :class:`EndFailed`.
    """
    key = secrets.token_hex(32)
    environment = os.environ if environment is None else environment
    sources = [_Agent(at, Role.PREFILL, n + 1, key, wish, environment) for n, at in enumerate(prefill)]
    targets = [_Agent(at, Role.DECODE, n + 1, key, wish, environment) for n, at in enumerate(decode)]
    found: dict[tuple[int, int], PairFound] = {}
    try:
        with ThreadPoolExecutor(len(sources) + len(targets)) as threads:
            list(threads.map(_Agent.ready, [*sources, *targets]))
            plan = rounds([at.shares for at in prefill], [at.shares for at in decode])

            def measure(pair: Pair) -> PairFound:
                return _pair(sources[pair[0]], targets[pair[1]], wish)

            for number, pairs in enumerate(plan):
                progress(f"round {number + 1} of {len(plan)}: {len(pairs)} pairs")
                found.update(zip(pairs, threads.map(measure, pairs), strict=True))
            doubtful = {pair for pair, result in found.items() if again(result)}
            for pairs in plan:
                if chosen := [pair for pair in pairs if pair in doubtful]:
                    progress(f"{len(chosen)} pairs again")
                    for pair, result in zip(chosen, threads.map(measure, chosen), strict=True):
                        found[pair] = replace(result, first=found[pair])
    finally:
        for agent in [*sources, *targets]:
            agent.close()
    return [found[pair] for pair in sorted(found)]


def _pair(source: _Agent, target: _Agent, wish: Wish) -> PairFound:
    paths = tuple(_path(source, target, path, wish) for path in wish.paths)
    mine, theirs = target.facts(), source.facts()
    one_host = bool(mine.boot) and mine.boot == theirs.boot
    return PairFound(source.place.name, target.place.name, one_host, paths, theirs, mine)


def _path(source: _Agent, target: _Agent, path: str, wish: Wish) -> Measured:
    try:
        source.ready()
        end = target.ready()
        if path not in source.opened["metadata"]:
            why = source.opened["refused"].get(path, "was not opened")
            return Measured(path, error=f"{source.place.name}: {why}")
        request = {"do": "measure", "path": path, "metadata": source.opened["metadata"][path], "owner": source.owner}
        request |= {"limit": source.opened["limit"], "sizes": wish.sizes, "rounds": wish.rounds}
        return Measured.parse(end.ask(request, wish.timeout_s))
    except EndFailed as error:
        source.check()
        return Measured(path, error=str(error))

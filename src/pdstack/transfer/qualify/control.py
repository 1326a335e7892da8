"""The one who asks: starts the ends, has all pairs measured in their rounds, and collects the results.

An end is a command that speaks as :mod:`pdstack.transfer.qualify.end` does. Locally that is a Python process; ``ssh
HOST docker run -i ...`` would serve as well, with `host` being the address under which decode reaches it. Where ends
run already, behind a port each, :mod:`pdstack.transfer.qualify.remote` speaks with them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.qualify.ends import End, EndFailed
from pdstack.transfer.qualify.facts import Facts
from pdstack.transfer.qualify.listen import measurement_key
from pdstack.transfer.qualify.measure import Measured
from pdstack.transfer.qualify.places import Place
from pdstack.transfer.qualify.remote import RemoteEnd
from pdstack.transfer.qualify.schedule import Pair, rounds
from pdstack.transfer.roles import Role

_OPEN_S = 60.0
_PING_S = 5.0
# Containers of several hosts do not start at the same moment.
_REACH_S = 30.0


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


@dataclass(frozen=True)
class Keys:
    """What a measurement authenticates with: the streams' key, and for ends behind ports the cluster key.

    `run` is what such an end derives the streams' key from.
    """

    run: str
    measurement: str
    cluster: ClusterKey | None = None

    @classmethod
    def new(cls, cluster: ClusterKey | None = None) -> Keys:
        """Of one measurement."""
        run = secrets.token_hex(32)
        return cls(run, run if cluster is None else measurement_key(cluster, run), cluster)


class _Agent:
    """An end that is started when it is needed, and again after it was lost."""

    def __init__(self, place: Place, role: Role, owner: int, keys: Keys, wish: Wish, environment: Mapping[str, str]):
        self.place, self._environment, self._keys = place, environment, keys
        self._end: End | RemoteEnd | None = None
        self._request: dict[str, Any] = {
            "do": "open",
            "role": role.value,
            "name": place.name,
            "owner": owner,
            "ports": [place.stream, place.limit],
            # The key itself does not go over a network.
            **({"run": keys.run} if place.control else {"key": keys.measurement}),
        }
        self._request |= {"nbytes": 2 * wish.nbytes, "host": place.host, "paths": wish.paths}
        self.owner = owner
        self.opened: dict[str, Any] = {}

    def ready(self) -> End | RemoteEnd:
        if self._end is None or not self._end.alive:
            self.close()
            self._end = self._started()
            self.opened = _opened(self.place.name, self._end.ask(self._request, _OPEN_S))
        return self._end

    def _started(self) -> End | RemoteEnd:
        place = self.place
        if not place.control:
            return End(place.name, place.command, self._environment)
        if self._keys.cluster is None:
            raise EndFailed(f"{place.name} listens on a port and wants the cluster key: name its file (--key-file)")
        return RemoteEnd(place.name, place.host, place.control, self._keys.cluster, _REACH_S)

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


def _opened(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    """What an end says of itself when it is opened, each part of its kind. Raises :class:`EndFailed`."""
    try:
        Facts.parse(answer.get("facts", {}))
        for part in (answer.get("metadata", {}), answer.get("refused", {})):
            if not isinstance(part, dict) or not all(isinstance(text, str) for text in part.values()):
                raise ValueError("metadata or refusals that are not texts")
    except ValueError as error:
        raise EndFailed(f"{name} answered 'open' with something else: {error}") from error
    return answer


def qualify(
    prefill: Sequence[Place],
    decode: Sequence[Place],
    wish: Wish,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[str], object] = lambda _: None,
    again: Callable[[PairFound], bool] = lambda _: False,
    cluster_key: ClusterKey | None = None,
) -> list[PairFound]:
    """Measure every pair, and those once more for which `again` is true when all are done.

    What fails is in the result; only an end that cannot be started raises :class:`EndFailed`. `cluster_key` is for
    ends behind ports.
    """
    keys = Keys.new(cluster_key)
    environment = os.environ if environment is None else environment
    sources = [_Agent(at, Role.PREFILL, n + 1, keys, wish, environment) for n, at in enumerate(prefill)]
    targets = [_Agent(at, Role.DECODE, n + 1, keys, wish, environment) for n, at in enumerate(decode)]
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
        answer = end.ask(request, wish.timeout_s)
        try:
            return Measured.parse(answer)
        except ValueError as error:
            raise EndFailed(f"{target.place.name} answered 'measure' with something else: {error}") from error
    except EndFailed as error:
        source.check()
        return Measured(path, error=str(error))

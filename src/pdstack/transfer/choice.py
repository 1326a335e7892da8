"""Which path a decode agent takes to one prefill worker: the measured order, and evidence from transfers. Pure.

The order comes from the qualification before serving, or is the usual one. Now and then a transfer goes over another
path to see how fast that is; if one is clearly faster than the path in use, it becomes the path in use, with a
:class:`Change` that holds both figures.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

# Smaller transfers are fixed cost, and say nothing about a path's speed.
EVIDENCE_BYTES = 1 << 20
# A path has to be this much faster, by the medians of so many transfers each, before the path in use is left: on a busy
# host single transfers differ by more. Until there is that much evidence of each path, they are tried more often.
MARGIN = 1.25
ENOUGH = 5
EARLY_EVERY = 10
_REMEMBERED = 15


class Change(NamedTuple):
    """Another path is in use. Rates are bytes a second; None where the old path failed and nothing was compared."""

    before: str
    after: str
    before_rate: float | None
    after_rate: float | None
    reason: str


class _Evidence:
    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, rate: float) -> None:
        self._rates.append(rate)

    @property
    def transfers(self) -> int:
        return len(self._rates)

    @property
    def rate(self) -> float:
        return statistics.median(self._rates) if self._rates else 0.0


class Choice:
    """Of `paths`, best first. `recheck_every`: one of so many transfers goes over another path (0: none does)."""

    def __init__(self, paths: Sequence[str], recheck_every: int) -> None:
        if not paths:
            raise ValueError("no path to choose from")
        self._paths = list(paths)
        self._every = recheck_every
        self._evidence = {path: _Evidence() for path in paths}
        self._since = self._turn = 0
        self._looked: dict[str, int] = {}

    @property
    def current(self) -> str:
        """The path in use."""
        return self._paths[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """All that are left, the one in use first."""
        return tuple(self._paths)

    def rates(self) -> dict[str, float]:
        """Bytes a second of each path that has been used: the median of its last transfers."""
        return {path: found.rate for path, found in self._evidence.items() if found.transfers}

    def pick(self) -> str:
        """The path for the next transfer: the one in use, or now and then one of the others."""
        others = self._paths[1:]
        if not others or not self._every:
            return self.current
        self._since += 1
        known = min(self._evidence[path].transfers for path in others)
        if self._since < (min(EARLY_EVERY, self._every) if known < ENOUGH else self._every):
            return self.current
        self._since = 0
        # In turn, the one that was not looked at for longest.
        self._turn += 1
        path = min(others, key=lambda path: self._looked.get(path, 0))
        self._looked[path] = self._turn
        return path

    def other(self, than: str) -> str | None:
        """The best path that is not `than`; None if there is no other."""
        return next((path for path in self._paths if path != than), None)

    def note(self, path: str, nbytes: int, seconds: float) -> Change | None:
        """What a transfer was: evidence. Returns the change if `path` is in use from now on, and was not."""
        found = self._evidence.get(path)
        if found is None or nbytes < EVIDENCE_BYTES or seconds <= 0:
            return None
        found.add(nbytes / seconds)
        mine = self._evidence[self.current]
        if path == self.current or min(found.transfers, mine.transfers) < ENOUGH or found.rate < MARGIN * mine.rate:
            return None
        change = Change(
            self.current, path, mine.rate, found.rate, f"medians of {mine.transfers} and {found.transfers} transfers"
        )
        self._paths.remove(path)
        self._paths.insert(0, path)
        return change

    def drop(self, path: str, reason: str) -> Change | None:
        """`path` cannot be used. Returns the change if it was in use; the last path stays."""
        if path not in self._paths or len(self._paths) == 1:
            return None
        used = path == self.current
        self._paths.remove(path)
        found = self._evidence.pop(path)
        if not used:
            return None
        return Change(path, self.current, found.rate or None, self._evidence[self.current].rate or None, reason)

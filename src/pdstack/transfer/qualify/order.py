"""In which order agents shall try the paths to a peer: the usual one, unless a measurement speaks clearly against it.

What comes out goes to `transfer.order` in worker.json. A worker is restarted when its file changes, so noise must not
change it: a path that is usually later comes first only if it was at least a tenth faster, and in its slowest round
faster than the other in its fastest.
"""

from __future__ import annotations

from collections.abc import Mapping

from pdstack.transfer.paths.base import GPU_PATHS, ORDER
from pdstack.transfer.qualify.measure import Spread

# No pair has paths of both kinds.
_USUAL = (*ORDER, *GPU_PATHS)
MARGIN = 1.1


def order(seconds: Mapping[str, Spread]) -> tuple[str, ...]:
    """The paths that work (the keys) in the order to try them; `seconds` is the time of the same reads over each.

    Repeatedly the first of the usual order, or the fastest of those left if it is clearly faster.
    """
    left = [path for path in _USUAL if path in seconds]
    found = []
    while left:
        fastest = min(left, key=lambda path: seconds[path].median)
        best = fastest if _clearly(seconds[fastest], seconds[left[0]]) else left[0]
        left.remove(best)
        found.append(best)
    return tuple(found)


def _clearly(one: Spread, other: Spread) -> bool:
    return one.median * MARGIN <= other.median and one.high < other.low


def unusual(paths: tuple[str, ...]) -> bool:
    """True if agents would not find this order by themselves: they pass over paths that do not work."""
    return paths != tuple(path for path in _USUAL if path in paths)

"""In which order agents shall try the paths to a peer: the usual one, unless a measurement speaks clearly against it.

What comes out goes to `transfer.order` in worker.json. A worker is restarted when its file changes, so noise must not
change it: a path that is usually later comes first only if it was at least a tenth faster.
"""

from __future__ import annotations

from collections.abc import Mapping

from pdstack.transfer.paths import BACKEND
from pdstack.transfer.paths.base import GPU_PATHS

# Fastest first as a rule (benchmarks/kv_paths.py); how ``auto`` tries them where nothing was measured.
USUAL = ("shared", "cma", BACKEND, "stream")
# No pair has paths of both kinds.
_USUAL = (*USUAL, *GPU_PATHS)
MARGIN = 1.1


def order(seconds: Mapping[str, float]) -> tuple[str, ...]:
    """The paths that work (the keys) in the order to try them; `seconds` is the time of the same reads over each.

    Repeatedly the first of the usual order, or the fastest of those left if it is faster by :data:`MARGIN`.
    """
    left = [path for path in _USUAL if path in seconds]
    found = []
    while left:
        fastest = min(left, key=lambda path: seconds[path])
        best = fastest if seconds[fastest] * MARGIN <= seconds[left[0]] else left[0]
        left.remove(best)
        found.append(best)
    return tuple(found)


def unusual(paths: tuple[str, ...]) -> bool:
    """True if agents would not find this order by themselves: they pass over paths that do not work."""
    return paths != tuple(path for path in _USUAL if path in paths)

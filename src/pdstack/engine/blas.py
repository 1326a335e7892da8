"""The matrix library under numpy: its threads, and from how many columns on its results stop depending on them.

Measured with numpy 2.4.6 (OpenBLAS 0.3.31, SkylakeX kernels): a column of `weights @ columns` is bit for bit the same
whatever stands beside it, once the product is large enough to leave the gemv and small-matrix kernels. From which width
on that holds depends on the shape: 576 x 1536 weights from 2 columns, 576 x 192 only from 10. So the width is probed
for every shape when a model is loaded, and narrower products are padded up to it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["padded_width", "probe_min_width", "row_parts", "set_threads"]

log = logging.getLogger(__name__)

_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)
_SMALLEST_PART = 1 << 18  # elements: at 4 columns still beyond the small-matrix kernels
_CANDIDATES = (4, 8, 16, 24, 32, 48, 64)


def set_threads(count: int) -> bool:
    """Let OpenBLAS use `count` threads. Returns False (and logs) if no OpenBLAS is loaded in this process."""
    libraries = {
        line.split(maxsplit=5)[5].strip()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "openblas" in line
    }
    for path in sorted(libraries):
        library = ctypes.CDLL(path)
        for name in _SETTERS:
            setter = getattr(library, name, None)
            if setter is not None:
                setter(ctypes.c_int(count))
                return True
    log.warning("no OpenBLAS found in this process: engine.threads=%d has no effect", count)
    return False


def padded_width(width: int, minimum: int) -> int:
    """Columns to compute for `width` wanted ones: few distinct widths (minimum, then multiples of 8), all probed."""
    if width <= minimum:
        return minimum
    return -(-width // 8) * 8


def _widths(minimum: int, largest: int) -> Iterable[int]:
    yield minimum
    yield from range(-(-(minimum + 1) // 8) * 8, largest + 1, 8)


def row_parts(shape: tuple[int, ...], threads: int) -> list[slice]:
    """Ranges of rows of weights (N, K) to compute on different threads: about two a thread, none too small to gain."""
    rows, inner = shape
    count = 1 if threads == 1 else min(2 * threads, max(1, rows * inner // _SMALLEST_PART))
    step = -(-rows // (count * 16)) * 16
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def probe_min_width(weights: npt.NDArray[np.float32], largest: int, parts: list[slice]) -> int | None:
    """Smallest safe number of columns for `weights` (N, K), looking at all padded widths up to `largest`.

    Safe: each part of the rows, at each width, gives the bits of the whole product at the largest width. None if no
    width tried is: then tokens may depend on batching.
    """
    columns = np.random.RandomState(7).standard_normal((weights.shape[1], largest)).astype(np.float32)
    reference = weights @ columns
    good: dict[int, bool] = {}
    for minimum in _CANDIDATES:
        if minimum > largest:
            break
        for width in _widths(minimum, largest):
            if width not in good:
                some = np.ascontiguousarray(columns[:, :width])
                good[width] = all(np.array_equal(weights[part] @ some, reference[part, :width]) for part in parts)
            if not good[width]:
                break
        else:
            return minimum
    return None

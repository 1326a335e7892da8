"""Pinned and GPU memory for the block numbers and checksums of launches, kept from one to the next.

Allocating, pinning and copying through pageable memory would cost as long as moving 1 GiB within a GPU does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.plan import Offsets
from pdstack.transfer.store import Hashes

_LEAST = 4096


class Board:
    """For one caller at a time, in its lane: :meth:`begin`, uploads and :meth:`fetch`, wait for the lane, `fetched`."""

    def __init__(self, ordinal: int) -> None:
        self._device = f"cuda:{ordinal}" if gpu().device != "cpu" else "cpu"
        self._room = self._used = 0
        self._there: Any = None
        self._here: Any = None
        self._sums: Any = None
        self._count = 0

    def begin(self, numbers: int) -> None:
        """Room for so many numbers in all. What was uploaded before must not be in use any more."""
        self._used = self._count = 0
        if numbers > self._room:
            torch, pinned = gpu().torch, self._device != "cpu"
            self._room = max(_LEAST, numbers)
            self._there = torch.empty(self._room, dtype=torch.int64, device=self._device)
            self._here = torch.empty(self._room, dtype=torch.int64, pin_memory=pinned)
            self._sums = torch.empty(self._room, dtype=torch.int64, pin_memory=pinned)

    def upload(self, numbers: Offsets) -> Any:
        """Queue their copy to the GPU; int64 there."""
        part = slice(self._used, self._used + len(numbers))
        self._used = part.stop
        self._here[part].numpy()[:] = numbers
        self._there[part].copy_(self._here[part], non_blocking=True)
        return self._there[part]

    def fetch(self, sums: Any) -> None:
        """Queue the copy of checksums to here."""
        self._count = len(sums)
        self._sums[: self._count].copy_(sums, non_blocking=True)

    def fetched(self) -> Hashes:
        """The checksums, once the lane is finished."""
        found: Hashes = self._sums[: self._count].numpy().view(np.uint64).copy()
        return found

"""Staging memory of the path `staged`: few slots of host memory, whatever the number of peers and prompts."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pdstack.transfer.errors import LayoutMismatch
from pdstack.transfer.paths.base import Region
from pdstack.transfer.plan import Offsets
from pdstack.transfer.store import Hashes

SLOTS, SLOT_BYTES = 4, 32 << 20


class Slots:
    """Which slots are free. Whoever waits longest gets the next."""

    def __init__(self, count: int) -> None:
        self._free = deque(range(count))
        self._changed = threading.Condition()

    def take(self, timeout_s: float, stop: Callable[[], bool]) -> int | None:
        """A free slot; None if there was none for so long, or `stop()` is true (after which :meth:`wake` is due)."""
        with self._changed:
            self._changed.wait_for(lambda: stop() or bool(self._free), timeout_s)
            return self._free.popleft() if self._free and not stop() else None

    def give(self, slot: int) -> None:
        """Nobody uses it any more."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def wake(self) -> None:
        """Make those who wait look whether they must stop."""
        with self._changed:
            self._changed.notify_all()


class Stage(ABC):
    """Host memory in slots through which blocks of a pool leave, or arrive. Any thread; a slot has one user."""

    def __init__(self, array: npt.NDArray[np.uint8], slot_bytes: int, block_bytes: int, num_blocks: int) -> None:
        self.array, self.region = array, Region.of(array)
        self.slot_bytes, self.block_bytes, self.num_blocks = slot_bytes, block_bytes, num_blocks
        if not array.nbytes >= slot_bytes >= block_bytes:
            raise LayoutMismatch(
                f"a block has {block_bytes} bytes, a staging slot {slot_bytes}, all slots {array.nbytes}: "
                "make slots that hold a block"
            )
        self.slots = Slots(array.nbytes // slot_bytes)

    @abstractmethod
    def gather(self, blocks: Offsets, slot: int) -> None:
        """Copy blocks of the pool into a slot, one behind the other. They are there when this returns."""

    @abstractmethod
    def scatter(self, address: int, blocks: Offsets) -> Callable[[], Hashes]:
        """Begin to copy what lies at `address`, in a slot or an adopted region, into `blocks` of the pool.

        The result waits for it, and gives the blocks' hashes. Raises :class:`LayoutMismatch` for a block outside the
        pool, or named twice.
        """

    def adopt(self, region: Region) -> Callable[[], None] | None:  # noqa: ARG002  # not every stage can
        """Let :meth:`scatter` read other memory too, mapped read-only; the result ends that. None if it cannot."""
        return None

    def address(self, slot: int) -> int:
        """Where a slot begins."""
        return self.region.address + slot * self.slot_bytes

    @abstractmethod
    def finish(self) -> None:
        """Return when nothing that began still touches the pool or a slot."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the memory."""

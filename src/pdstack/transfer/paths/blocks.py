"""Paths of pools that are read in whole blocks, because what hashes them hashes whole blocks: those of GPU memory."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from pdstack.transfer.paths.base import PathPeer
from pdstack.transfer.plan import Offsets, Plan, ranges
from pdstack.transfer.store import Hashes


def whole_blocks(plan: Plan, block_bytes: int) -> tuple[Offsets, Offsets]:
    """The plan as block numbers of both pools. Raises ValueError if an extent is not made of whole blocks."""
    for values in (plan.source, plan.target, plan.nbytes):
        if np.any(values % block_bytes):
            raise ValueError(
                f"an extent of the plan does not begin or end with a block of {block_bytes} bytes: GPU pools of one "
                "layout are read in whole blocks (gpu.copy.copy_kv goes between different layouts)"
            )
    counts = plan.nbytes // block_bytes
    return ranges(plan.source // block_bytes, counts), ranges(plan.target // block_bytes, counts)


class BlockPeer(PathPeer):
    """A peer whose hashes are of whole blocks, so :meth:`read` has one for each block of the plan, in its order."""

    block_bytes: int

    @abstractmethod
    def read_blocks(self, sources: Offsets, targets: Offsets, *, checksum: bool = True) -> Hashes | None:
        """Read block `sources[i]` of the peer's pool into block `targets[i]` of ours, under the law of :meth:`read`.

        Returns the hash of each as it arrived, in the order given; None without `checksum`. Raises
        :class:`ReadFailed`, :class:`LayoutMismatch` for a block outside its pool, or written twice.
        """

    def read(self, plan: Plan, *, checksum: bool = True) -> Hashes | None:
        """See the base class."""
        sources, targets = whole_blocks(plan, self.block_bytes)
        return self.read_blocks(sources, targets, checksum=checksum)

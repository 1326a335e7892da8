"""Where prefill's blocks land: in decode's pool, or first in a staging area of prefill's block size.

The bytes are verified in prefill's own form, block by block, before the first of them is sliced into decode's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from pdstack.transfer.channel import Identity
from pdstack.transfer.config import TransferConfig
from pdstack.transfer.errors import ChecksumMismatch, LayoutMismatch
from pdstack.transfer.incoming import Incoming
from pdstack.transfer.layout import KVLayout, allocate_pool
from pdstack.transfer.paths import Importers, Region
from pdstack.transfer.paths.copying import LocalCopy, Mover
from pdstack.transfer.plan import Plan, Shard, slices
from pdstack.transfer.store import BlockStore, HostStore


class Landing:
    """In the pool itself, because both pools have blocks of one form. `store` holds what is read and hashed."""

    def __init__(self, store: BlockStore, importers: Importers) -> None:
        self.store, self.importers = store, importers

    @property
    def most(self) -> int:
        """Blocks that are read at once."""
        return max(1, self.store.batch_bytes // self.store.layout.block_bytes)

    def targets(self, incoming: Incoming, places: Sequence[int]) -> list[int]:
        """The blocks of `store` into which the blocks at `places` are read."""
        return [incoming.local[place] for place in places]

    def settle(self, incoming: Incoming, places: Sequence[int]) -> None:
        """The blocks at `places`, all of what was read or a part of it, are right. In the link's thread."""

    def close(self) -> None:
        """Let go of what is this landing's own. The routes must be closed before."""


class Staging(Landing):
    """In a staging area with prefill's block size; what is right is sliced into the pool.

    One read at a time, as a link has one thread. What decode held before is compared and not written.
    """

    def __init__(
        self, pool: BlockStore, layout: KVLayout, config: TransferConfig, name: str, identity: Identity
    ) -> None:
        if pool.kind != "host":
            raise LayoutMismatch(
                f"prefill has blocks of {layout.block_size} tokens, this worker of {pool.layout.block_size}: pools in "
                "GPU memory must have one block size"
            )
        blocks = max(1, pool.batch_bytes // layout.block_bytes)
        staging = replace(layout, num_blocks=blocks)
        store = HostStore(staging, allocate_pool(staging))
        super().__init__(store, Importers(config, name, store, identity))
        self._pool = pool
        self._source, self._target = Shard(staging), Shard(pool.layout)
        self._staged = Region(store.view.address, store.view.nbytes)
        self._region = Region(pool.view.address, pool.view.nbytes)
        self._copy = LocalCopy(self._staged, self._region)
        self._mover = Mover()
        self._slots: dict[int, int] = {}

    def targets(self, incoming: Incoming, places: Sequence[int]) -> list[int]:  # noqa: ARG002  # see the base class
        """See the base class: the first blocks of the staging area."""
        self._slots = {place: slot for slot, place in enumerate(places)}
        return list(range(len(places)))

    def settle(self, incoming: Incoming, places: Sequence[int]) -> None:
        """See the base class: slices their tokens into decode's blocks, but for those that decode held before."""
        size, tokens = self.store.layout.block_size, incoming.ticket.tokens
        held = incoming.held * self._pool.layout.block_size
        slots = np.zeros(len(incoming.ticket.blocks), np.int64)
        for place in places:
            slots[place] = self._slots[place]
        # One plan for each run of places: a plan covers a range of tokens.
        ordered = sorted(places)
        ends = [at + 1 for at, (one, next_one) in enumerate(pairwise(ordered)) if next_one != one + 1]
        for begin, end in pairwise([0, *ends, len(ordered)] if ordered else []):
            first, last = ordered[begin] * size, min((ordered[end - 1] + 1) * size, tokens)
            middle = min(max(first, held), last)
            self._compare(slices(self._source, slots, self._target, incoming.local, middle, skip=first))
            plan = slices(self._source, slots, self._target, incoming.local, last, skip=middle)
            self._mover.move(plan, self._copy, self._region, checksum=False)

    def _compare(self, plan: Plan) -> None:
        """What decode held before must be what prefill computed. Raises :class:`ChecksumMismatch`."""
        here, there = self._region.bytes(), self._staged.bytes()
        for source, target, nbytes in zip(
            *(column.tolist() for column in (plan.source, plan.target, plan.nbytes)), strict=True
        ):
            if here[target : target + nbytes] != there[source : source + nbytes]:
                raise ChecksumMismatch(
                    "a prefix that this worker holds is not what prefill computed for it: the prefix was not used",
                    code="prefix",
                )

    def close(self) -> None:
        """See the base class."""
        self._mover.close()
        self.importers.close()

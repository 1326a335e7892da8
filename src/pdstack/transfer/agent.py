"""What both roles share: :class:`TransferAgent`, which is created as one of them and refuses the other's work."""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pdstack.transfer.audit import AuditLog
from pdstack.transfer.channel import Identity
from pdstack.transfer.config import TransferConfig
from pdstack.transfer.errors import RoleError
from pdstack.transfer.exports import OnRelease
from pdstack.transfer.layout import KVLayout
from pdstack.transfer.metrics import TransferMetrics
from pdstack.transfer.roles import Role
from pdstack.transfer.store import BlockStore, store_of
from pdstack.transfer.ticket import Ticket

# How often each of some blocks has been given to a new owner.
Generations = Callable[[Sequence[int]], Sequence[int]]


@dataclass(frozen=True)
class TransferReport:
    """What one fetch did. Times are seconds: `seconds` is all of it, of which `read_seconds` bytes were moving.

    `bytes` and `blocks` were moved, `held_blocks` were here before. What moved over an own path has `backend` "path",
    and the path as `transport`. `checksum_seconds` is 0 where the copy's own pass took the hashes.
    """

    bytes: int
    blocks: int
    held_blocks: int
    descriptors: int
    seconds: float
    read_seconds: float
    checksum_seconds: float
    backend: str
    transport: str
    transport_detail: str
    peer: str
    first_token: int
    resumes: int

    @property
    def gbps(self) -> float:
        """10^9 bytes per second while reading."""
        return self.bytes / self.read_seconds / 1e9 if self.read_seconds else 0.0


class TransferAgent(ABC):
    """Moves KV of one worker. Created by :meth:`create` for one role; all methods run in one event loop."""

    role: Role

    def __init__(
        self,
        *,
        name: str,
        audience: str,
        store: BlockStore,
        config: TransferConfig,
        metrics: TransferMetrics,
        generations: Generations | None,
    ) -> None:
        self.name = name
        self.layout = store.layout
        self.config = config
        self.metrics = metrics
        self.incarnation = uuid.uuid4().hex
        self._generations = generations
        self._store = store
        self._fingerprint = store.layout.fingerprint()
        self._identity = Identity(name, self.incarnation, self.role, audience, config.cluster_key)
        self.audit = AuditLog(
            config.audit_file,
            config.audit_bytes,
            config.audit_files,
            agent=name,
            incarnation=self.incarnation,
            role=self.role.value,
        )
        metrics.agent.info(
            {
                "name": name,
                "role": self.role.value,
                "backend": config.backend,
                "path": config.path,
                "layout": self._fingerprint[:16],
            }
        )

    @staticmethod
    async def create(
        role: Role,
        *,
        name: str,
        audience: str,
        layout: KVLayout,
        pool: Any,
        config: TransferConfig,
        metrics: TransferMetrics | None = None,
        generations: Generations | None = None,
    ) -> TransferAgent:
        """An agent for `role`, ready to work: the pool is registered, and a prefill agent listens.

        `pool` has ``layout.shape`` and must live until :meth:`close`; make it with :func:`allocate_pool`, prefill's
        with the configured path. Or it is a torch tensor in GPU memory, one run of blocks.
        `audience` is who may use the tickets, ``namespace/model``; both sides must have the same. `generations` says
        how often each of some blocks has been given to a new owner: with it prefill refuses to serve a block that is
        not any more what it was when the ticket was issued.
        Raises :class:`BackendUnavailable`, :class:`PathUnavailable`, :class:`LayoutMismatch`, OSError if the address
        cannot be listened at or the audit file not written.
        """
        from pdstack.transfer.decode import DecodeAgent
        from pdstack.transfer.prefill import PrefillAgent

        kind: type[PrefillAgent] | type[DecodeAgent] = PrefillAgent if Role(role) is Role.PREFILL else DecodeAgent
        agent = kind(
            name=name,
            audience=audience,
            store=await asyncio.to_thread(store_of, layout, pool),
            config=config,
            metrics=metrics or TransferMetrics(),
            generations=generations,
        )
        try:
            await agent.start()
        except BaseException:
            agent.audit.close()
            raise
        return agent

    @abstractmethod
    async def start(self) -> None:
        """Register the pool and begin to work. Called by :meth:`create`."""

    @abstractmethod
    async def close(self) -> None:
        """Stop, and let go of the pool: afterwards no transfer reads or writes it."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """The state of the agent as a JSON-able dict."""

    def export(
        self,
        request_id: str,
        blocks: Sequence[int],
        tokens: int,
        first_token: int | None,
        on_release: OnRelease,
        generations: Sequence[int] | None = None,
    ) -> Ticket:
        """Prefill only: offer `blocks`, in the order of their tokens, to whoever gets the ticket.

        With a `first_token` all of them are final; with None the prompt is still being computed, and :meth:`advance`
        and :meth:`complete` say how far it is. `on_release(request_id, reason)` is called exactly once, in the event
        loop, when the blocks may be reused; final ones must not change before. It may come before the prompt is
        computed. `generations` belong to the blocks; they are asked for if the agent can ask.

        Raises ValueError for blocks outside the pool, :class:`TransferError` (code ``duplicate``) if this request id is
        exported now.
        """
        raise self._wrong_role("export", request_id, blocks, tokens, first_token, on_release, generations)

    def advance(self, request_id: str, ready: int) -> None:
        """Prefill only: the first `ready` blocks of an export are final. Ignored if it has been released."""
        raise self._wrong_role("export", request_id, ready)

    def complete(self, request_id: str, first_token: int) -> None:
        """Prefill only: the prompt is computed, all blocks are final. Ignored if the export has been released."""
        raise self._wrong_role("export", request_id, first_token)

    def fail(self, request_id: str, reason: str) -> None:
        """Prefill only: the prompt will not be computed. Releases the export (``uncomputed``) and tells its reader."""
        raise self._wrong_role("export", request_id, reason)

    async def withdraw(self, request_id: str) -> bool:
        """Prefill only: take an offer back. False if there is none, or if it is being read: then the end of the read
        releases it."""
        raise self._wrong_role("withdraw an export", request_id)

    async def drain(self, timeout_s: float) -> bool:
        """Prefill only: wait until nothing is exported; False if that took longer than `timeout_s`."""
        raise self._wrong_role("drain exports", timeout_s)

    async def fetch(self, ticket: Ticket, local_blocks: Sequence[int], held: int = 0) -> TransferReport:
        """Decode only: read the ticket's blocks into `local_blocks` as they become final, and verify them.

        The first `held` local blocks are there already: they are compared with prefill's, and never written. Returns
        only if every byte is what prefill computed. Raises a :class:`TransferError`; its `settled()` says when the
        local blocks may be reused. If the calling task is cancelled, the cancellation is delivered once they may.
        """
        raise self._wrong_role("fetch", ticket, local_blocks, held)

    async def discard(self, ticket: Ticket) -> None:
        """Decode only: tell prefill that nothing will be read. An unreachable peer is no error: a deadline exists."""
        raise self._wrong_role("discard a ticket", ticket)

    def _wrong_role(self, work: str, *_unused: object) -> RoleError:
        other = Role.DECODE if self.role is Role.PREFILL else Role.PREFILL
        return RoleError(f"agent {self.name!r} is a {self.role} agent and cannot {work}; that is {other}'s work")

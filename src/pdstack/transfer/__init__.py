"""How KV moves from a prefill worker to a decode worker, and why that is safe.

Each worker has one pool of KV blocks (:class:`KVLayout`) and one :class:`TransferAgent`, bound to its role when it is
created. A prompt's KV moves like this::

    prefill worker                                            decode worker
    --------------                                            -------------
    agent.export(request, blocks) -> ticket
        the blocks are hashed, and held
               ------- ticket, inside disaggregated_params ------->  agent.fetch(ticket, local_blocks)
                                                                     checks MAC, audience, layout, backend
               <------ control connection: both prove the key -----  (once per pair of workers)
        gives the backend's metadata, the right to read the pool ->  connects the backend
               <------ begin(ticket) ------------------------------
        checks the ticket again and its deadline: granted -------->
               <====== one-sided READ of the blocks (UCX or NIXL) ==
                                                                     hashes what arrived, compares
               <------ done ---------------------------------------
    on_release(request): the blocks may be reused

What is guaranteed, and by what:

*Only the right bytes are used.* The ticket carries the hash of the blocks; decode compares before it returns.
Blocks that were reused, torn or corrupted give :class:`ChecksumMismatch`, never wrong tokens.

*Blocks are not reused under a running read.* Prefill alone judges the deadline, by its own monotonic clock, and
only when a reader asks to begin. A granted export is released by the reader's word or by the loss of its
connection; a reader that lost its connection cannot succeed any more, because it fails the transfer
(:mod:`pdstack.transfer.exports`).

*Nothing is written into decode's blocks after a failed fetch.* A backend's ``read`` ends only when that is certain,
if need be by destroying the connection (UCX and NIXL cannot revoke a single read). If a fetch has to fail before
that, its error says so: wait for ``error.settled()`` before the local blocks are used again.

*Nobody else reads the pool.* A ticket alone opens nothing. The metadata with which memory can be read is given only
to a peer that has proved the cluster key, and every control frame is signed in sequence
(:mod:`pdstack.transfer.wire`). The KV bytes themselves are neither encrypted nor authenticated on the network by
UCX: keep its ports private.

*Roles do not mix.* A prefill agent has no code to read with, a decode agent none to export with, down to the
backends; the handshake refuses a peer of the wrong role.

*What carries the bytes is known.* UCX reports which transport it chose for the READ; it is parsed from UCX's own
log, per peer, and appears in every report, metric and in the log (:mod:`pdstack.transfer.transport`).

Beside the backend there are own paths (:mod:`pdstack.transfer.paths`), chosen by `TransferConfig.path` and taken by
decode, per prefill worker: `shared` (prefill's pool is mapped read-only; same host, prefill's pool from
:func:`allocate_pool` with that path), `cma` (the kernel copies from prefill's process; same host, the right to ptrace),
`stream` (plain TCP; its port is a free one of prefill's host that the handshake tells, so a firewall must let it
through), or `auto`, the first of these that connects, each refusal logged. A named path never falls back to another:
:class:`PathUnavailable` says why it cannot be had. Everything above holds on each of them; prefill frozen or killed
during a read of shared memory does not stop the read, and its result counts only if the hash is the ticket's.

Where things are: `agent` (the common surface), `prefill` and `decode` (the two roles), `exports` (prefill's state
machine), `ticket`, `wire` (frames and handshake on bytes), `channel` (the same on sockets), `layout` (pool,
fingerprint, runs), `checksum`, `backends` (ucx, nixl), `plan` and `paths` (shared, cma, stream), `transport`, `config`,
`metrics`, `limit` (memcpy, the yardstick).
"""

from __future__ import annotations

from pdstack.transfer.agent import TransferAgent, TransferReport
from pdstack.transfer.config import TransferConfig
from pdstack.transfer.errors import (
    AuthenticationFailed,
    BackendUnavailable,
    ChecksumMismatch,
    LayoutMismatch,
    PathUnavailable,
    PeerUnreachable,
    ProtocolError,
    ReadFailed,
    ReadTimeout,
    Refused,
    RoleError,
    TicketError,
    TransferError,
)
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.layout import KVLayout, allocate_pool
from pdstack.transfer.metrics import TransferMetrics
from pdstack.transfer.roles import ReleaseReason, Role
from pdstack.transfer.ticket import Ticket

__all__ = [
    "AuthenticationFailed",
    "BackendUnavailable",
    "ChecksumMismatch",
    "ClusterKey",
    "KVLayout",
    "LayoutMismatch",
    "PathUnavailable",
    "PeerUnreachable",
    "ProtocolError",
    "ReadFailed",
    "ReadTimeout",
    "Refused",
    "ReleaseReason",
    "Role",
    "RoleError",
    "Ticket",
    "TicketError",
    "TransferAgent",
    "TransferConfig",
    "TransferError",
    "TransferMetrics",
    "TransferReport",
    "allocate_pool",
]

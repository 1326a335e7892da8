"""How KV moves from a prefill worker to a decode worker, and why that is safe. With a picture: docs/how-kv-moves.md.

Each worker has one pool of KV blocks (:class:`KVLayout`) and one :class:`TransferAgent`, bound to its role when it is
created. A prompt's KV moves like this::

    prefill worker                                            decode worker
    --------------                                            -------------
    agent.export(request, blocks, ...) -> ticket
        the blocks are held
               ------- ticket, inside disaggregated_params ------->  agent.fetch(ticket, local_blocks, held)
                                                                     checks MAC, direction, audience, layout, backend
               <------ control connection: both prove the key -----  (once per pair of workers)
        gives what is needed to read the pool ----------------->     connects the best way that works
               <------ begin(ticket) ------------------------------
        checks the ticket again, its deadline, the blocks' generations: granted -->
    agent.advance(request, n): n blocks are final
        hashes them ------ ready(hashes) ------------------------->
               <====== READ of these blocks, one-sided ============  hashes what arrived, compares
               <------ ack ----------------------------------------
    agent.complete(request, first_token)
               ------- computed(first_token) --------------------->
               <------ done ---------------------------------------
    on_release(request): the blocks may be reused

What is guaranteed, and by what:

*Only the right bytes are used.* Prefill hashes each block when it becomes final, decode hashes it as it arrives, and
the two are compared before anything is used. What differs is read once more, over another way where there is one, and
then fails: :class:`ChecksumMismatch`, never wrong tokens. Blocks that decode holds already are not moved, and compared.

*Blocks are not reused under a running read.* Prefill alone judges the deadline, by its own monotonic clock, and
only when a reader asks to begin. A granted export is released by the reader's word, or when the reader was away for
`resume_s` (:mod:`pdstack.transfer.exports`). If the owner of the pool breaks this, the blocks' generations tell.

*Nothing is written into decode's blocks after a failed fetch.* A ``read`` ends only when that is certain, if need be by
destroying the connection (UCX and NIXL cannot revoke a single read). If a fetch has to fail before that, its error says
so: wait for ``error.settled()`` before the local blocks are used again.

*A lost connection costs what was lost.* The same run of the same reader may come back within `resume_s` and goes on;
what it has verified stays verified. A prefill that is gone or frozen is found by refused connections and missing
heartbeats; the error says how many leading blocks are good.

*Nobody else reads the pool.* A ticket alone opens nothing, and is good for the first of its audience that asks. The
means to read memory are given only to a peer that has proved the cluster key, and every control frame is signed in
sequence (:mod:`pdstack.transfer.wire`). The KV bytes themselves are neither encrypted nor authenticated on the network
by UCX: keep its ports private.

*Roles do not mix.* A prefill agent has no code to read with, a decode agent none to export with, down to the
backends; the handshake refuses a peer of the wrong role. On the path `shared` the kernel itself keeps decode from
writing.

*What carries the bytes is known.* UCX reports which transport it chose for the READ; it is parsed from UCX's own
log, per peer, and appears in every report, metric and record. Where `TransferConfig.path` is ``auto``, decode takes the
measured order of the ways, looks at the others now and then, and changes on evidence, never silently
(:mod:`pdstack.transfer.choice`). A named path never falls back to another: :class:`PathUnavailable` says why.

*Everything is on record.* Each transfer, refusal, lost connection and change of path is a line of JSON in a file that
rotates (:mod:`pdstack.transfer.audit`).

Where things are: `agent` (the common surface), `prefill` with `exports` (its state machine), `decode` with `link`
(one prefill agent), `fetch` (one transfer), `incoming` (what is here of it) and `landing` (where it goes), `choice`;
`ticket`, `wire` (frames and handshake on bytes), `channel` (the same on sockets); `layout`, `store` (blocks and their
hashes), `plan` (which bytes go where), `paths` (shared, cma, stream; of GPU memory cuda_ipc, staged), `gpu` (kernels),
`backends` (ucx, nixl); `transport`, `audit`, `config`, `metrics`; `qualify` (the proof of the path before serving),
`limit` (memcpy, the yardstick).
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

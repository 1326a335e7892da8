"""Own ways to move a plan's bytes between two processes' host memory, beside the libraries in `backends`.

`shared`: both processes map one sealed memfd, decode read-only by the kernel's will. `cma`: the kernel copies from a
process that owns its pool itself. `stream`: prefill pushes over plain sockets to where neither is possible.
`offers` and `routes` are how the agents use them: what prefill offers, and which decode takes. `pools` finds the
shared memory of a pool.
"""

from pdstack.transfer.paths.base import AUTO, BACKEND, CHOICES, PATHS, PathPeer, Region, hash_pieces
from pdstack.transfer.paths.cma import CmaExporter, CmaPeer
from pdstack.transfer.paths.offers import Offers, read_offers
from pdstack.transfer.paths.routes import Importers, PathReader, Routes
from pdstack.transfer.paths.shared import SharedExporter, SharedPeer, SharedPool
from pdstack.transfer.paths.stream import StreamExporter, StreamPeer

__all__ = [
    "AUTO",
    "BACKEND",
    "CHOICES",
    "PATHS",
    "CmaExporter",
    "CmaPeer",
    "Importers",
    "Offers",
    "PathPeer",
    "PathReader",
    "Region",
    "Routes",
    "SharedExporter",
    "SharedPeer",
    "SharedPool",
    "StreamExporter",
    "StreamPeer",
    "hash_pieces",
    "read_offers",
]

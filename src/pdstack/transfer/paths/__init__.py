"""Own ways to move a plan's bytes between two processes' host memory, beside the libraries in `backends`.

`shared`: both processes map one sealed memfd, decode read-only by the kernel's will. `cma`: the kernel copies from a
process that owns its pool itself. `stream`: prefill pushes over plain sockets to where neither is possible.
"""

from pdstack.transfer.paths.base import HASH_UNIT, PathPeer, Region, hash_pieces
from pdstack.transfer.paths.cma import CmaExporter, CmaPeer
from pdstack.transfer.paths.shared import SharedExporter, SharedPeer, SharedPool
from pdstack.transfer.paths.stream import StreamExporter, StreamPeer

__all__ = [
    "HASH_UNIT",
    "CmaExporter",
    "CmaPeer",
    "PathPeer",
    "Region",
    "SharedExporter",
    "SharedPeer",
    "SharedPool",
    "StreamExporter",
    "StreamPeer",
    "hash_pieces",
]

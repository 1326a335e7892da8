"""What every path is to its user: an exporter's metadata, and a peer that reads plans."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from pdstack.transfer.errors import PathUnavailable, ReadFailed
from pdstack.transfer.plan import Offsets, Plan
from pdstack.transfer.store import Hashes

# The own paths of pools in host memory, and those of pools in GPU memory. What `transfer.path` may be: the backend
# alone, one of the paths, or the best of all that connect.
PATHS = ("shared", "cma", "stream")
GPU_PATHS = ("cuda_ipc", "staged")
BACKEND, AUTO = "backend", "auto"
CHOICES = (BACKEND, *PATHS, *GPU_PATHS, AUTO)
# In which order ``auto`` tries them where nothing was measured: fastest first on one host (benchmarks/kv_paths.py), and
# between hosts the backend before plain TCP, because it may have RDMA.
ORDER = ("shared", "cma", BACKEND, "stream")


def paths_of(choice: str, kind: str = "host") -> tuple[str, ...]:
    """The paths, and the backend, that a choice allows, in the order in which they are tried.

    `kind` is that of the pool (`BlockStore.kind`). Raises :class:`PathUnavailable` for a choice of the other kind.
    """
    order = GPU_PATHS if kind == "cuda" else ORDER
    if choice != AUTO and choice not in order:
        where = "GPU memory" if kind == "cuda" else "host memory"
        raise PathUnavailable(
            f"kv_transfer_path is {choice!r} and the KV pool lies in {where}, wanted auto or one of {', '.join(order)}"
        )
    return order if choice == AUTO else (choice,)


class Region(NamedTuple):
    """Memory of this process."""

    address: int
    nbytes: int

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Region:
        """The memory of a C-contiguous array; the caller keeps the array."""
        if not array.flags.c_contiguous:
            raise ValueError("a region is one run of bytes, wanted a C-contiguous array")
        return cls(array.ctypes.data, array.nbytes)

    def bytes(self) -> memoryview:
        """The region as writeable bytes, without a copy."""
        return memoryview((ctypes.c_ubyte * self.nbytes).from_address(self.address)).cast("B")


def hash_pieces(memory: memoryview, offsets: Offsets, nbytes: Offsets) -> Hashes:
    """XXH3-64 of each piece of `memory`. Prefill's hashes of a split plan's sources equal decode's of its targets."""
    return np.array(hash_spans(memory, offsets.tolist(), (offsets + nbytes).tolist()), np.uint64)


def hash_spans(memory: memoryview, begins: list[int], ends: list[int]) -> list[int]:
    """The same of the bytes from each of `begins` to each of `ends`."""
    # Maps of built-ins: with short pieces, a loop in Python would cost as much as the hashes.
    return list(map(xxhash.xxh3_64_intdigest, map(memory.__getitem__, map(slice, begins, ends))))


class PathPeer(ABC):
    """Decode's connection to one exporter over one path. One thread at a time, except :meth:`abort`."""

    name: str

    @abstractmethod
    def read(self, plan: Plan, *, checksum: bool = True) -> Hashes | None:
        """Move the plan's bytes from the peer's pool into ours.

        Returns the hashes of what is in our memory now, one for each extent of ``split(plan, HASH_UNIT)``, to be
        compared with what prefill says its own are. None without `checksum`: for callers that check the bytes
        themselves, as the agents do, and for benchmarks.

        The law of the backends holds here too: when this returns or raises, our blocks are not written any more,
        whatever the peer or the network does later. Raises :class:`ReadFailed`, ValueError for a plan that leaves
        the pools.
        """

    @abstractmethod
    def abort(self) -> None:
        """Make a read in progress end soon with an error. Thread-safe; the peer cannot be used afterwards."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the peer's memory or connection."""


def aborted() -> ReadFailed:
    """The error of a read that :meth:`PathPeer.abort` ended."""
    return ReadFailed("the read was aborted")

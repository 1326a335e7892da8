"""The small interface that a transfer backend fills, and the one place that knows their names.

A backend is two classes, one per role, so that even here an exporter has nothing to read with and an importer nothing
to give away. All methods block; the agent calls everything that belongs to one peer from that peer's own thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from threading import Event

from pdstack.transfer.errors import BackendUnavailable, ReadFailed
from pdstack.transfer.layout import PoolView, Run, plan_runs
from pdstack.transfer.store import Hashes
from pdstack.transfer.transport import UNKNOWN, Transport, UcxLog

BACKENDS = ("ucx", "nixl")


# Reads in flight at a time where the peer's process is not involved.
WINDOW = 256
# Where it is, one: UCX (1.19 to 1.22) aborts the answering process if the reader's connection ends while further
# requests of it wait to be answered, so one dying decode worker would take the prefill worker with it.
EMULATED_WINDOW = 1


class Exporter(ABC):
    """Prefill's side: the pool is registered and can be read by whoever has :meth:`metadata`."""

    @abstractmethod
    def metadata(self) -> bytes:
        """What a peer needs to read the pool. It is the capability itself: give it to authenticated peers only."""

    @abstractmethod
    def tend(self) -> None:
        """Housekeeping; called every heartbeat of a peer. Must not block."""

    @abstractmethod
    def close(self) -> None:
        """Unregister the pool. No peer can read it afterwards."""


class NoExporter(Exporter):
    """Of a pool that no backend reads: one in GPU memory, which has paths of its own."""

    def metadata(self) -> bytes:
        """Nothing."""
        return b""

    def tend(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Peer(ABC):
    """Decode's connection to one exporter. One thread at a time, except :meth:`abort`."""

    def __init__(self) -> None:
        self._aborted = Event()
        self.parked = False

    @abstractmethod
    def transport(self, nbytes: int) -> Transport:
        """What carries a descriptor of `nbytes`; named "unknown" until that is known, at the first read."""

    def abort(self) -> None:
        """Make a read in progress end soon with an error. Thread-safe; the peer cannot be used afterwards."""
        self._aborted.set()

    @abstractmethod
    def read(self, runs: Sequence[Run]) -> None:
        """READ the runs from the peer's pool into ours.

        The law every backend keeps: when this returns or raises, our blocks are not written any more, whatever the
        peer or the network does later. Where hardware might still write, that takes closing the connection. Where
        the bytes arrive as messages that only we can unpack, it is enough never to look again, and better: the peer
        may be frozen with an answer half sent, and UCX would abort it at the end of the connection. Such a peer is
        left `parked`, to be closed once the other side is seen to be well again, or gone. Raises
        :class:`ReadFailed`.
        """

    def read_blocks(self, remote: Sequence[int], local: Sequence[int]) -> Hashes | None:
        """READ whole blocks, under the same law. Returns the hash of each as it arrived, in the order given, if the
        copy's own pass could take it (as :meth:`BlockStore.hashes`); None where bytes move without the processor.
        """
        self.read(plan_runs(remote, local))
        return None

    @abstractmethod
    def tend(self) -> None:
        """Let the connection do its housekeeping; called every heartbeat while it is idle."""

    @abstractmethod
    def close(self) -> None:
        """Drop the connection and everything in flight on it."""


class LoggedPeer(Peer):
    """A peer whose bytes UCX carries: UCX's log says how."""

    def __init__(self, name: str, log: UcxLog) -> None:
        super().__init__()
        self._name, self._log = name, log
        self._transports: dict[int, Transport] = {}

    def transport(self, nbytes: int) -> Transport:
        """See the base class: UCX says it at the first read."""
        known = self._transports.get(nbytes)
        if known is None:
            known = self._log.transport(self._name, nbytes)
            if known.name != UNKNOWN:
                self._transports[nbytes] = known
        return known

    def _window(self, nbytes: int) -> int:
        return WINDOW if self.transport(nbytes).one_sided else EMULATED_WINDOW

    def _given_up(self, nbytes: int) -> ReadFailed:
        """For a backend's read that finds itself aborted: decides whether the peer is parked."""
        transport = self.transport(nbytes)
        self.parked = transport.name != UNKNOWN and not transport.one_sided
        return ReadFailed("the read was aborted")


class Importer(ABC):
    """Decode's side: our pool can be written by our own reads, and by nobody else."""

    @abstractmethod
    def connect(self, metadata: bytes) -> Peer:
        """Connect to the exporter that gave `metadata`. Raises :class:`ReadFailed`."""

    @abstractmethod
    def close(self) -> None:
        """Unregister the pool. All peers must be closed before."""


def open_exporter(backend: str, name: str, pool: PoolView) -> Exporter:
    """Prefill's half of the backend. Raises :class:`BackendUnavailable`: there is no fall-back."""
    if backend == "ucx":
        from pdstack.transfer.backends import ucx

        return ucx.UcxExporter(name, pool)
    if backend == "nixl":
        from pdstack.transfer.backends import nixl

        return nixl.NixlExporter(name, pool)
    raise _unknown(backend)


def open_importer(backend: str, name: str, pool: PoolView) -> Importer:
    """Decode's half of the backend. Raises :class:`BackendUnavailable`: there is no fall-back."""
    if backend == "ucx":
        from pdstack.transfer.backends import ucx

        return ucx.UcxImporter(name, pool)
    if backend == "nixl":
        from pdstack.transfer.backends import nixl

        return nixl.NixlImporter(name, pool)
    raise _unknown(backend)


def _unknown(backend: str) -> BackendUnavailable:
    return BackendUnavailable(f"kv_transfer_backend is {backend!r}, wanted one of: {', '.join(BACKENDS)}")

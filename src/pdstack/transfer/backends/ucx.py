"""Backend `ucx`: one-sided READs (``ucp_get_nbx``) by UCX itself.

Exporter: one context, one worker, and one thread that sleeps on the worker's event descriptor; over TCP a READ is
answered by this thread (software emulation), over CMA the kernel copies and nobody is woken.

Importer: a context and a worker *per peer*, driven by the thread that reads. UCX has no way to revoke one read whose
answer may still come; destroying the worker revokes them all, and a peer of its own keeps that from hurting others.

Endpoints use error mode "peer", so that the death of either side is an error there and not an abort of the process
(mode "none" ends the surviving exporter with an assertion). In this mode UCX leaves out every transport that cannot
invalidate registered memory; for CMA that is a matter of ``UCX_CMA_MEMORY_INVALIDATE=y``, without which two
processes of one host would talk through TCP at a fifth of the speed (UCX 1.19.0 and 1.22.0).
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import threading
import time
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Sequence
from itertools import count

from pdstack.transfer.backends import ucp_binding as ucp
from pdstack.transfer.backends.base import Exporter, Importer, LoggedPeer, Peer
from pdstack.transfer.errors import ReadFailed
from pdstack.transfer.layout import PoolView, Run
from pdstack.transfer.metadata import ADDRESS, BASE64, read_metadata
from pdstack.transfer.transport import UcxLog

_log = logging.getLogger(__name__)
# How long a waiting thread sleeps at most before it looks whether it was told to stop.
_WAKE_S = 0.25
# How long the cancelled reads of a closing connection may take to end.
_CLOSE_S = 1.0


def _wait(worker: ucp.Worker, poller: select.poll, timeout_s: float) -> None:
    """Progress once; if there was nothing to do, sleep until the worker has an event or `timeout_s` passed."""
    if worker.progress() == 0 and worker.arm():
        poller.poll(timeout_s * 1000)


class UcxExporter(Exporter):
    """Registers the pool for remote reading and answers readers."""

    def __init__(self, name: str, pool: PoolView) -> None:
        self._log = UcxLog.of("ucx")
        library = ucp.load()
        self._context = ucp.Context(library, f"{name}/prefill")
        self._memory = ucp.Memory(
            self._context,
            pool.address,
            pool.nbytes,
            ucp.PROT_LOCAL_READ | ucp.PROT_LOCAL_WRITE | ucp.PROT_REMOTE_READ,
        )
        self._worker = ucp.Worker(self._context)
        self._metadata = json.dumps(
            {
                "ucx": ".".join(str(part) for part in library.version),
                "worker": b64encode(self._worker.address()).decode(),
                "rkey": b64encode(self._memory.pack_rkey()).decode(),
                "base": pool.address,
            }
        ).encode()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kv-ucx-progress", daemon=True)
        self._thread.start()

    def metadata(self) -> bytes:
        """Worker address, remote key and the pool's address, as JSON."""
        return self._metadata

    def tend(self) -> None:
        """See the base class."""
        self._log.forward()

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._worker.efd, select.POLLIN)
        try:
            while not self._stop.is_set():
                _wait(self._worker, poller, _WAKE_S)
        except ReadFailed:
            _log.exception("the UCX progress thread ended: no KV can be read over transports that need it")

    def close(self) -> None:
        """See the base class."""
        self._stop.set()
        self._thread.join()
        self._worker.close()
        self._memory.close()
        self._context.close()
        self._log.forward()


class UcxImporter(Importer):
    """Reads from exporters into the pool."""

    def __init__(self, name: str, pool: PoolView) -> None:
        self._name = name
        self._pool = pool
        self._numbers = count(1)
        self._log = UcxLog.of("ucx")
        # Create and drop one context now, so that a wrong UCX_TLS fails at start and not at the first request.
        ucp.Context(ucp.load(), f"{name}/check").close()

    def connect(self, metadata: bytes) -> Peer:
        """Connect with a context and a worker made for this peer alone."""
        return UcxPeer(f"{self._name}/{next(self._numbers)}", self._pool, metadata, self._log)

    def close(self) -> None:
        """See the base class."""
        self._log.forward()


class UcxPeer(LoggedPeer):
    """One exporter as seen by one importer."""

    def __init__(self, name: str, pool: PoolView, metadata: bytes, log: UcxLog) -> None:
        super().__init__(name, log)
        library = ucp.load()
        self._pool = pool
        values = read_metadata(metadata, "UCX", base=ADDRESS, worker=BASE64, rkey=BASE64)
        self._base = values["base"]
        try:
            address, rkey = (b64decode(values[name], validate=True) for name in ("worker", "rkey"))
        except ValueError as error:
            raise ReadFailed(f"the peer's UCX metadata cannot be read: {error}") from error
        self._context = ucp.Context(library, name)
        self._memory = ucp.Memory(self._context, pool.address, pool.nbytes, ucp.PROT_LOCAL_READ | ucp.PROT_LOCAL_WRITE)
        self._worker = ucp.Worker(self._context)
        self._poller = select.poll()
        self._poller.register(self._worker.efd, select.POLLIN)
        self._pending: deque[int] = deque()
        self._endpoint: ucp.Endpoint | None = None
        self._rkey: ucp.RemoteKey | None = None
        try:
            self._endpoint = ucp.Endpoint(self._worker, library, address, ucp.ERR_MODE_PEER)
            self._rkey = self._endpoint.unpack_rkey(rkey)
        except ReadFailed:
            self.close()
            raise

    def read(self, runs: Sequence[Run]) -> None:
        """See the base class."""
        endpoint = self._endpoint
        rkey = self._rkey
        if endpoint is None or rkey is None or self.parked:
            raise ReadFailed("the UCX connection to this peer is closed")
        size, pending = self._pool.block_bytes, self._pending
        try:
            for run in runs:
                while len(pending) >= self._window(run.blocks * size):
                    self._reap(endpoint, pending)
                request = endpoint.get(
                    self._pool.address + run.local * size,
                    run.blocks * size,
                    self._base + run.remote * size,
                    rkey,
                    self._memory,
                )
                if request is not None:
                    pending.append(request)
            while pending:
                self._reap(endpoint, pending)
        except BaseException:
            if not self.parked:
                self.close()
            raise

    def _reap(self, endpoint: ucp.Endpoint, pending: deque[int]) -> None:
        if self._aborted.is_set():
            raise self._given_up(self._pool.block_bytes)
        _wait(self._worker, self._poller, _WAKE_S / 10)
        # Reads end nearly in order, so it is enough to look at the oldest.
        while pending and endpoint.status(pending[0]) != ucp.UCS_INPROGRESS:
            endpoint.finish(pending.popleft())

    def tend(self) -> None:
        """See the base class."""
        while self._endpoint is not None and not self.parked and self._worker.progress():
            pass
        self._log.forward()

    def close(self) -> None:
        """See the base class."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            # A parked peer is not progressed any more, so its endpoint goes with its worker. Any other is closed first:
            # UCX asserts that a worker has nothing in flight on transports like CMA.
            if not self.parked:
                self._close_endpoint(endpoint)
            if self._rkey is not None:
                endpoint.forget(self._rkey)
        self._worker.close()
        self._memory.close()
        self._context.close()
        self._log.forward()

    def _close_endpoint(self, endpoint: ucp.Endpoint) -> None:
        try:
            closing = endpoint.close()
        except ReadFailed as error:
            _log.info("closing the UCX endpoint of a lost peer: %s", error)
            closing = None
        if closing is not None:
            self._pending.append(closing)
        limit = time.monotonic() + _CLOSE_S
        while self._pending and time.monotonic() < limit:
            _wait(self._worker, self._poller, _WAKE_S / 10)
            while self._pending and endpoint.status(self._pending[0]) != ucp.UCS_INPROGRESS:
                with contextlib.suppress(ReadFailed):
                    endpoint.finish(self._pending.popleft())

"""Backend `nixl`: NIXL's READ through its UCX plugin (nixl-cu12 >= 1.4, no GPU and no torch needed).

Exporter: one agent with NIXL's progress thread, which the Python wrapper makes spin (it sets ``pthrDelay`` to 0,
one core per idle agent); 1000 us makes it sleep on its descriptors, and the wrapper has no parameter for it.

Importer: one agent *per peer* and no progress thread: the reading thread drives it. Releasing a NIXL transfer does not
cancel it (a late answer still writes into the target); destroying the agent does.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import time
import traceback
import uuid
from base64 import b64decode, b64encode
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pdstack.transfer.backends.base import Exporter, Importer, LoggedPeer, Peer
from pdstack.transfer.errors import BackendUnavailable, ReadFailed
from pdstack.transfer.layout import PoolView, Run
from pdstack.transfer.metadata import ADDRESS, BASE64, read_metadata
from pdstack.transfer.transport import UcxLog

PROGRESS_DELAY_US = 10_000
_MEMORY = "DRAM"
_api: Any = None


def _load() -> Any:
    """Import NIXL's Python API once, with the progress thread made to sleep."""
    global _api
    if _api is None:
        if "UCX_MODULES" not in os.environ and not Path("/dev/infiniband").is_dir():
            # The wheel's InfiniBand and EFA modules crash the interpreter at exit where the system has its own libnl.
            os.environ["UCX_MODULES"] = "^ib"
        try:
            module: Any = importlib.import_module("nixl_cu12._api")
        except ImportError as error:
            raise BackendUnavailable(
                f"kv_transfer_backend 'nixl' needs the Python package nixl-cu12 (1.4 or newer): {error}"
            ) from error
        # The wheel logs to stdout by itself; let it speak like everyone else, and only when it matters.
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
        base: Any = module.nixlBind.nixlAgentConfig

        class SleepingConfig(base):  # type: ignore[misc]  # base is a native class without stubs
            def __setattr__(self, name: str, value: object) -> None:
                super().__setattr__(name, PROGRESS_DELAY_US if name == "pthrDelay" else value)

        module.nixlBind.nixlAgentConfig = SleepingConfig
        _api = module
    return _api


def _agent(name: str, progress_thread: bool) -> Any:
    api = _load()
    try:
        agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress_thread, backends=[]))
        agent.create_backend("UCX", {})
    except Exception as error:  # NIXL's errors share no base class but Exception
        raise BackendUnavailable(f"NIXL cannot create an agent with its UCX plugin: {error}") from error
    return agent


class NixlExporter(Exporter):
    """Registers the pool with an agent whose metadata lets peers read it."""

    def __init__(self, name: str, pool: PoolView) -> None:
        self._log = UcxLog.of("nixl")
        self._agent = _agent(f"{name}-{uuid.uuid4().hex[:12]}", progress_thread=True)
        self._registered = self._agent.register_memory([(pool.address, pool.nbytes, 0, "kv")], _MEMORY)
        metadata = b64encode(self._agent.get_agent_metadata()).decode()
        self._metadata = json.dumps({"nixl": metadata, "base": pool.address}).encode()

    def metadata(self) -> bytes:
        """NIXL's agent metadata and the pool's address, as JSON."""
        return self._metadata

    def tend(self) -> None:
        """See the base class."""
        self._log.forward()

    def close(self) -> None:
        """See the base class."""
        self._agent.deregister_memory(self._registered)
        self._agent = None
        gc.collect()
        self._log.forward()


class NixlImporter(Importer):
    """Reads from exporters into the pool."""

    def __init__(self, name: str, pool: PoolView) -> None:
        self._pool = pool
        self._name = f"{name}-{uuid.uuid4().hex[:12]}"
        self._numbers = count(1)
        self._log = UcxLog.of("nixl")
        # Making an agent takes 0.4 s, and destroying one is how a read is given up: so one always stands by. One thread
        # makes them, never two at a time. The first is made now: a wrong environment fails at start.
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="kv-nixl-agent")
        self._spare = self._make()
        self._spare.result()

    def _make(self) -> Future[Any]:
        return self._maker.submit(_agent, f"{self._name}-{next(self._numbers)}", progress_thread=False)

    def connect(self, metadata: bytes) -> Peer:
        """Connect with an agent made for this peer alone."""
        spare, self._spare = self._spare, self._make()
        return NixlPeer(spare.result(), self._pool, metadata, self._log)

    def close(self) -> None:
        """See the base class."""
        self._maker.shutdown()
        del self._spare
        gc.collect()
        self._log.forward()


class NixlPeer(LoggedPeer):
    """One exporter as seen by an agent made for it alone."""

    def __init__(self, agent: Any, pool: PoolView, metadata: bytes, log: UcxLog) -> None:
        super().__init__(str(agent.name), log)
        self._agent, self._pool = agent, pool
        self._handle: Any = None
        try:
            values = read_metadata(metadata, "NIXL", base=ADDRESS, nixl=BASE64)
            self._base = values["base"]
            self._registered = agent.register_memory([(pool.address, pool.nbytes, 0, "kv")], _MEMORY)
            self._remote = agent.add_remote_agent(b64decode(values["nixl"], validate=True))
        except Exception as error:  # NIXL's errors share no base class but Exception
            self.close()
            raise ReadFailed(f"NIXL cannot connect to the peer: {error}") from error

    def _descriptors(self, rows: list[tuple[int, int]]) -> Any:
        table = np.array([(address, size, 0) for address, size in rows], dtype=np.uint64)
        return self._agent.get_xfer_descs(table, _MEMORY)

    def read(self, runs: Sequence[Run]) -> None:
        """See the base class."""
        if self._agent is None or self.parked:
            raise ReadFailed("the NIXL connection to this peer is closed")
        try:
            start = 0
            while start < len(runs):
                size = max(run.blocks for run in runs[start:]) * self._pool.block_bytes
                end = start + self._window(size)
                self._read_together(runs[start:end])
                start = end
        except Exception as error:  # NIXL's errors share no base class but Exception
            if not self.parked:
                # The frames of the failure hold the transfer's handle, which keeps the native agent alive.
                traceback.clear_frames(error.__traceback__)
                self.close()
            if isinstance(error, ReadFailed):
                raise
            raise ReadFailed(f"NIXL could not read: {error} ({type(error).__name__})") from error

    def _read_together(self, runs: Sequence[Run]) -> None:
        size = self._pool.block_bytes
        local = self._descriptors([(self._pool.address + run.local * size, run.blocks * size) for run in runs])
        remote = self._descriptors([(self._base + run.remote * size, run.blocks * size) for run in runs])
        handle = self._agent.initialize_xfer("READ", local, remote, self._remote)
        state = self._agent.transfer(handle)
        while state == "PROC":
            if self._aborted.is_set():
                error = self._given_up(size)
                if self.parked:
                    self._handle = handle  # releasing it would ask the peer's worker for progress
                raise error
            time.sleep(0)  # progress is made by asking, so ask again as soon as others have had their turn
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise ReadFailed(f"NIXL ended the read in state {state}")
        self._agent.release_xfer_handle(handle)

    def tend(self) -> None:
        """See the base class."""
        if self._agent is not None and not self.parked:
            self._agent.get_new_notifs()
        self._log.forward()

    def close(self) -> None:
        """See the base class."""
        self._handle = self._agent = None
        gc.collect()
        self._log.forward()

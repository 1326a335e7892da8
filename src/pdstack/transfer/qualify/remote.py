"""The asking side of :mod:`pdstack.transfer.qualify.listen`: an end behind a port, asked like a process here."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from pdstack.transfer.channel import Channel, connect
from pdstack.transfer.errors import PeerUnreachable, TransferError
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.qualify.ends import EndFailed, answered, ended_how
from pdstack.transfer.qualify.listen import identity
from pdstack.transfer.roles import Role

_RETRY_S = 0.2
_MARGIN_S = 10.0
_Value = TypeVar("_Value")


class _Channels:
    """The event loop of all channels, in a thread of its own: the callers are threads that wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def wait(self, work: Coroutine[Any, Any, _Value], timeout_s: float) -> _Value:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="kv-path-channels", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s + _MARGIN_S)


_channels = _Channels()


async def _connected(name: str, host: str, port: int, key: ClusterKey, patience_s: float) -> Channel:
    limit = time.monotonic() + patience_s
    while True:
        try:
            return await connect(host, port, identity("kv path", Role.DECODE, key))
        except PeerUnreachable as error:
            # Containers start one after another.
            if time.monotonic() >= limit:
                raise EndFailed(
                    f"{name} at {host}:{port} was not reached within {patience_s:g} s: {error}; does its container run "
                    "(docker logs), and is the port open between the hosts?"
                ) from error
        except TransferError as error:
            raise EndFailed(f"{name} at {host}:{port} is none of ours: {error}") from error
        await asyncio.sleep(_RETRY_S)


class RemoteEnd:
    """An end behind a port. Raises :class:`EndFailed`; after that its process is dead, and a new one has to be made."""

    def __init__(self, name: str, host: str, port: int, key: ClusterKey, patience_s: float) -> None:
        self.name = name
        self._channel = _channels.wait(_connected(name, host, port, key, patience_s), patience_s)
        self._alive = True

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a request."""

        async def exchange() -> dict[str, Any]:
            self._channel.send({"type": "request", "request": dict(request)})
            return await self._channel.receive(timeout_s)

        began = time.monotonic()
        try:
            message = _channels.wait(exchange(), timeout_s)
        except TransferError as error:
            self.close()
            if time.monotonic() - began >= timeout_s:
                said = f"did not answer {request['do']!r} within {timeout_s:g} s: ended it"
            else:
                said = f"was lost at {request['do']!r}: {error}"
            raise EndFailed(f"{self.name} {said}") from error
        if message["type"] != "answer":
            self.close()
            code = message.get("code")
            raise EndFailed(f"{self.name} {ended_how(code if isinstance(code, int) else 1, request['do'])}")
        return answered(self.name, request["do"], message.get("answer"))

    @property
    def alive(self) -> bool:
        """False once it has ended."""
        return self._alive

    def close(self) -> None:
        """End it, at once: its process goes with the connection."""
        if self._alive:
            self._alive = False
            with contextlib.suppress(TimeoutError):
                _channels.wait(self._channel.close(), 1.0)

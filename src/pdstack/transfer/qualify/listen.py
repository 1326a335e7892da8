"""An end behind a TCP port: what runs where a worker will run, until the measurement is over.

Whoever shows the cluster key (the handshake and the MACs are those of the agents' control channel) gets a process of
his own that speaks as :mod:`pdstack.transfer.qualify.end` does, and it ends with the connection: an end that crashed
or hangs costs that process and not the container. There is one conversation at a time; a new one ends the one before.

    python -m pdstack.transfer.qualify.end --listen 10.0.0.11:9500 --name prefill-0 --key-file /etc/pdstack/cluster.key
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Sequence
from typing import Any

from pdstack.transfer.channel import Channel, Identity, accept, close_writer
from pdstack.transfer.errors import PeerUnreachable, TransferError
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.roles import Role
from pdstack.transfer.wire import MAX_FRAME, Message

_log = logging.getLogger(__name__)
# Not a worker's audience: neither can be taken for the other, though all know the same key.
AUDIENCE = "kv path"
COMMAND = (sys.executable, "-m", "pdstack.transfer.qualify.end")
# A conversation without a word for so long is over, whatever became of the other side.
_IDLE_S = 1800.0


def identity(name: str, role: Role, key: ClusterKey) -> Identity:
    """Who speaks: the one who asks takes decode's part of the handshake, the end that answers takes prefill's."""
    return Identity(name, secrets.token_hex(8), role, AUDIENCE, key)


def measurement_key(key: ClusterKey, run: str) -> str:
    """The key of one measurement's streams, of which only its random `run` goes over the network (64 hex digits)."""
    return key.derive("kv path measurement", run.encode()).hex()


class Listener:
    """Serves conversations. `port` is the real one after :meth:`start`, also if 0 was asked for."""

    def __init__(self, name: str, key: ClusterKey, host: str, port: int, command: Sequence[str] = COMMAND) -> None:
        self._identity, self._key, self._host, self.port = identity(name, Role.PREFILL, key), key, host, port
        self._command = tuple(command)
        self._server: asyncio.Server | None = None
        self._talk: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises OSError if the port is taken."""
        self._server = await asyncio.start_server(self._greet, self._host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End the conversation with its process, and listen no more."""
        if self._server is not None:
            self._server.close()
        await self._end_talk()

    async def _end_talk(self) -> None:
        talk, self._talk = self._talk, None
        if talk is not None:
            talk.cancel()
            await asyncio.wait([talk])

    async def _greet(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            channel = await accept(reader, writer, self._identity)
        except TransferError as error:
            _log.warning("a stranger got nothing: %s", error)
            await close_writer(writer)
            return
        await self._end_talk()
        self._talk = asyncio.create_task(self._converse(channel))

    async def _converse(self, channel: Channel) -> None:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=MAX_FRAME)
        halves = [asyncio.create_task(self._ask(channel, process)), asyncio.create_task(_answer(channel, process))]
        try:
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            await channel.close()

    async def _ask(self, channel: Channel, process: asyncio.subprocess.Process) -> None:
        """Hand requests to the process until the other side is gone."""
        while True:
            try:
                request = dict((await channel.receive(_IDLE_S))["request"])
            except PeerUnreachable:
                return
            except (TransferError, KeyError, TypeError, ValueError) as error:
                _log.warning("a conversation was ended: %s", error)
                return
            if request.get("do") == "open":
                request["key"] = measurement_key(self._key, str(request.pop("run", "")))
            if process.stdin is not None:
                # If it is dead, the other half says so.
                with contextlib.suppress(OSError):
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    await process.stdin.drain()


async def _answer(channel: Channel, process: asyncio.subprocess.Process) -> None:
    """Hand answers back; the last one says how the process ended."""
    while process.stdout is not None and (line := await process.stdout.readline()):
        answer: Message = {"type": "answer", "answer": json.loads(line)}
        channel.send(answer)
    ended: dict[str, Any] = {"type": "ended", "code": await process.wait()}
    channel.send(ended)


async def serve(name: str, key: ClusterKey, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    listener = Listener(name, key, host, port)
    await listener.start()
    _log.info("end %s listens on %s:%d", name, host, listener.port)
    try:
        await stop.wait()
    finally:
        await listener.close()

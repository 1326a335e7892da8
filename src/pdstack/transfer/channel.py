"""A control connection: frames over asyncio streams, the handshake on both ends, and a heartbeat."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdstack.transfer.errors import AuthenticationFailed, PeerUnreachable, ProtocolError, Refused
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.roles import Role
from pdstack.transfer.wire import (
    MAX_FRAME,
    MAX_GREETING,
    Greeting,
    Handshake,
    Message,
    Seal,
    dump,
    encode,
    frame_length,
    parse,
)

HANDSHAKE_S = 5.0
_REFUSALS = ("role", "audience")
# A peer that says nothing for this many heartbeats is taken for gone.
MISSED_HEARTBEATS = 5
# What may wait for a peer to read it.
MAX_UNREAD = 4 * MAX_FRAME


@dataclass(frozen=True)
class Identity:
    """Who an agent is on the control channel."""

    name: str
    incarnation: str
    role: Role
    audience: str
    key: ClusterKey

    def greeting(self) -> Greeting:
        """A greeting with a fresh nonce."""
        return Greeting.new(self.name, self.incarnation, self.role, self.audience)


async def _read_frame(reader: StreamReader, limit: int) -> bytes:
    try:
        return await reader.readexactly(frame_length(await reader.readexactly(4), limit))
    except (asyncio.IncompleteReadError, OSError) as error:
        raise PeerUnreachable("the peer closed the control connection") from error


class Channel:
    """An authenticated connection. One task may receive; anyone may send."""

    def __init__(self, reader: StreamReader, writer: StreamWriter, seal: Seal, peer: Greeting) -> None:
        self._reader, self._writer, self._seal = reader, writer, seal
        self.peer = peer

    def send(self, message: Mapping[str, Any]) -> None:
        """Queue a message; frames leave in the order of the calls. A dead connection shows when receiving.

        One whose peer does not read is ended: what it asks for would pile up here.
        """
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD:
            self._writer.transport.abort()
        self._writer.write(encode(self._seal.sign(message), MAX_FRAME))

    async def receive(self, timeout_s: float) -> Message:
        """The next message. Raises :class:`PeerUnreachable` on silence or close, and what :meth:`Seal.check` raises."""
        try:
            async with asyncio.timeout(timeout_s):
                body = await _read_frame(self._reader, MAX_FRAME)
        except TimeoutError:
            raise PeerUnreachable(f"the peer was silent for {timeout_s:.1f} s") from None
        return self._seal.check(body)

    async def close(self) -> None:
        """Close the connection; what was queued is still sent if the peer reads."""
        await close_writer(self._writer)


async def close_writer(writer: StreamWriter) -> None:
    """Close a stream and wait a moment for it, whatever state it is in."""
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1.0):
            await writer.wait_closed()


def _send_greeting(writer: StreamWriter, message: Message) -> None:
    writer.write(encode(dump(message), MAX_GREETING))


async def _receive_greeting(reader: StreamReader, kind: str) -> Message:
    message = parse(await _read_frame(reader, MAX_GREETING))
    if message["type"] == "refused" and kind == "welcome":  # only the end that connects can be refused
        # Not yet authenticated, and codes become labels of metrics: only those that a refusal can have.
        code = message.get("code")
        raise Refused(
            f"the peer refused: {message.get('reason')!r:.300}", code=code if code in _REFUSALS else "refused"
        )
    if message["type"] != kind:
        raise ProtocolError(f"the peer sent {message['type']!r:.40}, wanted {kind!r}")
    return message


async def connect(host: str, port: int, identity: Identity) -> Channel:
    """Decode's end: connect, prove who we are, and have prefill prove who it is.

    Raises :class:`PeerUnreachable`, :class:`AuthenticationFailed`, :class:`Refused` or :class:`ProtocolError`.
    """
    where = f"prefill agent at {host}:{port}"
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                hello = identity.greeting()
                _send_greeting(writer, hello.message("hello"))
                message = await _receive_greeting(reader, "welcome")
                welcome = Greeting.parse(message)
                handshake = Handshake(identity.key, hello, welcome)
                handshake.check(message.get("proof"), handshake.prefill_proof, where)
                if welcome.role != Role.PREFILL or welcome.audience != identity.audience:
                    raise ProtocolError(
                        f"{where} is a {welcome.role} worker of {welcome.audience!r}, wanted a prefill worker of "
                        f"{identity.audience!r}"
                    )
                _send_greeting(writer, {"type": "auth", "proof": handshake.decode_proof})
            except BaseException:
                await close_writer(writer)
                raise
    except PeerUnreachable as error:
        raise PeerUnreachable(f"{where} closed the connection during the handshake") from error
    except TimeoutError:
        raise PeerUnreachable(f"{where} did not answer within {HANDSHAKE_S:.0f} s") from None
    except OSError as error:
        gone = isinstance(error, ConnectionRefusedError)
        raise PeerUnreachable(f"{where} cannot be reached: {error}", gone=gone) from error
    return Channel(reader, writer, handshake.seal(identity.role), welcome)


async def accept(reader: StreamReader, writer: StreamWriter, identity: Identity) -> Channel:
    """Prefill's end of :func:`connect`. The caller closes `writer` if this raises."""
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            hello = Greeting.parse(await _receive_greeting(reader, "hello"))
            if hello.role != Role.DECODE or hello.audience != identity.audience:
                reason = (
                    f"{hello.name} is a {hello.role} worker of {hello.audience!r}, "
                    f"wanted a decode worker of {identity.audience!r}"
                )
                code = "role" if hello.role != Role.DECODE else "audience"
                _send_greeting(writer, {"type": "refused", "code": code, "reason": reason[:300]})
                raise Refused(reason, code=code)
            welcome = identity.greeting()
            handshake = Handshake(identity.key, hello, welcome)
            _send_greeting(writer, welcome.message("welcome", proof=handshake.prefill_proof))
            message = await _receive_greeting(reader, "auth")
            handshake.check(message.get("proof"), handshake.decode_proof, f"decode agent {hello.name!r}")
    except TimeoutError:
        raise AuthenticationFailed(f"a client did not authenticate within {HANDSHAKE_S:.0f} s") from None
    return Channel(reader, writer, handshake.seal(identity.role), hello)

"""Frames and the handshake of the control channel. Plain functions and objects on bytes, no sockets.

A frame is a 4-byte big-endian length, then that many bytes. Before authentication the bytes are a JSON object; after it
they are a 32-byte MAC and a JSON object. The MAC key is one per direction and connection, and covers a running number,
so a frame cannot be altered, dropped, repeated, reordered or sent back.

The handshake is a mutual challenge and response over the cluster key::

    decode  -> hello   {v, name, incarnation, role, audience, nonce}
    prefill -> welcome {v, name, incarnation, role, audience, nonce, proof}
    decode  -> auth    {proof}

Both proofs cover both messages, so neither side's name, role or nonce can be changed on the way.
"""

from __future__ import annotations

import hmac
import json
import secrets
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pdstack.transfer.errors import AuthenticationFailed, ProtocolError
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.metadata import read_json
from pdstack.transfer.roles import Role

VERSION = 2
MAX_GREETING = 4096
MAX_FRAME = 4 << 20
MAC_BYTES = 32
_LENGTH = struct.Struct("!I")
_MAX_NAME = 256

Message = dict[str, Any]


def encode(body: bytes, limit: int) -> bytes:
    """One frame. Raises :class:`ProtocolError` if the body is longer than `limit`."""
    if len(body) > limit:
        raise ProtocolError(f"a frame of {len(body)} bytes was to be sent, the limit is {limit}")
    return _LENGTH.pack(len(body)) + body


def frame_length(header: bytes, limit: int) -> int:
    """The length that a frame's first four bytes announce. Raises :class:`ProtocolError` above `limit`."""
    length = int(_LENGTH.unpack(header)[0])
    if length > limit:
        raise ProtocolError(f"a frame of {length} bytes was announced, the limit is {limit}")
    return length


def dump(message: Mapping[str, Any]) -> bytes:
    """A message as bytes; equal messages give equal bytes."""
    return json.dumps(message, sort_keys=True, separators=(",", ":")).encode()


def parse(body: bytes) -> Message:
    """The message in a frame. Raises :class:`ProtocolError` unless it is a JSON object with a text ``type``."""
    try:
        message = read_json(body)
    except ValueError as error:
        raise ProtocolError(f"a frame of {len(body)} bytes is not JSON: {error}") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ProtocolError("a frame is not an object with a type")
    return message


@dataclass(frozen=True)
class Greeting:
    """What each side says of itself in the handshake."""

    name: str
    incarnation: str
    role: str
    audience: str
    nonce: str
    v: int = VERSION

    @classmethod
    def new(cls, name: str, incarnation: str, role: Role, audience: str) -> Greeting:
        """A greeting with a fresh nonce."""
        return cls(name, incarnation, role.value, audience, secrets.token_hex(16))

    @classmethod
    def parse(cls, message: Message) -> Greeting:
        """Read a greeting from a message. Raises :class:`ProtocolError`."""
        if message.get("v") != VERSION or isinstance(message.get("v"), bool):
            raise ProtocolError(f"the peer speaks version {message.get('v')!r:.40}, wanted {VERSION}")
        values: dict[str, str] = {}
        for field in ("name", "incarnation", "role", "audience", "nonce"):
            value = message.get(field)
            # They go into logs and metrics as they are.
            if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME or not value.isprintable():
                raise ProtocolError(
                    f"the peer's greeting has {field} {value!r:.40}, wanted 1 to {_MAX_NAME} printable characters"
                )
            values[field] = value
        return cls(v=VERSION, **values)

    def message(self, kind: str, **extra: str) -> Message:
        """The greeting as a message of type `kind`."""
        return {"type": kind, **asdict(self), **extra}


class Handshake:
    """The proofs and session keys that follow from both greetings and the cluster key."""

    def __init__(self, key: ClusterKey, hello: Greeting, welcome: Greeting) -> None:
        transcript = dump({"hello": asdict(hello), "welcome": asdict(welcome)})
        self._key, self._transcript = key, transcript
        self.prefill_proof = key.derive("handshake prefill", transcript).hex()
        self.decode_proof = key.derive("handshake decode", transcript).hex()

    @staticmethod
    def check(proof: object, wanted: str, who: str) -> None:
        """Raise :class:`AuthenticationFailed` unless `proof` is `wanted`."""
        if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(errors="replace"), wanted.encode()):
            raise AuthenticationFailed(
                f"{who} does not know this cluster's key: the workers' cluster_key_file differ, or it is a stranger"
            )

    def seal(self, role: Role) -> Seal:
        """What `role` uses to sign what it sends and to check what it receives."""
        keys = {side: self._key.derive(f"session {side.value}", self._transcript) for side in Role}
        other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
        return Seal(keys[role], keys[other])


class Seal:
    """Signs and checks the frames of one connection, in order."""

    def __init__(self, send_key: bytes, receive_key: bytes) -> None:
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0

    def sign(self, message: Mapping[str, Any]) -> bytes:
        """MAC and body of the next message."""
        body = dump(message)
        mac = hmac.digest(self._send_key, self._sent.to_bytes(8, "big") + body, "sha256")
        self._sent += 1
        return mac + body

    def check(self, signed: bytes) -> Message:
        """The message, if it is the peer's next one. Raises :class:`AuthenticationFailed`, :class:`ProtocolError`."""
        mac, body = signed[:MAC_BYTES], signed[MAC_BYTES:]
        wanted = hmac.digest(self._receive_key, self._received.to_bytes(8, "big") + body, "sha256")
        if not hmac.compare_digest(mac, wanted):
            raise AuthenticationFailed("a frame's MAC is wrong: it was altered, repeated or reordered")
        self._received += 1
        return parse(body)

"""The cluster key: one secret of a deployment, from which every key used here is derived."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

from pdstack.transfer.errors import AuthenticationFailed

MINIMUM_CHARACTERS = 32


class ClusterKey:
    """Holds the secret and derives one key per purpose from it; never prints it."""

    def __init__(self, secret: bytes) -> None:
        secret = secret.strip()
        if len(secret) < MINIMUM_CHARACTERS:
            raise AuthenticationFailed(
                f"the cluster key has {len(secret)} characters, wanted at least {MINIMUM_CHARACTERS}: "
                "make one with `openssl rand -hex 32`"
            )
        self._secret = hashlib.sha256(b"pdstack cluster key\0" + secret).digest()

    @classmethod
    def from_file(cls, path: str | Path) -> ClusterKey:
        """Read the key; refuses a file that every user of the machine can read."""
        file = Path(path)
        try:
            mode = file.stat().st_mode
            secret = file.read_bytes()
        except OSError as error:
            raise AuthenticationFailed(f"the cluster key {file} cannot be read: {error.strerror}") from error
        if mode & stat.S_IROTH:
            raise AuthenticationFailed(
                f"the cluster key {file} has mode {stat.S_IMODE(mode):04o}, so every user can read it: chmod o= {file}"
            )
        return cls(secret)

    def derive(self, purpose: str, context: bytes = b"") -> bytes:
        """A 32-byte key for one purpose and context."""
        return hmac.digest(self._secret, purpose.encode() + b"\0" + context, "sha256")

    def __repr__(self) -> str:
        return "ClusterKey(secret)"

"""Every error of the transfer package. Each says what was checked, what was found, what was wanted and what to do."""

from __future__ import annotations

import asyncio


class TransferError(Exception):
    """Base of all errors of a KV transfer. `code` is short, stable and safe to use as a metric label.

    `quarantine` is None if the local blocks may be reused at once. Otherwise a read may still write them: do not reuse
    them before :meth:`settled` has returned. So many leading local blocks as `verified_blocks` says hold what prefill
    exported, and will not be written.
    """

    code = "transfer"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.quarantine: asyncio.Future[None] | None = None
        self.verified_blocks = 0
        if code is not None:
            self.code = code

    async def settled(self) -> None:
        """Return once no read writes the local blocks of this transfer any more. Safe to call always, and twice."""
        if self.quarantine is not None:
            await asyncio.wait([self.quarantine])


class RoleError(TransferError):
    """The agent's role does not do this: prefill exports, decode fetches, and never the other way round."""

    code = "role"


class TicketError(TransferError):
    """A ticket was refused: forged, expired, replayed, for someone else, or for another layout. Nothing was read."""

    code = "ticket"


class Refused(TicketError):
    """The prefill agent refused; `code` says why: expired, replayed, unknown, forged, ... Nothing was read."""

    code = "refused"


class LayoutMismatch(TransferError):
    """The two pools do not store KV the same way, so their bytes mean different things. Nothing was read."""

    code = "layout"


class AuthenticationFailed(TransferError):
    """The peer does not know the cluster key, or a frame was altered. The connection was closed."""

    code = "auth"


class ProtocolError(TransferError):
    """The peer sent something that is not a frame of this protocol. The connection was closed."""

    code = "protocol"


class PeerUnreachable(TransferError):
    """The prefill agent cannot be reached, or its control connection was lost. `gone`: its process has surely ended."""

    code = "peer_unreachable"

    def __init__(self, message: str, *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class ReadFailed(TransferError):
    """The backend reported that a read failed; the target blocks hold undefined bytes but are not written any more."""

    code = "read_failed"


class ReadTimeout(TransferError):
    """The read did not end in time. See :meth:`TransferError.settled` before the target blocks are reused."""

    code = "read_timeout"


class ChecksumMismatch(TransferError):
    """The bytes read are not those that prefill exported."""

    code = "checksum"


class PathUnavailable(TransferError):
    """The configured path cannot be used on this machine, or between these two workers. No other is taken instead."""

    code = "path_unavailable"


class BackendUnavailable(TransferError):
    """The configured backend cannot be used on this machine. There is no fall-back on purpose."""

    code = "backend_unavailable"

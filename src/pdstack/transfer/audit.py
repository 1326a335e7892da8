"""The record of every transfer, refusal, change of path and quarantine: one JSON object a line, in a file that rotates.

Each line has `time` (seconds since the epoch), `event`, and who wrote it: `agent`, `incarnation`, `role`. A transfer's
line says which request, which blocks in which generation, with whom, over which path, how many bytes, their hash, how
long it took, and the verdict: "ok", or the code of the error.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from logging.handlers import RotatingFileHandler
from typing import Any

import numpy as np
import xxhash

_log = logging.getLogger(__name__)
# The last records are kept in memory too, for the worker's status page.
_RECENT = 256


class AuditLog:
    """Appends records to `file` ("": only in memory). At `nbytes` it is rotated; `files` earlier ones are kept.

    A record that cannot be written is logged as an error and does not stop a transfer: `lost` counts such records.
    Raises OSError if the file cannot be opened: an agent that shall keep records and cannot must not start.
    """

    def __init__(self, file: str, nbytes: int, files: int, **who: str) -> None:
        self._who = who
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self.lost = 0
        self._handler: RotatingFileHandler | None = None
        if file:
            self._handler = _File(file, nbytes, files, self._failed)

    def record(self, event: str, **values: Any) -> None:
        """Write one record; `values` are JSON-able."""
        entry = {"time": round(time.time(), 6), "event": event, **self._who, **values}
        self._recent.append(entry)
        if self._handler is not None:
            line = json.dumps(entry, separators=(",", ":"), default=str)
            self._handler.emit(logging.makeLogRecord({"msg": line}))

    def _failed(self) -> None:
        self.lost += 1
        if self.lost == 1:
            _log.exception("the audit file cannot be written: records are lost until it can")

    def recent(self) -> list[dict[str, Any]]:
        """The last records, oldest first."""
        return list(self._recent)

    def close(self) -> None:
        """Close the file."""
        if self._handler is not None:
            self._handler.close()


class _File(RotatingFileHandler):
    """Writes the message as it is: what is in a record is data, not a format."""

    def __init__(self, file: str, nbytes: int, files: int, on_failure: Callable[[], None]) -> None:
        super().__init__(file, maxBytes=nbytes, backupCount=files, encoding="utf-8")
        self._on_failure = on_failure

    def format(self, record: logging.LogRecord) -> str:
        return str(record.msg)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002  # logging's name; its own prints
        self._on_failure()


def digest(hashes: Sequence[int]) -> str:
    """One hash of many, as 16 hex digits: what both ends' records of a transfer have in common."""
    return str(xxhash.xxh3_64_hexdigest(np.array(hashes, "<u8").tobytes()))

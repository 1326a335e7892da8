"""Remember the last finished requests, so that a check can compare their tokens with another run's."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

KEPT = 512


class FinishedRequests:
    """The last `kept` records by request id. There is no list of ids: who asks must know the id."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._records: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def add(self, request_id: str, record: dict[str, Any]) -> None:
        """Remember a record, in place of an older one of the same id, and forget the oldest beyond the limit."""
        self._records.pop(request_id, None)
        self._records[request_id] = record
        if len(self._records) > self._kept:
            self._records.popitem(last=False)

    def get(self, request_id: str) -> dict[str, Any] | None:
        """Return the record, or None if the id is unknown or was forgotten."""
        return self._records.get(request_id)

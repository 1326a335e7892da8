"""Which transport UCX really uses, read from what UCX itself says.

With ``UCX_PROTO_INFO=y`` UCX logs a table per connection and operation when it chooses protocols. The log is sent
to an anonymous file in memory (no writable directory needed), from which the tables are parsed and every other line
of warning or worse is passed on to Python's logging. Both backends name their UCX contexts, one per peer, so a
table belongs to exactly one peer. UCX reads its environment once, when it is loaded: :meth:`UcxLog.of` must run
before.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import threading
from typing import ClassVar, NamedTuple

_log = logging.getLogger("pdstack.transfer.ucx")

# `| name intra-node cfg#1 | title |` up to UCX 1.20, the same on two lines since 1.21.
_TITLE = re.compile(
    r"\|\s+(?P<context>\S+)\s+(?P<scope>self|intra-node|inter-node)\s+cfg#\d+\s*(?:\|\s*(?P<title>.*?)\s*)?\|$"
)
_ROW = re.compile(
    r"\|\s+(?P<low>\d+[KMG]?)(?:\.\.(?P<high>\d+[KMG]?|inf))?\s+\|\s+(?P<how>.*?)\s+\|\s+(?P<config>.*?)\s+\|$"
)
_LINE = re.compile(r"\|\s+(?P<text>.*?)\s+\|$")
_LANE = re.compile(r"([a-z][a-z0-9_]*)/")
_MESSAGE = re.compile(r"UCX\s+(?P<level>[A-Z]+)\s+(?P<text>.*)$")
_FORWARD = {"WARN": logging.WARNING, "ERROR": logging.ERROR, "FATAL": logging.CRITICAL, "DIAG": logging.INFO}
UNKNOWN = "unknown"
_UNIT = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Transport(NamedTuple):
    """What carries the reads of one peer, as UCX itself reports it."""

    name: str  # e.g. "cma", "tcp", "rc_mlx5"; several are joined by "+"
    detail: str  # e.g. "zero-copy cma/memory"

    @property
    def one_sided(self) -> bool:
        """True if hardware or the kernel reads, False if the peer's process has to answer, or if UCX did not say."""
        return self.name != UNKNOWN and "emulation" not in self.detail


class Row(NamedTuple):
    """One range of a protocol table: operations of `low` to `high` bytes go `how` over `config`."""

    low: int
    high: float
    how: str
    config: str


class Table(NamedTuple):
    """One protocol table of UCX."""

    context: str
    scope: str
    title: str
    rows: tuple[Row, ...]


def _number(text: str) -> int:
    return int(text[:-1]) * _UNIT[text[-1]] if text[-1] in _UNIT else int(text)


def parse_tables(text: str) -> list[Table]:
    """All protocol tables in a UCX log, in order. Lines that are not part of one are skipped."""
    tables: list[Table] = []
    head: tuple[str, str, str] | None = None
    rows: list[Row] = []

    def end() -> None:
        nonlocal head
        if head is not None and rows:
            tables.append(Table(*head, tuple(rows)))
        head = None
        rows.clear()

    for raw in text.splitlines():
        at = raw.find("|")
        if at < 0:
            continue
        line = raw[at:].rstrip()
        if found := _TITLE.match(line):
            end()
            head = (found["context"], found["scope"], found["title"] or "")
        elif head is not None and (found := _ROW.match(line)):
            low = _number(found["low"])
            high = found["high"]
            rows.append(
                Row(
                    low,
                    low if high is None else float("inf") if high == "inf" else _number(high),
                    found["how"],
                    found["config"],
                )
            )
        elif head is not None and not head[2] and (found := _LINE.match(line)):
            head = (head[0], head[1], found["text"])
    end()
    return tables


def read_transport(tables: list[Table], context: str, nbytes: int) -> Transport | None:
    """The transport of a READ of `nbytes` from the peer whose context is `context`; None if no table says it."""
    for table in reversed(tables):
        if table.context != context or table.scope == "self" or "ucp_get" not in table.title:
            continue
        for row in table.rows:
            if row.low <= nbytes <= row.high:
                lanes = list(dict.fromkeys(_LANE.findall(row.config)))
                if lanes:
                    return Transport("+".join(lanes), f"{row.how} {row.config}")
    return None


class UcxLog:
    """UCX's log of one backend in this process (each backend brings a UCX of its own)."""

    _instances: ClassVar[dict[str, UcxLog]] = {}

    def __init__(self, owner: str) -> None:
        self._fd = os.memfd_create(f"pdstack-{owner}-log")
        self._forwarded = 0
        self._lock = threading.Lock()
        os.environ["UCX_LOG_FILE"] = f"/proc/self/fd/{self._fd}"
        os.environ["UCX_PROTO_INFO"] = "y"
        # UCX's own crash handler would write its report into this log, where nobody could find it.
        os.environ.setdefault("UCX_HANDLE_ERRORS", "none")

    @classmethod
    def of(cls, owner: str) -> UcxLog:
        """The log of backend `owner`; the first call sets the environment, so it comes before the library is loaded."""
        if owner not in cls._instances:
            cls._instances[owner] = cls(owner)
        return cls._instances[owner]

    @staticmethod
    def _flush() -> None:
        # UCX writes through a C stream; only the C library can push out what it still holds.
        ctypes.CDLL(None).fflush(None)

    def text(self) -> str:
        """Everything UCX has logged."""
        self._flush()
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0).decode(errors="replace")

    def transport(self, context: str, nbytes: int) -> Transport:
        """See :func:`read_transport`; ``("unknown", why)`` if UCX's log does not tell."""
        found = read_transport(parse_tables(self.text()), context, nbytes)
        return found or Transport(UNKNOWN, f"UCX logged no protocol of ucp_get for {context}")

    def forward(self) -> None:
        """Pass UCX's warnings and errors on to Python's logging, each once."""
        self._flush()
        with self._lock:
            size = os.fstat(self._fd).st_size
            data = os.pread(self._fd, size - self._forwarded, self._forwarded)
            end = data.rfind(b"\n") + 1
            self._forwarded += end
        for line in data[:end].decode(errors="replace").splitlines():
            if (found := _MESSAGE.search(line)) and found["level"] in _FORWARD:
                _log.log(_FORWARD[found["level"]], "%s", found["text"])

"""One pair over one path: are the bytes right, how fast do they come, what carries them. Runs in decode's process.

Prefill fills its pools with :func:`fill`: every eight bytes say where they are and whose. So decode can compare every
byte that it read, and every byte that it must not have written, without asking.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pdstack.transfer.backends import BACKENDS, Peer, open_importer
from pdstack.transfer.channel import Identity
from pdstack.transfer.errors import TransferError
from pdstack.transfer.layout import PoolView, Run
from pdstack.transfer.paths import PATHS as OWN_PATHS
from pdstack.transfer.paths import CmaPeer, PathPeer, Region, SharedPeer, StreamPeer
from pdstack.transfer.paths.base import GPU_PATHS
from pdstack.transfer.plan import Plan, blocks
from pdstack.transfer.transport import Transport

PATHS = (*OWN_PATHS, *GPU_PATHS, *BACKENDS)
Bytes = npt.NDArray[np.uint8]
# Of decode's pool before a read that is checked; no word of prefill's is made of it for all places at once.
_UNTOUCHED = 0xA5
_ODD = np.uint64(0x9E3779B97F4A7C15)
_STEP = 1 << 20


def values(places: npt.NDArray[np.uint64], owner: int) -> npt.NDArray[np.uint64]:
    """What the words at these places of `owner`'s pool hold. Different for every place and owner below 2^48 words."""
    return (places + (np.uint64(owner) << np.uint64(48))) * _ODD


def fill(pool: Bytes, owner: int) -> None:
    """Write :func:`values` to the whole pool, whose size is a multiple of 8 bytes."""
    words = pool.view(np.uint64)
    for begin in range(0, len(words), _STEP):
        end = min(begin + _STEP, len(words))
        words[begin:end] = values(np.arange(begin, end, dtype=np.uint64), owner)


class Spread(NamedTuple):
    """The median of some rounds, and what lies around it."""

    median: float
    low: float
    high: float

    @classmethod
    def parse(cls, values: Sequence[float]) -> Spread:
        """From JSON. Raises ValueError or TypeError unless these are three finite numbers."""
        spread = cls(*values)
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in spread):
            raise ValueError(f"{values!r:.80} are not three numbers")
        return spread

    @classmethod
    def of(cls, found: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(found), min(found), max(found))


@dataclass(frozen=True)
class Size:
    """Blocks of one size. `gbps` is 10^9 bytes a second; ratios are to the limit of that name in the same round."""

    block_bytes: int
    nbytes: int
    extents: int
    gbps: Spread
    ratios: Mapping[str, Spread]
    limits: Mapping[str, Spread]


@dataclass(frozen=True)
class Measured:
    """One path of one pair. `error` is None where it works; `wrong` counts the blocks that came wrong or unasked."""

    path: str
    transport: str = ""
    detail: str = ""
    wrong: int = 0
    error: str | None = None
    sizes: tuple[Size, ...] = ()

    @property
    def usable(self) -> bool:
        """True if it moves KV, and rightly."""
        return self.error is None and not self.wrong

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Measured:
        """From what :func:`dataclasses.asdict` and JSON made of one. Raises ValueError for anything else."""
        try:
            sizes = tuple(
                Size(
                    int(size["block_bytes"]),
                    int(size["nbytes"]),
                    int(size["extents"]),
                    Spread.parse(size["gbps"]),
                    {name: Spread.parse(ratio) for name, ratio in size["ratios"].items()},
                    {name: Spread.parse(limit) for name, limit in size["limits"].items()},
                )
                for size in values["sizes"]
            )
            texts = [values[name] for name in ("path", "transport", "detail")]
            wrong, error = values["wrong"], values["error"]
        except (KeyError, TypeError, AttributeError, OverflowError) as reason:
            raise ValueError(f"this is no measurement: {type(reason).__name__}: {reason}") from None
        if not all(isinstance(text, str) for text in texts) or not isinstance(error, str | None):
            raise ValueError("a measurement has something else than text where text belongs")
        if not isinstance(wrong, int):
            raise ValueError(f"a measurement has {wrong!r:.40} wrong blocks")
        return cls(texts[0], texts[1], texts[2], wrong, error, sizes)


class Reader(ABC):
    """A connection over one path, own or a backend's, as the measurement sees it."""

    @abstractmethod
    def read(self, plan: Plan, *, checksum: bool) -> None:
        """Move the plan's bytes. Backends hash nothing: the agent does that afterwards."""

    @abstractmethod
    def transport(self, nbytes: int) -> Transport:
        """What carries an extent of `nbytes`; known after the first read."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


class _OwnReader(Reader):
    def __init__(self, peer: PathPeer) -> None:
        self._peer = peer

    def read(self, plan: Plan, *, checksum: bool) -> None:
        self._peer.read(plan, checksum=checksum)

    def transport(self, nbytes: int) -> Transport:  # noqa: ARG002  # see the base class
        return Transport(self._peer.name, "own path")

    def close(self) -> None:
        self._peer.close()


class _BackendReader(Reader):
    def __init__(self, peer: Peer, granule: int, done: Callable[[], None]) -> None:
        self._peer, self._granule, self._done = peer, granule, done

    def read(self, plan: Plan, *, checksum: bool) -> None:  # noqa: ARG002  # see the base class
        size = self._granule
        columns = (plan.source // size, plan.target // size, plan.nbytes // size)
        self._peer.read([Run(*row) for row in zip(*(column.tolist() for column in columns), strict=True)])

    def transport(self, nbytes: int) -> Transport:
        return self._peer.transport(nbytes)

    def close(self) -> None:
        self._peer.close()
        self._done()


def open_reader(path: str, metadata: bytes, pool: Any, granule: int, identity: Identity) -> Reader:
    """Connect. `granule` divides every extent that will be read. Raises what the path raises."""
    if path in GPU_PATHS:
        from pdstack.transfer.qualify.gpu import GpuPool, GpuReader  # which builds on this module

        if not isinstance(pool, GpuPool):
            raise ValueError(f"path {path} reads into GPU memory: ask the ends for its paths alone")
        return GpuReader(path, metadata, pool, identity)
    region = Region.of(pool)
    if path == "shared":
        return _OwnReader(SharedPeer(metadata, region))
    if path == "cma":
        return _OwnReader(CmaPeer(metadata, region))
    if path == "stream":
        return _OwnReader(StreamPeer(metadata, region, identity))
    if path not in BACKENDS:
        raise ValueError(f"path {path!r}, wanted one of {', '.join(PATHS)}")
    importer = open_importer(path, identity.name, PoolView(region.address, granule, region.nbytes // granule))
    return _BackendReader(importer.connect(metadata), granule, importer.close)


class Case(NamedTuple):
    """Blocks of one size, in random order on both sides, in pools of twice their bytes."""

    block_bytes: int
    source: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    plan: Plan


def case(block_bytes: int, nbytes: int, seed: int) -> Case:
    """`nbytes` in blocks of `block_bytes` (at least one block), drawn by `seed`."""
    if block_bytes < 8 or block_bytes % 8 or block_bytes > nbytes:
        raise ValueError(f"blocks of {block_bytes} bytes, wanted a multiple of 8 up to the {nbytes} bytes of a read")
    count = nbytes // block_bytes
    rng = np.random.default_rng(seed)
    source, target = (rng.permutation(2 * count)[:count].astype(np.int64) for _ in range(2))
    return Case(block_bytes, source, target, blocks(block_bytes, source, target))


def wrong_blocks(pool: Bytes, case: Case, owner: int) -> int:
    """How many blocks of decode's pool are not what they must be: prefill's bytes, or untouched. All are compared."""
    words = case.block_bytes // 8
    rows = pool[: len(pool) // case.block_bytes * case.block_bytes].view(np.uint64).reshape(-1, words)
    inside = np.arange(words, dtype=np.uint64)
    wrong = 0
    step = max(1, _STEP // words)
    for begin in range(0, len(case.source), step):
        source = case.source[begin : begin + step].astype(np.uint64)
        wanted = values(source[:, None] * np.uint64(words) + inside, owner)
        wrong += int((rows[case.target[begin : begin + step]] != wanted).any(axis=1).sum())
    others = np.ones(len(rows), bool)
    others[case.target] = False
    idle = np.uint64(int.from_bytes(bytes([_UNTOUCHED]) * 8))
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        wrong += int((rows[part][others[part]] != idle).any(axis=1).sum())
    return wrong


def measure(
    path: str, reader: Reader, pool: Any, cases: Sequence[Case], owner: int, rounds: int, limits: Mapping[str, Any]
) -> Measured:
    """Check, then time, each case. In each round the limits run next to the path, so a slow minute slows them all.

    `limits` are objects with ``run(nbytes)``. Timed reads go without checksum on every path, as backends have none.
    """
    sizes, wrong = [], 0
    transport = Transport("", "")
    for one in cases:
        pool[:] = _UNTOUCHED
        reader.read(one.plan, checksum=True)  # as the agent reads
        wrong += wrong_blocks(pool, one, owner)
        transport = reader.transport(one.block_bytes)
        if wrong:
            break
        total = one.plan.total
        moves: dict[str, Callable[[], object]] = {name: partial(limit.run, total) for name, limit in limits.items()}
        moves[""] = partial(reader.read, one.plan, checksum=False)
        seconds: dict[str, list[float]] = {name: [] for name in moves}
        names = list(moves)
        for move in moves.values():
            move()
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                began = time.perf_counter()
                moves[name]()
                seconds[name].append(time.perf_counter() - began)
        mine = seconds.pop("")
        sizes.append(
            Size(
                one.block_bytes,
                total,
                len(one.plan),
                Spread.of([total / value / 1e9 for value in mine]),
                {name: Spread.of([a / b for a, b in zip(their, mine, strict=True)]) for name, their in seconds.items()},
                {name: Spread.of([total / value / 1e9 for value in their]) for name, their in seconds.items()},
            )
        )
    return Measured(path, transport.name, transport.detail, wrong, None, tuple(sizes))


def attempt(path: str, measured: Callable[[], Measured]) -> Measured:
    """What came of it; a path that refuses or fails is a result too, with its reason."""
    try:
        return measured()
    except (TransferError, OSError, MemoryError) as error:
        return Measured(path, error=f"{error} ({getattr(error, 'code', type(error).__name__)})")

"""A few threads that share out the pieces of one computation.

Instead of OpenBLAS's own threads: those spin while they wait for each other, so beside other work on the same cores two
of them were 4.5 times slower than one (SmolLM2-135M on two busy cores, 794 against 164 ms a step). Here a piece goes to
whoever is free next; a thread that the kernel keeps from running delays nobody but the piece it has begun.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

__all__ = ["Team"]


@dataclass(slots=True)
class _Job:
    piece: Callable[[int], None]
    count: int
    numbers: Iterator[int] = field(default_factory=itertools.count)
    done: SimpleQueue[BaseException | None] = field(default_factory=SimpleQueue)


class Team:
    """`size` threads, the caller's among them. Idle ones sleep."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._inboxes: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(size - 1)]
        for at, inbox in enumerate(self._inboxes):
            threading.Thread(target=self._help, args=(inbox,), name=f"pdstack-engine-{at + 1}", daemon=True).start()

    def run(self, piece: Callable[[int], None], count: int) -> None:
        """Call piece(0) ... piece(count - 1), each once, on any thread; return when all are done.

        Raises what a piece raised, after all have ended. One caller at a time.
        """
        if count == 1 or self.size == 1:
            for number in range(count):
                piece(number)
            return
        job = _Job(piece, count)
        for inbox in self._inboxes[: count - 1]:
            inbox.put(job)
        own = 0
        error: BaseException | None = None
        while (number := next(job.numbers)) < count:
            own += 1
            try:
                piece(number)
            except BaseException as raised:
                error = raised
        for _ in range(count - own):
            error = job.done.get() or error
        if error is not None:
            raise error

    def close(self) -> None:
        """Let the threads end."""
        for inbox in self._inboxes:
            inbox.put(None)

    @staticmethod
    def _help(inbox: SimpleQueue[_Job | None]) -> None:
        while (job := inbox.get()) is not None:
            while (number := next(job.numbers)) < job.count:
                error: BaseException | None = None
                try:
                    job.piece(number)
                except BaseException as raised:
                    error = raised
                job.done.put(error)
            del job

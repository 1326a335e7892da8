"""A queue of our own on one GPU, and the one way to say that nothing of it runs any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pdstack.transfer.errors import ReadFailed
from pdstack.transfer.gpu.needs import gpu

_T = TypeVar("_T")


class Lane:
    """A stream of GPU `ordinal`, apart from the engine's: a transfer neither waits for computation nor delays it.

    So it does not see the engine's unfinished work either: blocks that are exported must be computed, that is, the
    engine's own stream was synchronised (or an event after their last kernel was) before.
    """

    def __init__(self, ordinal: int) -> None:
        needs = gpu()
        self._torch = needs.torch
        self._ordinal = ordinal
        # Triton's interpreter works on host memory, in order, and needs no stream.
        self._stream: Any = None
        if needs.device != "cpu":
            with self._translated("a stream was made"), self._torch.cuda.device(ordinal):
                self._stream = self._torch.cuda.Stream()

    @contextmanager
    def on(self) -> Iterator[None]:
        """What is queued inside goes to this lane; for any thread."""
        if self._stream is None:
            yield
            return
        with self._torch.cuda.device(self._ordinal), self._torch.cuda.stream(self._stream):
            yield

    def finish(self) -> None:
        """Return when all that was queued here is over. Raises :class:`ReadFailed` if the GPU failed: then it is too,
        for a process whose GPU failed runs nothing on it any more."""
        if self._stream is not None:
            with self._translated("blocks were moved"):
                self._stream.synchronize()

    def run(self, call: Callable[[], _T], what: str) -> _T:
        """What `call` returns, in this lane; over when this returns or raises. `what` is for the error's text.

        Raises :class:`ReadFailed` with code ``gpu_failed`` if the GPU failed, and what `call` raises.
        """
        with self._translated(what), self.on():
            try:
                return call()
            finally:
                self.finish()

    def begin(self, call: Callable[[], _T], what: str) -> Callable[[], _T]:
        """Queue what `call` queues, and return at once a function that waits for it and gives what `call` returned.

        Both raise as :meth:`run` does.
        """
        with self._translated(what), self.on():
            result = call()
            event = None if self._stream is None else self._stream.record_event()

        def wait() -> _T:
            if event is not None:
                with self._translated(what):
                    event.synchronize()
            return result

        return wait

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's, for everything that CUDA reports
            text = str(error).partition("\n")[0]
            raise ReadFailed(
                f"GPU {self._ordinal} failed while {what}: {text}; if it says out of memory, give the KV pool less; "
                "otherwise this process has lost the GPU: look at nvidia-smi and dmesg for an Xid, and restart it",
                code="gpu_failed",
            ) from error

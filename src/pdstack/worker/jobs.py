"""What is common to the handling of every request: counting, cancelling, measuring, remembering.

The work of a request runs in a task of its own, and the generator that Dynamo holds only hands out what the task gives.
Measured with 0.7.0.post1: when a client goes away, Dynamo drops the generator without closing it, and Python learns of
that only when Rust takes the GIL for the next request. A clean-up inside the generator would come minutes late.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from pdstack.engine import RequestCancelled
from pdstack.worker.finished import FinishedRequests
from pdstack.worker.metrics import WorkerMetrics

log = logging.getLogger(__name__)

Work = Callable[["Job"], Awaitable[None]]


class Cancelled(Exception):
    """The client went away; nobody is left to answer."""


class Interrupted(Exception):
    """The worker was stopped before the answer was whole."""


class Job:
    """One attempt to serve a request.

    `request_id` is Dynamo's: equal in prefill and decode, and kept when a request moves to another worker. `key` names
    this attempt and never repeats in this process, so that two attempts of one request cannot meet in the engine.
    `engine_key` is the name that the engine knows it by: `key`, until its KV had to be asked for again.
    """

    def __init__(self, request_id: str, key: str, request: Mapping[str, Any]) -> None:
        self.request_id = request_id
        self.key = self.engine_key = key
        self.request = request
        self.started = time.monotonic()
        self.cancelled = False
        self.tokens: list[int] = []
        self.token_times: list[float] = []
        self.details: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.items: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.problem: Exception | None = None
        self.streaming = True
        self.watch: asyncio.Task[None] | None = None

    def end_stream(self) -> None:
        """Let the generator that Dynamo holds end, while the work goes on.

        From now on nobody hears of an error, and a client that goes away is not noticed: Dynamo drops the context.
        """
        self.streaming = False
        self.items.put_nowait(None)
        if self.watch is not None:
            self.watch.cancel()

    def note(self, token_ids: list[int], finish_reason: str | None) -> None:
        """Remember tokens that the client gets in another way."""
        now = time.monotonic()
        self.tokens.extend(token_ids)
        self.token_times.extend(now for _ in token_ids)
        self.finish_reason = finish_reason or self.finish_reason

    def give(self, token_ids: list[int], finish_reason: str | None, **more: Any) -> None:
        """Hand tokens to the client, in Dynamo's form; `more` goes into the same item."""
        self.note(token_ids, finish_reason)
        item: dict[str, Any] = {"token_ids": token_ids, **more}
        if finish_reason is not None:
            item["finish_reason"] = finish_reason
        self.items.put_nowait(item)

    def check(self) -> None:
        """Raise Cancelled if the client has gone."""
        if self.cancelled:
            raise Cancelled(self.request_id)


class Jobs:
    """All requests of this process: the ones in flight, and what is kept of finished ones."""

    def __init__(self, role: str, metrics: WorkerMetrics, finished: FinishedRequests) -> None:
        self._role = role
        self.metrics = metrics
        self._finished = finished
        self._numbers = itertools.count(1)
        self._in_flight: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._abandoned = False

    def abandon(self) -> None:
        """Leave what is in flight without an end: Dynamo then sees a broken stream, and moves it or says so.

        To be called when the process ends. The end of a generator would pass for a whole answer, and an error of
        ours would keep the request from going on elsewhere.
        """
        self._abandoned = True

    @property
    def in_flight(self) -> int:
        """How many requests are being handled."""
        return len(self._in_flight)

    async def wait_idle(self) -> None:
        """Wait until no request is being handled."""
        await self._idle.wait()

    async def serve(
        self,
        request: Mapping[str, Any],
        context: Any,
        work: Work,
        on_cancel: Callable[[Job], None],
        refusals: tuple[type[Exception], ...],
    ) -> AsyncIterator[dict[str, Any]]:
        """Do `work` and yield what it gives; an exception of `work` is raised here, after what was given before it.

        `on_cancel` is called once, in the event loop, when the client goes away before the work is done; it must make
        the work end soon. `refusals` are the errors that are the client's to mend, they are logged without a traceback.
        """
        job = Job(context.id(), f"{context.id()}#{next(self._numbers)}", request)
        self._in_flight[job.key] = job
        self._idle.clear()
        self.metrics.in_flight.inc()
        self._tasks[job.key] = asyncio.create_task(self._run(job, context, work, on_cancel, refusals))
        while (item := await job.items.get()) is not None:
            yield item
        if job.problem is not None and job.streaming:
            # Dynamo prints the traceback of what it catches; the frames of the task are in our own log already.
            raise job.problem.with_traceback(None)

    async def _run(
        self,
        job: Job,
        context: Any,
        work: Work,
        on_cancel: Callable[[Job], None],
        refusals: tuple[type[Exception], ...],
    ) -> None:
        job.watch = asyncio.create_task(self._watch(job, context, on_cancel))
        outcome = "error"
        try:
            await work(job)
            outcome = "ok"
        except (Cancelled, RequestCancelled):
            outcome = "cancelled"
        except asyncio.CancelledError:
            job.problem = Interrupted(f"request {job.request_id}: the worker was stopped before the answer was whole")
            raise
        except refusals as error:
            outcome, job.problem = "refused", error
            log.warning("request %s refused: %s", job.request_id, error)
        except Exception as error:
            job.problem = error
            if not job.cancelled:
                log.exception("request %s failed", job.request_id)
        finally:
            job.watch.cancel()
            self._finish(job, "cancelled" if job.cancelled else outcome)
            if job.streaming and not self._abandoned:
                job.items.put_nowait(None)

    async def _watch(self, job: Job, context: Any, on_cancel: Callable[[Job], None]) -> None:
        with suppress(asyncio.CancelledError):
            await context.async_killed_or_stopped()
            job.cancelled = True
            log.info("request %s: the client went away", job.request_id)
            on_cancel(job)

    def _finish(self, job: Job, outcome: str) -> None:
        del self._in_flight[job.key], self._tasks[job.key]
        if not self._in_flight:
            self._idle.set()
        self.metrics.in_flight.dec()
        self.metrics.requests.labels(outcome).inc()
        self.metrics.prompt_tokens.inc(len(job.request.get("token_ids") or ()))
        self.metrics.cached_tokens.inc(job.details.get("cached_tokens", 0))
        self.metrics.generated_tokens.inc(len(job.tokens))
        if job.token_times:
            self.metrics.first_token.observe(job.token_times[0] - job.started)
        for earlier, later in itertools.pairwise(job.token_times):
            self.metrics.inter_token.observe(later - earlier)
        record = {
            "request_id": job.request_id,
            "role": self._role,
            "outcome": outcome,
            "error": None if job.problem is None else f"{type(job.problem).__name__}: {job.problem}",
            "prompt_tokens": len(job.request.get("token_ids") or ()),
            "token_ids": job.tokens,
            "finish_reason": job.finish_reason,
            "seconds": round(time.monotonic() - job.started, 6),
            "first_token_seconds": round(job.token_times[0] - job.started, 6) if job.token_times else None,
            **job.details,
        }
        self._finished.add(job.request_id, record)

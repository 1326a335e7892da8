"""The request handlers, one per role. Dynamo calls `generate(request=..., context=...)`: the names are part of the API.

An exception before the first item becomes HTTP 500 with its text; after the first item it ends the stream with
`event: error`. There is no way to make a 4xx out of a worker that takes tokens.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

from pdstack.engine import ContextTooLong, Engine, Overloaded, Request
from pdstack.transfer import ReleaseReason, Ticket, TicketError, TransferAgent, TransferError, TransferReport
from pdstack.worker.again import INSTANCE, AskAgainFailed, Attempts, Prefill, prefill_request
from pdstack.worker.jobs import Job, Jobs
from pdstack.worker.requests import BadRequest, engine_request

log = logging.getLogger(__name__)

PARAMETERS = "disaggregated_params"
KV_PARAMETERS = "kv_transfer_params"
REFUSALS = (BadRequest, ContextTooLong, Overloaded, TicketError)


class Handler(ABC):
    """Serves requests of one role. `generate` is what Dynamo calls, `work` is what a role does for one request."""

    def __init__(self, engine: Engine, jobs: Jobs, max_context: int, default_max_tokens: int) -> None:
        self.engine = engine
        self.jobs = jobs
        self.max_context = max_context
        self.default_max_tokens = default_max_tokens

    def generate(self, request: Mapping[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """Serve one request: Dynamo's dict in, Dynamo's items out."""

        async def work(job: Job) -> None:
            wanted = engine_request(job.key, job.request_id, job.request, self.max_context, self.default_max_tokens)
            await self.work(job, wanted)

        return self.jobs.serve(request, context, work, self.cancel, REFUSALS)

    @abstractmethod
    async def work(self, job: Job, wanted: Request) -> None:
        """Serve `wanted`, which was made of `job.request`; tokens go to the client by `job.give`."""

    def cancel(self, job: Job) -> None:
        """Free what the engine holds for a request whose client went away."""
        self.engine.cancel(job.engine_key)


class PrefillHandler(Handler):
    """Exports the blocks of a prompt, answers with the ticket, and computes the prompt's KV into them.

    `instance` gives Dynamo's number of this worker, None while it is not registered.
    """

    def __init__(
        self,
        engine: Engine,
        agent: TransferAgent,
        jobs: Jobs,
        max_context: int,
        default_max_tokens: int,
        instance: Callable[[], int | None] = lambda: None,
    ) -> None:
        super().__init__(engine, jobs, max_context, default_max_tokens)
        self.agent = agent
        self.instance = instance

    async def work(self, job: Job, wanted: Request) -> None:
        """Give one item, with the ticket in `disaggregated_params`, as soon as the prompt has its blocks.

        Then the stream ends, because Dynamo's router waits for its end before it asks decode (measured with
        0.7.0.post1: for all of the 2 s that a prefill generator went on after its item). The computation goes on, and
        decode fetches each block when it is final. From now on the export decides what becomes of the request: when it
        is released before the end, because decode has gone or nobody came in time, the computation is cancelled.
        """

        def admitted(blocks: list[int], generations: list[int], tokens: int) -> None:
            job.check()
            ticket = self.agent.export(job.key, blocks, tokens, None, self._released, generations)
            job.details["blocks"] = len(blocks)
            job.give([], None, **{PARAMETERS: {KV_PARAMETERS: ticket.to_wire(), INSTANCE: self.instance()}})
            job.end_stream()

        try:
            result = await self.engine.prefill(wanted, admitted, lambda ready: self.agent.advance(job.key, ready))
        except Exception as error:
            # Without effect if there is no export (any more).
            self.agent.fail(job.key, f"{type(error).__name__}: {error}")
            raise
        self.agent.complete(job.key, result.first_token)
        job.note([result.first_token], result.finish_reason or "length")
        job.details |= {
            "cached_tokens": result.cached_tokens,
            "queue_seconds": round(result.queue_seconds, 6),
            "prefill_seconds": round(result.seconds, 6),
        }

    def _released(self, key: str, _reason: ReleaseReason) -> None:
        self.engine.release(key)


class DecodeHandler(Handler):
    """Fetches the KV cache that a ticket names and goes on from the first token. Never computes a prompt.

    Where the KV is lost, `prefill` is asked again, at most `attempts` times for one request.
    """

    def __init__(
        self,
        engine: Engine,
        agent: TransferAgent,
        jobs: Jobs,
        max_context: int,
        default_max_tokens: int,
        prefill: Prefill,
        attempts: int,
    ) -> None:
        super().__init__(engine, jobs, max_context, default_max_tokens)
        self.agent = agent
        self.prefill = prefill
        self.attempts = attempts
        self._settling: set[asyncio.Task[None]] = set()
        self._fetching: dict[str, asyncio.Task[TransferReport]] = {}

    async def work(self, job: Job, wanted: Request) -> None:
        """Give the first token, which prefill chose, then one item a step."""
        try:
            ticket, instance = ticket_of(job.request, job.request_id, wanted)
        except TicketError as error:
            self.agent.audit.record("refused", request=job.request_id, verdict=error.code, reason=str(error))
            raise
        attempts = Attempts(self.attempts)
        while True:
            try:
                first_token = await self._fetch(ticket, wanted, job)
                break
            except TransferError as error:
                if not attempts.another(error, instance):
                    raise
                log.warning(
                    "request %s: the KV at %s is lost (%s): asking prefill again, %d of %d",
                    *(job.request_id, ticket.worker, error.code, attempts.made, self.attempts),
                )
                self.jobs.metrics.prefill_again.labels(error.code).inc()
                job.details["asked_again"] = attempts.made
                try:
                    item = await self.prefill.ask(
                        prefill_request(job.request, PARAMETERS), job.request_id, attempts.avoid
                    )
                except AskAgainFailed as failure:
                    raise failure from error
            # Blocks of the attempt before may be in quarantine under its key.
            wanted = replace(wanted, request_id=f"{job.key}/{attempts.made}")
            ticket, instance = ticket_of(item, job.request_id, wanted)
        job.engine_key = wanted.request_id
        async for step in self.engine.decode(wanted, first_token):
            job.check()
            job.give(step.token_ids, step.finish_reason)
        job.check()

    def cancel(self, job: Job) -> None:
        """See :class:`Handler`; a fetch is cut off as well, so that prefill stops to compute for nobody."""
        super().cancel(job)
        if (fetching := self._fetching.get(job.key)) is not None:
            fetching.cancel()

    async def _fetch(self, ticket: Ticket, wanted: Request, job: Job) -> int:
        """Bring the prompt's KV into blocks of our own; the first token. On any error nothing stays reserved."""
        job.engine_key = key = wanted.request_id
        try:
            job.check()
            there = await self.engine.reserve(wanted)
            job.check()
        except BaseException:
            # The client may have gone after the reservation was made; one that was not made is no matter.
            self.engine.unreserve(key)
            await self.agent.discard(ticket)
            raise
        fetching = asyncio.create_task(self.agent.fetch(ticket, there.blocks, there.held))
        self._fetching[job.key] = fetching
        try:
            report = await fetching
            job.check()
        except TransferError as error:
            if error.code == "prefix":
                self.engine.forget(there.blocks[error.verified_blocks : there.held])
            # The request goes on or ends now; the blocks wait until nothing can write into them any more.
            self._unreserve_later(key, error)
            raise
        except BaseException:
            self.engine.unreserve(key)
            job.check()
            raise
        finally:
            del self._fetching[job.key]
        job.details["transfer"] = {
            "bytes": report.bytes,
            "held_blocks": report.held_blocks,
            "resumes": report.resumes,
            "seconds": round(report.seconds, 6),
            "read_seconds": round(report.read_seconds, 6),
            "backend": report.backend,
            "transport": report.transport,
        }
        return report.first_token

    def _unreserve_later(self, key: str, error: TransferError) -> None:
        """Give a reservation back once nothing writes into it. What was verified is in the prefix cache at once."""
        if error.quarantine is None:
            self.engine.unreserve(key, error.verified_blocks)
            return
        self.engine.quarantine(key, error.verified_blocks)

        async def unreserve() -> None:
            await error.settled()
            self.engine.unreserve(key)

        task = asyncio.create_task(unreserve())
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)


class AggregatedHandler(Handler):
    """Prefill and decode in one engine: what disaggregation is compared with."""

    async def work(self, job: Job, wanted: Request) -> None:
        """Give one item a step."""
        async for step in self.engine.generate(wanted):
            job.check()
            job.give(step.token_ids, step.finish_reason)
        job.check()


def ticket_of(source: Mapping[str, Any], request_id: str, wanted: Request) -> tuple[Ticket, int | None]:
    """Take the ticket out of what prefill gave, and check that it belongs to this request.

    Returns it with Dynamo's number of the worker that issued it, None if that is not said. Raises BadRequest if there
    is no ticket (the frontend must run with --enforce-disagg, and a decode worker computes no prompts), TicketError if
    it is for another request or prompt.
    """
    parameters = source.get(PARAMETERS) or {}
    if not (wire := parameters.get(KV_PARAMETERS)):
        raise BadRequest(
            "this is a decode worker and the request carries no ticket from a prefill worker; "
            "start the frontend with --enforce-disagg and have at least one prefill worker running"
        )
    ticket = Ticket.from_wire(wire)
    if ticket.request_id.rpartition("#")[0] != request_id:
        raise TicketError(
            f"the ticket is for request {ticket.request_id!r}, wanted one for {request_id!r}; ask prefill again"
        )
    if ticket.tokens != len(wanted.token_ids):
        raise TicketError(
            f"the ticket covers {ticket.tokens} tokens, the prompt has {len(wanted.token_ids)}; ask prefill again"
        )
    instance = parameters.get(INSTANCE)
    return ticket, instance if isinstance(instance, int) else None

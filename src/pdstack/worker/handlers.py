"""The request handlers, one per role. Dynamo calls `generate(request=..., context=...)`: the names are part of the API.

An exception before the first item becomes HTTP 500 with its text; after the first item it ends the stream with
`event: error`. There is no way to make a 4xx out of a worker that takes tokens.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pdstack.engine import ContextTooLong, Engine, Overloaded, Request
from pdstack.transfer import ReleaseReason, Ticket, TicketError, TransferAgent, TransferError
from pdstack.worker.jobs import Cancelled, Job, Jobs
from pdstack.worker.requests import BadRequest, engine_request

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
        self.engine.cancel(job.key)


class PrefillHandler(Handler):
    """Computes the KV cache of a prompt, exports it, and answers with the ticket."""

    def __init__(
        self, engine: Engine, agent: TransferAgent, jobs: Jobs, max_context: int, default_max_tokens: int
    ) -> None:
        super().__init__(engine, jobs, max_context, default_max_tokens)
        self.agent = agent

    async def work(self, job: Job, wanted: Request) -> None:
        """Give one item: the first token and, in `disaggregated_params`, the ticket."""
        result = await self.engine.prefill(wanted)
        if job.cancelled:
            self.engine.release(job.key)
            raise Cancelled
        ticket = self.agent.export(job.key, result.blocks, result.tokens, result.first_token, self._released)
        job.details = {
            "cached_tokens": result.cached_tokens,
            "blocks": len(result.blocks),
            "queue_seconds": round(result.queue_seconds, 6),
            "prefill_seconds": round(result.seconds, 6),
        }
        item = {PARAMETERS: {KV_PARAMETERS: ticket.to_wire()}}
        job.give([result.first_token], result.finish_reason or "length", **item)

    def _released(self, key: str, _reason: ReleaseReason) -> None:
        self.engine.release(key)


class DecodeHandler(Handler):
    """Fetches the KV cache that a ticket names and goes on from the first token. Never computes a prompt."""

    def __init__(
        self, engine: Engine, agent: TransferAgent, jobs: Jobs, max_context: int, default_max_tokens: int
    ) -> None:
        super().__init__(engine, jobs, max_context, default_max_tokens)
        self.agent = agent
        self._settling: set[asyncio.Task[None]] = set()

    async def work(self, job: Job, wanted: Request) -> None:
        """Give the first token, which prefill chose, then one item a step."""
        ticket = ticket_of(job, wanted)
        first_token = await self._fetch(ticket, wanted, job)
        async for step in self.engine.decode(wanted, first_token):
            job.check()
            job.give(step.token_ids, step.finish_reason)
        job.check()

    async def _fetch(self, ticket: Ticket, wanted: Request, job: Job) -> int:
        """Bring the prompt's KV cache into blocks of our own; returns the first token. On any error nothing stays
        reserved.
        """
        try:
            blocks = (await self.engine.reserve(wanted)).blocks
            job.check()
        except BaseException:
            # The client may have gone after the reservation was made; one that was not made is no matter.
            self.engine.unreserve(job.key)
            await self.agent.discard(ticket)
            raise
        try:
            report = await self.agent.fetch(ticket, blocks)
            job.check()
        except TransferError as error:
            # The client is told now; the blocks wait until nothing can write into them any more.
            self._unreserve_later(job.key, error)
            raise
        except BaseException:
            self.engine.unreserve(job.key)
            raise
        job.details["transfer"] = {
            "bytes": report.bytes,
            "seconds": round(report.seconds, 6),
            "read_seconds": round(report.read_seconds, 6),
            "backend": report.backend,
            "transport": report.transport,
        }
        return report.first_token

    def _unreserve_later(self, key: str, error: TransferError) -> None:
        self.engine.quarantine(key)

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


def ticket_of(job: Job, wanted: Request) -> Ticket:
    """Take the ticket out of a request and check that it belongs to this request.

    Raises BadRequest if there is none (the frontend must run with --enforce-disagg, and a decode worker computes no
    prompts), TicketError if it is for another request or prompt.
    """
    wire = (job.request.get(PARAMETERS) or {}).get(KV_PARAMETERS)
    if not wire:
        raise BadRequest(
            "this is a decode worker and the request carries no ticket from a prefill worker; "
            "start the frontend with --enforce-disagg and have at least one prefill worker running"
        )
    ticket = Ticket.from_wire(wire)
    if ticket.request_id.rpartition("#")[0] != job.request_id:
        raise TicketError(
            f"the ticket is for request {ticket.request_id!r}, wanted one for {job.request_id!r}; ask prefill again"
        )
    if ticket.tokens != len(wanted.token_ids):
        raise TicketError(
            f"the ticket covers {ticket.tokens} tokens, the prompt has {len(wanted.token_ids)}; ask prefill again"
        )
    return ticket

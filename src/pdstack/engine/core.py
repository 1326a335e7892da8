"""The engine: requests come in the event loop, the arithmetic runs in one thread of its own.

One lock guards scheduler and pool. The thread holds it to plan and to book a step, never while it computes, so calls in
the event loop take microseconds. A sequence that is part of the running step keeps its blocks until that step ends,
whatever happens to its request; nothing is computed into memory that somebody else may own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdstack.engine.blas import set_threads
from pdstack.engine.config import (
    EngineConfig,
    EngineError,
    EngineStats,
    EngineStopped,
    KvEventSink,
    OnAdmitted,
    OnProgress,
    Overloaded,
    PrefillResult,
    Request,
    RequestCancelled,
    Reservation,
    Step,
)
from pdstack.engine.delivery import Client, Item, Progress, deliver, steps_of
from pdstack.engine.intake import new_sequence
from pdstack.engine.model import KV_ORDER, LlamaModel, require_context
from pdstack.engine.pool import BlockPool, NewPool, merged, new_pool_array
from pdstack.engine.scheduler import Plan, Purpose, Scheduler, Sequence, State, blocks_needed
from pdstack.engine.stepping import compute
from pdstack.models.hf_config import ModelConfig

__all__ = ["Engine", "KvPool"]

log = logging.getLogger(__name__)


class KvPool:
    """The memory of the pool. array: float32 (blocks, layers, 2, block_size, kv_heads, head_dim), in KV_ORDER."""

    def __init__(self, array: npt.NDArray[np.float32]) -> None:
        self.array = array


class Engine:
    """Serves requests on one model. Methods must be called in an event loop's thread, except load, start and stop."""

    def __init__(self, model: LlamaModel, config: EngineConfig, new_pool: NewPool = new_pool_array) -> None:
        self.config = config
        self.model = model
        shape = model.config
        self.pool = KvPool(new_pool(config.kv_blocks, shape.layers, config.block_size, shape.kv_heads, shape.head_dim))
        self.events: KvEventSink | None = None
        self._blocks = BlockPool(config.kv_blocks, config.block_size, prefix_cache=config.prefix_cache)
        self._scheduler = Scheduler(config, self._blocks)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failure: BaseException | None = None
        self._clients: dict[Sequence, Client] = {}
        self._outbox: list[tuple[Client, list[Item]]] = []
        self._step_began = 0.0
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated = 0
        self._finished = self._cancelled = self._refused = self._failed = 0

    @classmethod
    def load(
        cls, directory: str | Path, config: EngineConfig | None = None, new_pool: NewPool = new_pool_array
    ) -> Engine:
        """Map and check a model, reserve (not touch) the pool. Blocking; a second or so.

        `new_pool` gives the pool's memory, for those who want it where another process can read it.

        Raises UnsupportedModel, WeightsError, EngineError.
        """
        config = config or EngineConfig()
        set_threads(1)  # our own threads divide the work: see pdstack.engine.team
        require_context(ModelConfig.load(Path(directory)), config.max_context)
        model = LlamaModel(Path(directory), config.threads)
        model.prepare(config.max_context, config.max_batch + config.prefill_chunk)
        return cls(model, config, new_pool)

    @property
    def layout_fields(self) -> dict[str, Any]:
        """Arguments for the transfer layer's KVLayout. model_id also names the order of values inside a block."""
        shape = self.model.config
        return {
            "num_blocks": self.config.kv_blocks,
            "num_layers": shape.layers,
            "block_size": self.config.block_size,
            "num_kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "dtype": "float32",
            "model_id": f"{self.model.id}/{KV_ORDER}",
        }

    def start(self) -> None:
        """Start the engine's thread. Once per engine."""
        if self._thread is not None:
            raise EngineError("engine: start() was called before; load another engine instead")
        self._thread = threading.Thread(target=self._run, name="pdstack-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; requests still known fail with EngineStopped."""
        with self._lock:
            self._stopping = True
            self._work.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.model.team.close()
        with self._lock:
            self._fail_all(EngineStopped("engine: it was stopped while the request was under way"))
            self._flush()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and can take requests."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    # Requests

    async def prefill(
        self, request: Request, on_admitted: OnAdmitted | None = None, on_progress: OnProgress | None = None
    ) -> PrefillResult:
        """Compute a prompt and choose the first token. The blocks stay until `release`.

        With `on_admitted` the blocks can be shipped while the prompt is computed: it is called once, in the event loop,
        when the blocks are fixed; `on_progress` then, whenever more leading blocks are final (all are when this
        returns). From `on_admitted` on, blocks stay until `release`, also if this raises or the request is cancelled.

        Raises ContextTooLong, Overloaded, RequestCancelled, EngineStopped.
        """
        sequence, client = self._submit(request, Purpose.PREFILL, fixed=on_admitted is not None)
        told = False
        try:
            await self._admitted(sequence, client)
            if on_admitted is not None:
                on_admitted(list(sequence.blocks), self.generations(sequence.blocks), sequence.prompt_length)
                told = True
            item = await client.items.get()
            while isinstance(item, Progress):
                if on_progress is not None:
                    on_progress(item.ready)
                item = await client.items.get()
        except BaseException:
            with self._lock:
                if told:
                    self._cancel(sequence)
                else:
                    sequence.fixed = False
                    self._abandon(sequence)
            raise
        if isinstance(item, EngineError):
            raise item
        if isinstance(item, str):
            raise RequestCancelled(f"request {request.request_id}: cancelled during prefill")
        reason = sequence.finish_reason()
        return PrefillResult(
            first_token=item,
            finish_reason=reason if reason == "stop" else None,
            blocks=list(sequence.blocks),
            tokens=sequence.prompt_length,
            cached_tokens=sequence.cached_tokens,
            seconds=time.monotonic() - sequence.admitted_at,
            queue_seconds=sequence.admitted_at - sequence.submitted_at,
        )

    def generations(self, blocks: Iterable[int]) -> list[int]:
        """The generation of each block: it grows when the block is handed out anew, so a higher one is other KV."""
        with self._lock:
            return self._blocks.generations(list(blocks))

    def release(self, request_id: str) -> bool:
        """Let the blocks of a prefill, or of a quarantined reservation, be reused. False if not known.

        A prefill that still computes is cancelled, and its blocks are free once the running step has ended.
        """
        with self._lock:
            sequence = self._scheduler.sequences.get(request_id)
            if sequence is None or sequence.purpose is not Purpose.PREFILL or sequence.state is State.HELD:
                return self._let_go(request_id, (State.HELD, State.QUARANTINED))
            sequence.released = True
            self._cancel(sequence)
        return True

    async def reserve(self, request: Request) -> Reservation:
        """Take all blocks that decoding `request` can need; returns those for the prompt.

        Leading full blocks whose KV is here already come out of the prefix cache.
        Raises ContextTooLong, Overloaded (after queue_timeout_s), RequestCancelled, EngineStopped.
        """
        sequence, client = self._submit(request, Purpose.DECODE)
        try:
            await self._admitted(sequence, client)
        except BaseException:
            with self._lock:
                self._abandon(sequence)
            raise
        size = self.config.block_size
        return Reservation(sequence.blocks[: -(-sequence.prompt_length // size)], sequence.cached_tokens // size)

    def unreserve(self, request_id: str, verified: int = 0) -> bool:
        """Give a reservation back. Only when nothing writes into its blocks any more. False if not known.

        The first `verified` blocks are known to hold the prompt's KV: they go to the prefix cache.
        """
        with self._lock:
            self._received(request_id, verified)
            return self._let_go(request_id, (State.RESERVED, State.QUARANTINED))

    def quarantine(self, request_id: str, verified: int = 0) -> bool:
        """Give a reservation's slot back but keep its blocks until `release` or `unreserve`.

        Nothing writes into the first `verified` blocks any more, and they hold the prompt's KV: others may use them.
        """
        with self._lock:
            sequence = self._scheduler.sequences.get(request_id)
            if sequence is None or sequence.state is not State.RESERVED:
                return False
            self._received(request_id, verified)
            self._scheduler.quarantine(sequence)
            self._clients.pop(sequence, None)
            self._admit()
        return True

    async def decode(self, request: Request, first_token: int) -> AsyncIterator[Step]:
        """Go on from `first_token` over the reserved blocks, which hold the prompt's KV by now.

        The first step carries first_token. The prompt is never computed. Raises EngineError without a reservation.
        """
        with self._lock:
            self._check_running()
            sequence = self._scheduler.begin_decode(request.request_id, first_token)
            client = self._clients[sequence]
            self._generated += 1
            reason = sequence.finish_reason()
            if reason is not None:
                self._end(sequence)
                self._finished += 1
            self._admit()
            self._work.notify_all()
        try:
            yield Step([first_token], reason)
            if reason is None:
                async for step in steps_of(client):
                    yield step
        finally:
            with self._lock:
                self._abandon(sequence)

    async def generate(self, request: Request) -> AsyncIterator[Step]:
        """Prefill and decode in this engine. Raises ContextTooLong, Overloaded, EngineStopped."""
        sequence, client = self._submit(request, Purpose.GENERATE)
        try:
            await self._admitted(sequence, client)
            async for step in steps_of(client):
                yield step
        finally:
            with self._lock:
                self._abandon(sequence)

    def cancel(self, request_id: str) -> bool:
        """Stop a request that waits or computes; its stream ends with "cancelled", or RequestCancelled is raised.

        Blocks are free at once, or at the end of the running step if that uses them. A finished prefill and a
        reservation are left alone (False): somebody may be reading or writing their blocks.
        """
        with self._lock:
            sequence = self._scheduler.sequences.get(request_id)
            return sequence is not None and self._cancel(sequence)

    def stats(self) -> EngineStats:
        """The state now."""
        with self._lock:
            counts = self._scheduler.counts()
            return EngineStats(
                total_blocks=self._blocks.num_blocks,
                used_blocks=self._blocks.used,
                cached_blocks=self._blocks.cached,
                free_blocks=self._blocks.available,
                held_requests=counts[State.HELD],
                reserved_requests=counts[State.RESERVED],
                quarantined_blocks=sum(
                    len(s.blocks) for s in self._scheduler.sequences.values() if s.state is State.QUARANTINED
                ),
                waiting=counts[State.WAITING],
                prefilling=counts[State.PREFILLING],
                decoding=counts[State.DECODING],
                max_batch=self.config.max_batch,
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                generated_tokens=self._generated,
                finished=self._finished,
                cancelled=self._cancelled,
                refused=self._refused,
                failed=self._failed,
                step_running_s=time.monotonic() - self._step_began if self._step_began else 0.0,
            )

    def forget(self, blocks: Iterable[int]) -> int:
        """Forget the known content of `blocks` and of what follows on it: it was found wrong. Returns how many.

        Requests that use such a block go on, but what they compute over it is not offered to others.
        """
        with self._lock:
            wrong = set(blocks)
            count = self._blocks.forget(list(wrong))
            for sequence in self._scheduler.sequences.values():
                sequence.doubtful |= not wrong.isdisjoint(sequence.blocks)
            self._flush()
        return count

    def clear_prefix_cache(self) -> int:
        """Forget cached prefixes, for measurements. Returns how many blocks were known."""
        with self._lock:
            count = self._blocks.clear_cache()
            self._flush()
        return count

    # In the event loop

    def _submit(self, request: Request, purpose: Purpose, *, fixed: bool = False) -> tuple[Sequence, Client]:
        client = Client(asyncio.get_running_loop())
        with self._lock:
            self._check_running()
            try:
                sequence = new_sequence(request, purpose, self.config, self.model.config)
                sequence.fixed = fixed
                self._scheduler.submit(sequence)
            except EngineError:
                self._refused += 1
                raise
            self._clients[sequence] = client
            if sequence.state is not State.WAITING:
                self._note_admitted(sequence)
            self._admit()
        return sequence, client

    async def _admitted(self, sequence: Sequence, client: Client) -> None:
        if sequence.state is not State.WAITING:
            return
        limit = self.config.queue_timeout_s
        timer = client.loop.call_later(limit, self._expire, sequence, limit)
        try:
            await client.admitted
        finally:
            timer.cancel()

    def _expire(self, sequence: Sequence, limit: float) -> None:
        with self._lock:
            if sequence.state is not State.WAITING:
                return
            needed, free = blocks_needed(sequence, self.config.block_size), self._blocks.available
            client = self._clients[sequence]
            self._scheduler.drop(sequence)
            self._end(sequence)
            self._refused += 1
            self._admit()
        error = Overloaded(
            f"request {sequence.request.request_id}: waited {limit:g} s for {needed} KV blocks and a slot, {free} "
            f"blocks are free of {self._blocks.num_blocks}; try again later, add workers, or raise engine.kv_blocks"
        )
        if not client.admitted.done():
            client.admitted.set_exception(error)

    # With the lock held, in any thread

    def _check_running(self) -> None:
        if self._failure is not None:
            raise EngineStopped(f"engine: its thread failed with {self._failure!r}; restart the worker")
        if not self.alive:
            raise EngineStopped("engine: it is not running; call start() first, and not after stop()")

    def _let_go(self, request_id: str, states: tuple[State, ...]) -> bool:
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is None or sequence.state not in states:
            return False
        self._scheduler.drop(sequence)
        self._end(sequence)
        self._admit()
        return True

    def _received(self, request_id: str, blocks: int) -> None:
        sequence = self._scheduler.sequences.get(request_id)
        if blocks and sequence is not None and sequence.state in (State.RESERVED, State.QUARANTINED):
            self._scheduler.publish_received(sequence, blocks)

    def _admit(self) -> None:
        for sequence in self._scheduler.admit():
            self._note_admitted(sequence)
        self._flush()

    def _note_admitted(self, sequence: Sequence) -> None:
        sequence.admitted_at = time.monotonic()
        items: list[Item] = []
        if sequence.fixed and sequence.known:
            items.append(Progress(sequence.known))
        self._outbox.append((self._clients[sequence], items))
        if sequence.state is State.PREFILLING:
            self._work.notify_all()

    def _cancel(self, sequence: Sequence) -> bool:
        if sequence.state not in (State.WAITING, State.PREFILLING, State.DECODING) or sequence.cancelled:
            return False
        self._cancelled += 1
        waited = sequence.state is State.WAITING
        client = self._clients.pop(sequence, None)
        if sequence.in_flight:
            sequence.cancelled = True
        else:
            self._scheduler.give_up(sequence)
        if client is not None:
            error = RequestCancelled(f"request {sequence.request.request_id}: cancelled while it waited")
            self._outbox.append((client, [error if waited else "cancelled"]))
        self._admit()
        return True

    def _abandon(self, sequence: Sequence) -> None:
        """The coroutine of a request has gone: whatever it has is given back."""
        if sequence.state in (State.RESERVED, State.HELD):
            self._scheduler.drop(sequence)
            self._end(sequence)
            self._admit()
        else:
            self._cancel(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._clients.pop(sequence, None)

    def _fail_all(self, error: EngineError) -> None:
        for sequence in list(self._scheduler.sequences.values()):
            sequence.in_flight = False
            client = self._clients.pop(sequence, None)
            # Blocks that a peer may be reading or writing stay where they are.
            if sequence.state in (State.WAITING, State.PREFILLING, State.DECODING):
                self._scheduler.give_up(sequence)
                if client is not None:
                    self._failed += 1
                    self._outbox.append((client, [error]))

    def _flush(self) -> None:
        """Hand what happened to the event loop, in order, and cache changes to their sink."""
        events, self._blocks.events = self._blocks.events, []
        if self.events is not None:
            for event in merged(events):
                if event.kind == "stored":
                    self.events.stored(event.token_ids, event.block_hashes, event.parent_hash)
                else:
                    self.events.removed(event.block_hashes)
        outbox, self._outbox = self._outbox, []
        if outbox:
            loop = outbox[0][0].loop
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, outbox)

    # In the engine's thread

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            log.exception("engine: the thread failed")
            with self._lock:
                self._failure = error
                self._fail_all(EngineStopped(f"engine: its thread failed with {error!r}; restart the worker"))
                self._flush()

    def _step(self) -> bool:
        with self._lock:
            while not self._stopping and not self._scheduler.decoding and not self._scheduler.prefilling:
                self._work.wait()
            if self._stopping:
                return False
            plan = self._scheduler.plan()
            self._step_began = time.monotonic()
        try:
            chosen = compute(plan, self.model, self.pool.array)
        except Exception as error:
            # Most likely memory. The requests of this step are lost, the engine and the others are not.
            log.exception("engine: a step failed")
            chosen = {}
            with self._lock:
                for sequence in self._scheduler.fail(plan):
                    client = self._clients.pop(sequence, None)
                    if client is not None:
                        self._failed += 1
                        self._outbox.append((client, [EngineError(f"engine: a step failed: {error!r}")]))
            plan = Plan()
        with self._lock:
            self._step_began = 0.0
            self._steps += 1
            self._book(plan, chosen)
        return True

    def _book(self, plan: Plan, chosen: dict[int, int]) -> None:
        moved = self._scheduler.settle(plan, chosen.__getitem__)
        for sequence in plan.involved():
            client = self._clients.get(sequence)
            if sequence.fixed and sequence.state is State.PREFILLING and client is not None:
                self._outbox.append((client, [Progress(sequence.computed // self.config.block_size)]))
        for sequence in moved:
            if sequence.cancelled:
                continue
            if sequence.generated == 1:
                self._prompt_tokens += sequence.prompt_length
                self._cached_tokens += sequence.cached_tokens
            self._generated += 1
            items: list[Item] = [sequence.tokens[-1]]
            client = self._clients[sequence]
            if sequence.state is State.DONE:
                reason = sequence.finish_reason()
                assert reason is not None
                items.append(reason)
            if sequence.state in (State.DONE, State.HELD):
                self._finished += 1
                self._end(sequence)
            self._outbox.append((client, items))
        self._admit()

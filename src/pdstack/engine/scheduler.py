"""Who gets blocks, and what is computed next. Plain state without threads or clocks.

A sequence waits (first come, first served) until a slot and all blocks it can ever need are free; so once admitted it
never waits for memory again, and nothing is ever preempted. Every step computes one token for each decoding sequence
and up to `prefill_chunk` tokens of prompts, in turn: a long prompt delays the others by one chunk at a time.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from pdstack.engine.config import EngineConfig, EngineError, FinishReason, Overloaded, Request
from pdstack.engine.model import Segment
from pdstack.engine.pool import BlockPool

__all__ = ["Copies", "Plan", "Purpose", "Scheduler", "Sequence", "State", "blocks_needed"]


class Purpose(Enum):
    """What a sequence is for: a prompt's KV only, decoding over KV that comes from elsewhere, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    GENERATE = "generate"


class State(Enum):
    """Where a sequence is. HELD, RESERVED and QUARANTINED ones keep blocks and compute nothing.

    HELD: a prompt whose blocks somebody may be reading; computed, or given up on the way.
    """

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    HELD = "held"
    RESERVED = "reserved"
    QUARANTINED = "quarantined"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way. `tokens` grows; `computed` of them have KV in `blocks`.

    fixed: the blocks were told to somebody at admission, so they stay these, and only `release` frees them.
    """

    request: Request
    purpose: Purpose
    prompt_length: int
    max_new: int
    min_new: int
    stop: frozenset[int]
    seed: int
    tokens: list[int]
    state: State = State.WAITING
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    cached_tokens: int = 0
    known: int = 0
    """Leading blocks whose hash is known, with `last_hash` the hash of the last of them."""
    last_hash: int | None = None
    fixed: bool = False
    doubtful: bool = False
    """Some of its KV was found wrong: nobody else should build on the rest."""
    in_flight: bool = False
    cancelled: bool = False
    released: bool = False
    """Nobody reads the blocks any more: they are freed as soon as nothing computes into them."""
    submitted_at: float = 0.0
    admitted_at: float = 0.0

    @property
    def generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.prompt_length

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends with its last token, or None if it goes on."""
        if self.tokens[-1] in self.stop and self.generated > self.min_new:
            return "stop"
        if self.generated >= self.max_new:
            return "length"
        return None


@dataclass(slots=True)
class Copies:
    """Blocks of a sequence to fill with what others computed: sources (referenced until `settle`), targets."""

    sequence: Sequence
    sources: list[int]
    targets: list[int]


@dataclass(slots=True)
class Plan:
    """One step: first the copies, then of each of `sequences` the segment at the same place."""

    sequences: list[Sequence] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)

    def involved(self) -> list[Sequence]:
        """Every sequence whose blocks this step writes, once."""
        return list(dict.fromkeys([*self.sequences, *(each.sequence for each in self.copies)]))


def blocks_needed(sequence: Sequence, block_size: int) -> int:
    """All blocks it can ever need. The last token chosen needs no KV."""
    length = sequence.prompt_length
    if sequence.purpose is not Purpose.PREFILL:
        length += sequence.max_new - 1
    return -(-length // block_size)


class Scheduler:
    """Admission, planning and bookkeeping. Not thread-safe; the engine calls it under its lock."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.sequences: dict[str, Sequence] = {}
        self.waiting: deque[Sequence] = deque()
        self.prefilling: deque[Sequence] = deque()
        self.decoding: dict[str, Sequence] = {}
        self._slots = 0

    def submit(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises Overloaded if the queue is full, EngineError for a duplicate request id."""
        request_id = sequence.request.request_id
        if request_id in self.sequences:
            raise EngineError(
                f"request {request_id} is already known ({self.sequences[request_id].state.value}); ids must be unique"
            )
        if len(self.waiting) >= self.config.queue_limit and not self._admit_one_more(sequence):
            raise Overloaded(
                f"queue full: {len(self.waiting)} requests wait, engine.queue_limit is {self.config.queue_limit}; "
                "try again later or add workers"
            )
        self.sequences[request_id] = sequence
        if sequence.state is State.WAITING:
            self.waiting.append(sequence)

    def _admit_one_more(self, sequence: Sequence) -> bool:
        """With a queue of length 0, a request that can start now is no overload."""
        return not self.waiting and self._admit(sequence)

    def admit(self) -> list[Sequence]:
        """Start waiting sequences, in order, while there is room; returns them."""
        admitted: list[Sequence] = []
        while self.waiting and self._admit(self.waiting[0]):
            admitted.append(self.waiting.popleft())
        return admitted

    def _admit(self, sequence: Sequence) -> bool:
        if self._slots >= self.config.max_batch:
            return False
        # Whoever computes has to compute the last token, whose logits choose the next. Decode computes none.
        known = sequence.prompt_length - (sequence.purpose is not Purpose.DECODE)
        matched, parent = self.pool.match(sequence.tokens[: known if sequence.request.reuse else 0])
        self.pool.acquire(matched)
        fresh = blocks_needed(sequence, self.config.block_size) - len(matched)
        if fresh > self.pool.available:
            self.pool.release(matched)
            return False
        sequence.blocks = matched + self.pool.allocate(fresh)
        self._slots += 1
        sequence.known, sequence.last_hash = len(matched), parent
        sequence.computed = sequence.cached_tokens = len(matched) * self.config.block_size
        if sequence.purpose is Purpose.DECODE:
            sequence.state = State.RESERVED
            return True
        sequence.state = State.PREFILLING
        self.prefilling.append(sequence)
        return True

    def plan(self) -> Plan:
        """Choose the next step; empty if there is nothing to compute. Its sequences are in flight until `settle`."""
        plan = Plan()
        for sequence in self.decoding.values():
            start = sequence.computed
            plan.sequences.append(sequence)
            plan.segments.append(Segment(sequence.tokens[start:], start, sequence.blocks, True))
        budget = self.config.prefill_chunk
        for _ in range(len(self.prefilling)):
            sequence = self.prefilling[0]
            self._take_from_cache(sequence, plan)
            start = sequence.computed
            end = min(sequence.prompt_length, (start // self.config.prefill_chunk + 1) * self.config.prefill_chunk)
            if end - start > budget:
                break
            budget -= end - start
            plan.sequences.append(sequence)
            plan.segments.append(
                Segment(sequence.tokens[start:end], start, sequence.blocks, end == sequence.prompt_length)
            )
            self.prefilling.rotate(-1)
        for sequence in plan.involved():
            sequence.in_flight = True
        return plan

    def _take_from_cache(self, sequence: Sequence, plan: Plan) -> None:
        """Use blocks that others computed since admission: many prompts with one beginning compute it once."""
        size = self.config.block_size
        if sequence.computed != sequence.known * size or not sequence.request.reuse:
            return
        copies = Copies(sequence, [], [])
        while sequence.computed + size < sequence.prompt_length:
            tokens = sequence.tokens[sequence.computed : sequence.computed + size]
            found = self.pool.lookup(sequence.last_hash, tokens)
            if found is None:
                break
            block, sequence.last_hash = found
            self.pool.acquire([block])
            if sequence.fixed:
                copies.sources.append(block)
                copies.targets.append(sequence.blocks[sequence.known])
            else:
                self.pool.release([sequence.blocks[sequence.known]])
                sequence.blocks[sequence.known] = block
            sequence.known += 1
            sequence.computed += size
            sequence.cached_tokens += size
        if copies.sources:
            plan.copies.append(copies)

    def settle(self, plan: Plan, chosen: Callable[[int], int]) -> list[Sequence]:
        """Book a computed plan. `chosen(i)` is the next token of the i-th sequence if its segment wanted logits.

        Returns the sequences that got a token or, if they were cancelled meanwhile, lost their blocks.
        """
        moved: list[Sequence] = []
        self._land(plan)
        for index, (sequence, segment) in enumerate(zip(plan.sequences, plan.segments, strict=True)):
            if sequence.cancelled:
                moved.append(sequence)
                continue
            sequence.computed = segment.start + len(segment.tokens)
            self._publish(sequence)
            if segment.wants_logits:
                sequence.tokens.append(chosen(index))
                moved.append(sequence)
                self._advance(sequence)
        for sequence in plan.involved():
            if sequence.cancelled:
                self.give_up(sequence)
        return moved

    def fail(self, plan: Plan) -> list[Sequence]:
        """Give up all sequences of a plan that could not be computed; returns them."""
        self._land(plan)
        for sequence in plan.involved():
            self.give_up(sequence)
        return plan.involved()

    def _land(self, plan: Plan) -> None:
        for copies in plan.copies:
            self.pool.release(copies.sources)
        for sequence in plan.involved():
            sequence.in_flight = False

    def give_up(self, sequence: Sequence) -> None:
        """End a sequence early. Blocks that somebody was told of stay until they are released."""
        if sequence.fixed and not sequence.released and sequence.state is State.PREFILLING:
            self._leave(sequence, State.HELD)
        else:
            self.drop(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Make what is computed findable, in whole blocks."""
        size = self.config.block_size
        while (sequence.known + 1) * size <= sequence.computed and not sequence.doubtful:
            at = sequence.known
            sequence.last_hash = self.pool.publish(
                sequence.blocks[at], sequence.last_hash, sequence.tokens[at * size : (at + 1) * size]
            )
            sequence.known += 1

    def publish_received(self, sequence: Sequence, blocks: int) -> None:
        """The first `blocks` blocks of a prompt are known to hold its KV: make the full ones findable."""
        sequence.computed = min(blocks * self.config.block_size, sequence.prompt_length)
        self._publish(sequence)

    def _advance(self, sequence: Sequence) -> None:
        if sequence.purpose is Purpose.PREFILL:
            self._leave(sequence, State.HELD)
        elif sequence.finish_reason() is not None:
            self.drop(sequence)
        elif sequence.state is State.PREFILLING:
            self._leave_queue(sequence)
            sequence.state = State.DECODING
            self.decoding[sequence.request.request_id] = sequence

    def begin_decode(self, request_id: str, first_token: int) -> Sequence:
        """Start decoding over a reservation whose KV has arrived; the first token may already end it."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.state is not State.RESERVED:
            state = "unknown" if sequence is None else sequence.state.value
            raise EngineError(f"decode of request {request_id}: it is {state}, wanted reserved; call reserve() first")
        self.publish_received(sequence, len(sequence.blocks))
        sequence.tokens.append(first_token)
        if sequence.finish_reason() is None:
            sequence.state = State.DECODING
            self.decoding[request_id] = sequence
        else:
            self.drop(sequence)
        return sequence

    def quarantine(self, sequence: Sequence) -> None:
        """Give a reservation's slot back but keep its blocks: something may still write into them."""
        self._leave(sequence, State.QUARANTINED)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence and free what it has."""
        self._leave(sequence, State.DONE)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        del self.sequences[sequence.request.request_id]

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.PREFILLING:
            self.prefilling.remove(sequence)
        elif sequence.state is State.DECODING:
            del self.decoding[sequence.request.request_id]

    def _leave(self, sequence: Sequence, state: State) -> None:
        self._leave_queue(sequence)
        if sequence.state in (State.PREFILLING, State.DECODING, State.RESERVED):
            self._slots -= 1
        sequence.state = state

    def counts(self) -> dict[State, int]:
        """How many sequences are in each state."""
        found = dict.fromkeys(State, 0)
        for state, group in itertools.groupby(sorted(s.state.value for s in self.sequences.values())):
            found[State(state)] = len(list(group))
        return found

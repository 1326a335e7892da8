"""The book of exports: who may read what, and when blocks may be reused."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from test_tickets import KEY, PLAIN

from pdstack.transfer import Refused, ReleaseReason, Ticket, TransferError
from pdstack.transfer.exports import ExportBook
from pdstack.transfer.ticket import issue


def ticket(request: str) -> Ticket:
    return issue(
        KEY, ttl_s=1.0, request_id=request, worker="w", incarnation="i", host="h", port=1, backend="ucx", blocks=(1,),
        tokens=1, first_token=0, layout="l", checksum="c", audience="a",
    )  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def released() -> list[tuple[str, ReleaseReason]]:
    return []


def offer(book: ExportBook, name: str, released: list[tuple[str, ReleaseReason]]) -> Ticket:
    made = ticket(name)
    book.offer(made, 10.0, lambda request, why: released.append((request, why)))
    return made


def code_of(book: ExportBook, made: Ticket) -> str:
    with pytest.raises(Refused) as refused:
        book.grant(made, "reader")
    return refused.value.code


def test_an_unread_offer_ends_at_its_deadline(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock)
    made = offer(book, "r", released)
    clock.now += 9.99
    assert book.expire() == pytest.approx(0.01)
    assert not released
    clock.now += 0.01
    assert book.expire() is None
    assert released == [("r", ReleaseReason.EXPIRED)]
    assert code_of(book, made) == "expired"


def test_a_granted_export_outlives_its_deadline(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock)
    made = offer(book, "r", released)
    book.grant(made, "reader")
    clock.now += 1e6
    book.expire()
    assert not book.withdraw("r")
    assert not book.discard(made, "someone else")
    assert book.finish(made.nonce, "someone else", True) is None
    assert not released
    assert book.finish(made.nonce, "reader", True) == made
    assert released == [("r", ReleaseReason.READ)]


def test_a_ticket_is_good_once(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock)
    made = offer(book, "r", released)
    book.grant(made, "reader")
    assert code_of(book, made) == "replayed"
    book.finish(made.nonce, "reader", False)
    assert code_of(book, made) == "replayed"
    assert released == [("r", ReleaseReason.FAILED)]


def test_what_was_not_issued_is_not_granted(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock)
    assert code_of(book, PLAIN) == "unknown"
    made = offer(book, "r", released)
    assert code_of(book, Ticket.from_wire({**made.to_wire(), "blocks": [2]})) == "altered"
    book.withdraw("r")
    assert code_of(book, made) == "withdrawn"


def test_one_request_is_exported_once_at_a_time(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock)
    offer(book, "r", released)
    with pytest.raises(TransferError):
        offer(book, "r", released)
    book.withdraw("r")
    offer(book, "r", released)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: every export is released once, and never while a living reader has it."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.book = ExportBook(self.clock)
        self.released: dict[str, ReleaseReason] = {}
        self.offered: dict[str, float] = {}
        self.held: dict[str, str] = {}
        self.count = 0

    def release(self, request: str, why: ReleaseReason) -> None:
        assert request not in self.released
        if request in self.held:
            assert why in (ReleaseReason.READ, ReleaseReason.FAILED, ReleaseReason.PEER_LOST, ReleaseReason.DISCARDED)
        self.released[request] = why

    @rule(target=tickets)
    def offer(self) -> Ticket:
        self.count += 1
        made = ticket(f"r{self.count}")
        self.book.offer(made, 10.0, self.release)
        self.offered[made.request_id] = self.clock.now + 10.0
        return made

    @rule(made=tickets, reader=st.sampled_from("ab"))
    def grant(self, made: Ticket, reader: str) -> None:
        request = made.request_id
        possible = request not in self.released and request not in self.held and self.offered[request] > self.clock.now
        try:
            self.book.grant(made, reader)
        except Refused:
            assert not possible
        else:
            assert possible
            self.held[request] = reader

    @rule(made=tickets, reader=st.sampled_from("ab"), ok=st.booleans())
    def finish(self, made: Ticket, reader: str, ok: bool) -> None:
        mine = self.held.get(made.request_id) == reader and made.request_id not in self.released
        assert (self.book.finish(made.nonce, reader, ok) is not None) == mine
        assert not mine or made.request_id in self.released

    @rule(made=tickets, reader=st.sampled_from("ab"))
    def discard(self, made: Ticket, reader: str) -> None:
        self.book.discard(made, reader)

    @rule(made=consumes(tickets))
    def withdraw(self, made: Ticket) -> None:
        self.book.withdraw(made.request_id)

    @rule(reader=st.sampled_from("ab"))
    def lose(self, reader: str) -> None:
        self.book.lost(reader)
        assert all(request in self.released for request, holder in self.held.items() if holder == reader)

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.book.expire()

    @invariant()
    def counts_add_up(self) -> None:
        assert sum(self.book.counts()) == self.count - len(self.released)

    def teardown(self) -> None:
        self.held.clear()
        self.book.close()
        assert len(self.released) == self.count


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)

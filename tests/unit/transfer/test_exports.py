"""The book of exports: who may read what, and when blocks may be reused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from test_tickets import KEY, PLAIN

from pdstack.transfer import Refused, ReleaseReason, Ticket, TransferError
from pdstack.transfer.exports import Export, ExportBook, Reader, announcements
from pdstack.transfer.ticket import issue


def ticket(request: str) -> Ticket:
    return issue(
        KEY, ttl_s=1.0, request_id=request, worker="w", incarnation="i", host="h", port=1, backend="ucx", blocks=(1,),
        generations=(0,), tokens=1, layout="l", audience="a",
    )  # fmt: skip


def reader(name: str, incarnation: str = "1", channel: object = "") -> Reader:
    return Reader(name, incarnation, channel or name)


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
        book.grant(made, reader("d"))
    return refused.value.code


def test_an_unread_offer_ends_at_its_deadline(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock, 2.0)
    made = offer(book, "r", released)
    clock.now += 9.99
    assert book.expire() == pytest.approx(0.01)
    assert not released
    clock.now += 0.01
    assert book.expire() is None
    assert released == [("r", ReleaseReason.EXPIRED)]
    assert code_of(book, made) == "expired"


def test_a_granted_export_outlives_its_deadline(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock, 2.0)
    made = offer(book, "r", released)
    book.grant(made, reader("d"))
    clock.now += 1e6
    book.expire()
    assert not book.withdraw("r")
    assert not book.discard(made, "someone else")
    assert book.held(made.nonce, "someone else") is None
    assert not released
    export = book.held(made.nonce, "d")
    assert export is not None
    book.release(export, ReleaseReason.READ)
    assert released == [("r", ReleaseReason.READ)]


def test_a_ticket_is_good_once(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock, 2.0)
    made = offer(book, "r", released)
    book.grant(made, reader("d"))
    assert code_of(book, made) == "replayed"
    with pytest.raises(Refused, match="used before"):
        book.grant(made, reader("another"))
    export = book.held(made.nonce, "d")
    assert export is not None
    book.release(export, ReleaseReason.FAILED)
    assert code_of(book, made) == "replayed"
    assert released == [("r", ReleaseReason.FAILED)]


def test_only_the_same_run_of_the_reader_comes_back(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock, 2.0)
    made = offer(book, "r", released)
    book.grant(made, reader("d"))
    assert [export.ticket for export in book.lost("d")] == [made]
    assert book.counts() == (0, 1)
    for other in (reader("e"), reader("d", "2", "new")):
        with pytest.raises(Refused, match="used before"):
            book.grant(made, other)
    clock.now += 1.9
    book.grant(made, reader("d", channel="new"))
    clock.now += 100
    assert book.expire() is None
    assert not released
    assert book.held(made.nonce, "new")
    assert not book.lost("d"), "the old connection has nothing to lose any more"


def test_a_reader_that_stays_away_loses_its_export(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock, 2.0)
    made = offer(book, "r", released)
    book.grant(made, reader("d"))
    book.lost("d")
    assert book.expire() == pytest.approx(2.0)
    clock.now += 2.0
    book.expire()
    assert released == [("r", ReleaseReason.PEER_LOST)]
    assert code_of(book, made) == "lost"


def test_what_was_not_issued_is_not_granted(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock, 2.0)
    assert code_of(book, PLAIN) == "unknown"
    made = offer(book, "r", released)
    assert code_of(book, Ticket.from_wire({**made.to_wire(), "blocks": [2], "generations": [0]})) == "altered"
    book.withdraw("r")
    assert code_of(book, made) == "withdrawn"


def test_one_request_is_exported_once_at_a_time(clock: Clock, released: list[tuple[str, ReleaseReason]]) -> None:
    book = ExportBook(clock, 2.0)
    offer(book, "r", released)
    with pytest.raises(TransferError):
        offer(book, "r", released)
    book.withdraw("r")
    offer(book, "r", released)


sizes = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)), max_size=6)


@given(sizes, st.integers(1, 40))
def test_what_is_announced_fits_the_window_and_is_shared(states: list[tuple[int, int, int]], window: int) -> None:
    exports = []
    for number, values in enumerate(states):
        acknowledged, announced, final = sorted(values)
        export = Export(ticket(f"r{number}"), 0.0, lambda _request, _why: None)
        export.acknowledged, export.announced, export.hashes = acknowledged, announced, [0] * final
        exports.append(export)
    before = [export.announced for export in exports]
    under_way = sum(export.announced - export.acknowledged for export in exports)
    waiting = sum(export.final - export.announced for export in exports)
    found = list(announcements(exports, 10, 10 * window))
    announced = sum(last - first for _, first, last in found)
    assert announced == max(0, min(waiting, window - under_way))
    for export, was in zip(exports, before, strict=True):
        mine = [(first, last) for one, first, last in found if one is export]
        assert [first for first, _ in mine] == [was, *(last for _, last in mine)][:-1] if mine else True
    # Nobody waits while another gets far more than its share.
    got = [export.announced - was for export, was in zip(exports, before, strict=True)]
    starved = [mine for mine, export in zip(got, exports, strict=True) if export.announced < export.final]
    if len(exports) > 1 and starved and announced >= len(exports):
        assert min(starved) >= announced // len(exports) - 1


def test_a_block_larger_than_the_window_is_announced_alone() -> None:
    export = Export(ticket("r"), 0.0, lambda _request, _why: None, hashes=[0] * 3)
    assert [span[1:] for span in announcements([export], 100, 10)] == [(0, 1)]
    assert not list(announcements([export], 100, 10))
    export.acknowledged = 1
    assert [span[1:] for span in announcements([export], 100, 10)] == [(1, 2)]


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: every export is released once, and never while a living reader has it."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.book = ExportBook(self.clock, 2.0)
        self.released: dict[str, ReleaseReason] = {}
        self.offered: dict[str, float] = {}
        self.held: dict[str, str] = {}
        self.away: dict[str, float] = {}
        self.channels: dict[str, str] = {}
        self.count_connections = 0
        self.count = 0

    def release(self, request: str, why: ReleaseReason) -> None:
        assert request not in self.released
        if request in self.held:
            assert why in (ReleaseReason.READ, ReleaseReason.FAILED, ReleaseReason.PEER_LOST, ReleaseReason.DISCARDED)
            # Only a reader that was away for long enough loses its export.
            assert why is not ReleaseReason.PEER_LOST or self.clock.now - self.away[request] >= 2.0
        self.released[request] = why

    @rule(target=tickets)
    def offer(self) -> Ticket:
        self.count += 1
        made = ticket(f"r{self.count}")
        self.book.offer(made, 10.0, self.release)
        self.offered[made.request_id] = self.clock.now + 10.0
        return made

    @rule(made=tickets, name=st.sampled_from("ab"))
    def grant(self, made: Ticket, name: str) -> None:
        request = made.request_id
        self.book.expire()
        fresh = request not in self.held and self.offered[request] > self.clock.now
        possible = request not in self.released and (fresh or (self.held.get(request) == name and request in self.away))
        # A reader that comes back does so over a new connection.
        self.count_connections += 1
        channel = f"{name}{self.count_connections}"
        try:
            self.book.grant(made, Reader(name, "1", channel))
        except Refused:
            assert not possible or request not in self.away
        else:
            self.held[request] = name
            self.away.pop(request, None)
            self.channels[request] = channel

    @rule(made=tickets, ok=st.booleans(), mine=st.booleans())
    def finish(self, made: Ticket, ok: bool, mine: bool) -> None:
        request = made.request_id
        channel = self.channels.get(request, "none") if mine else "none"
        export = self.book.held(made.nonce, channel)
        if export is not None:
            assert channel == self.channels[request]
            self.book.release(export, ReleaseReason.READ if ok else ReleaseReason.FAILED)
            assert request in self.released

    @rule(made=tickets, mine=st.booleans())
    def discard(self, made: Ticket, mine: bool) -> None:
        self.book.discard(made, self.channels.get(made.request_id, "none") if mine else "none")

    @rule(made=consumes(tickets))
    def withdraw(self, made: Ticket) -> None:
        self.book.withdraw(made.request_id)

    @rule(made=tickets)
    def lose(self, made: Ticket) -> None:
        request = made.request_id
        for export in self.book.lost(self.channels.get(request, "none")):
            assert export.ticket.request_id == request
            self.away.setdefault(request, self.clock.now)

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

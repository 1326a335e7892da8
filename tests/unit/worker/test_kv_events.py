from __future__ import annotations

from typing import Any

import pytest

from pdstack.worker.kv_events import KvEvents


class Publisher:
    """Dynamo's publisher, as far as we use it; refuses positional arguments as a change of its signature would."""

    made: list[Publisher]

    def __init__(self, *, component: Any, worker_id: int, kv_block_size: int) -> None:
        self.worker_id = worker_id
        self.block_size = kv_block_size
        self.events: list[tuple[Any, ...]] = []
        Publisher.made.append(self)

    def publish_stored(
        self, number: int, tokens: list[int], sizes: list[int], hashes: list[int], lora: int, parent: int | None
    ) -> None:
        self.events.append(("stored", number, tokens, sizes, hashes, parent))

    def publish_removed(self, number: int, hashes: list[int]) -> None:
        self.events.append(("removed", number, hashes))


@pytest.fixture(autouse=True)
def publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = pytest.importorskip("dynamo.llm", exc_type=ImportError)
    Publisher.made = []
    monkeypatch.setattr(llm, "KvEventPublisher", Publisher)


def test_changes_are_published_in_order() -> None:
    events = KvEvents(block_size=2)
    events.attach("component", 7)
    events.stored([1, 2, 3, 4], [10, 11], None)
    events.stored([5, 6], [12], 11)
    events.removed([12])
    (publisher,) = Publisher.made
    assert (publisher.worker_id, publisher.block_size) == (7, 2)
    assert publisher.events == [
        ("stored", 0, [1, 2, 3, 4], [2, 2], [10, 11], None),
        ("stored", 1, [5, 6], [2], [12], 11),
        ("removed", 2, [12]),
    ]


def test_a_new_registration_hears_of_what_is_held_parents_first() -> None:
    events = KvEvents(block_size=2)
    events.stored([1, 2, 3, 4], [10, 11], None)  # before any registration: nobody to tell
    events.attach("component", 7)
    events.stored([5, 6], [12], 11)
    events.removed([12])
    events.attach("component", 8)
    first, second = Publisher.made
    held = [("stored", [1, 2], [10], None), ("stored", [3, 4], [11], 10)]
    assert [(e[0], e[2], e[4], e[5]) for e in first.events[:2]] == held
    assert [(e[0], e[2], e[4], e[5]) for e in second.events] == held
    assert second.worker_id == 8

from __future__ import annotations

import threading
import time

import pytest

from pdstack.deploy.ask import Answer
from pdstack.deploy.load import Load, Outcome, judge


def good(text: str) -> Answer:
    return Answer("id", 200, [text], "length", True)


def cut(text: str) -> Answer:
    return Answer("id", 200, [text] if text else [], None, False, "broken")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (good("abc"), "ok"),
        (good("abd"), "wrong"),
        (good("ab"), "wrong"),
        (cut("ab"), "cut"),
        (cut("x"), "wrong"),
        (cut(""), "refused"),
    ],
)
def test_an_answer_is_judged_beside_the_undisturbed_one(answer: Answer, kind: str) -> None:
    assert judge(answer, "abc") == kind


def test_all_streams_ask_and_every_prompt_has_its_turn() -> None:
    together = threading.Barrier(3, timeout=5)
    first = threading.local()

    def ask(prompt: int) -> Answer:
        if not getattr(first, "seen", False):
            first.seen = True
            together.wait()  # breaks unless three streams ask at once
        time.sleep(0.001)
        return good(str(prompt))

    with Load(ask, ["0", "1", "2", "3", "4"], streams=3) as load:
        assert load.wait(lambda running: len(running.outcomes) >= 30, 5)
    assert load.counts() == {"ok": len(load.outcomes)}
    assert {outcome.prompt for outcome in load.outcomes} == set(range(5))


def test_a_wrong_answer_is_counted() -> None:
    with Load(lambda _: good("x"), ["y"], streams=1, pause_s=0.001) as load:
        assert load.wait(lambda running: running.counts()["wrong"] >= 1, 5)


def test_waiting_gives_up() -> None:
    load = Load(lambda _: good("x"), ["x"], streams=1)
    assert not load.wait(lambda _: False, 0.01)


def test_recovery_is_the_first_of_enough_good_answers_after_the_last_bad_one() -> None:
    load = Load(lambda _: good("x"), ["x"], streams=1)
    kinds = [(9, 11, "ok"), (10, 12, "ok"), (11, 13, "refused"), (12, 14, "ok"), (13, 15, "ok")]
    load.outcomes = [Outcome(0, sent, ended, kind, good("x")) for sent, ended, kind in kinds]
    assert load.recovered(10, in_a_row=2) == 4
    assert load.recovered(10, in_a_row=3) is None

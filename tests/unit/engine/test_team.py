from __future__ import annotations

import threading

import pytest

from pdstack.engine.team import Team


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_piece_is_done_once(size: int) -> None:
    team = Team(size)
    for count in (0, 1, 2, 3, 50):
        done: list[int] = []
        team.run(done.append, count)
        assert sorted(done) == list(range(count))
    team.close()


def test_several_threads_take_part() -> None:
    team = Team(3)
    meeting = threading.Barrier(3, timeout=20)
    team.run(lambda _: meeting.wait() and None, 3)
    team.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_is_raised_after_all_have_ended(failing: int) -> None:
    team = Team(2)
    done: list[int] = []

    def piece(number: int) -> None:
        if number == failing:
            raise MemoryError(str(number))
        done.append(number)

    for _ in range(20):
        done.clear()
        with pytest.raises(MemoryError, match=str(failing)):
            team.run(piece, 3)
        assert len(done) == 2
    team.run(lambda _: None, 3)
    team.close()


def test_its_threads_end() -> None:
    before = set(threading.enumerate())
    team = Team(4)
    own = set(threading.enumerate()) - before
    assert len(own) == 3
    team.close()
    for thread in own:
        thread.join(10)
    assert not any(thread.is_alive() for thread in own)

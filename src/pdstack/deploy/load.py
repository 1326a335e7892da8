"""Keep a frontend busy with known prompts and judge every answer.

Greedy answers do not change, so each one is compared with the answer of an undisturbed run: a complete one must be
equal, one that was cut must be a beginning of it. Anything else is a wrong token, which no failure excuses.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdstack.deploy.ask import Answer

Ask = Callable[[int], Answer]


@dataclass
class Outcome:
    """One answer: which prompt, when it was sent and when it ended (seconds of the monotonic clock), what it was.

    `kind` is `ok`, `cut` (a part came, then an error or nothing), `refused` (nothing came) or `wrong`.
    """

    prompt: int
    sent: float
    ended: float
    kind: str
    answer: Answer


def judge(answer: Answer, wanted: str) -> str:
    """Return the kind of an answer beside the text of the undisturbed run."""
    if answer.good:
        return "ok" if answer.text == wanted else "wrong"
    if not wanted.startswith(answer.text):
        return "wrong"
    return "cut" if answer.text else "refused"


@dataclass
class Load:
    """`streams` clients that each send one prompt after the other, in turn, until stopped.

    `ask(prompt)` sends prompt number `prompt` and returns its answer; `wanted` holds the text of each prompt's
    undisturbed answer. `pause_s` is waited after an answer that was not good, so that a dead service is not hammered.
    """

    ask: Ask
    wanted: Sequence[str]
    streams: int
    pause_s: float = 0.2
    outcomes: list[Outcome] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def _client(self, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            prompt = turn % len(self.wanted)
            sent = time.monotonic()
            answer = self.ask(prompt)
            kind = judge(answer, self.wanted[prompt])
            self.outcomes.append(Outcome(prompt, sent, time.monotonic(), kind, answer))
            turn += self.streams
            if kind != "ok":
                self._stop.wait(self.pause_s)

    def __enter__(self) -> Load:
        for number in range(self.streams):
            thread = threading.Thread(target=self._client, args=(number,), name=f"load-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        """Let the requests in flight end, and stop."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def counts(self, since: float = 0.0) -> Counter[str]:
        """Return how many answers of each kind ended at or after `since`."""
        return Counter(outcome.kind for outcome in list(self.outcomes) if outcome.ended >= since)

    def recovered(self, since: float, in_a_row: int) -> float | None:
        """Return the seconds from `since` to the first of `in_a_row` good answers sent after it, or None so far.

        The row is counted in the order in which the answers were sent and restarts at each one that was not good.
        """
        row: list[Outcome] = []
        for outcome in sorted(self.outcomes, key=lambda entry: entry.sent):
            if outcome.sent < since:
                continue
            row = [*row, outcome] if outcome.kind == "ok" else []
            if len(row) == in_a_row:
                return row[0].ended - since
        return None

    def wait(self, condition: Callable[[Load], bool], timeout_s: float) -> bool:
        """Wait until `condition(self)`, and return whether it came true within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not condition(self):
            if time.monotonic() >= deadline:
                return False
            self._stop.wait(0.1)
        return True

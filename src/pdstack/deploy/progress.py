"""When to say that a long task is still running.

Ansible prints a task's name when it starts and its results when it ends. Between the two a build of an image can take
a minute, and a silent minute looks like a hang. The callback plugin asks a `Heartbeat` what to say.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Heartbeat:
    """Decides when a line is due. Times are seconds of one monotonic clock.

    `interval` is both the age at which a task counts as long and the pause between two lines.
    """

    interval: float = 15.0
    task: str = ""
    started: float = 0.0
    last_line: float = 0.0

    def start(self, task: str, now: float) -> None:
        """Note that `task` begins; its name is what the lines will say."""
        self.task, self.started, self.last_line = task, now, now

    def stop(self) -> None:
        """Note that nothing runs any more."""
        self.task = ""

    def line(self, now: float) -> str | None:
        """Return the line that is due at `now`, or None; a line counts as printed when it is returned."""
        if not self.task or now - self.last_line < self.interval:
            return None
        self.last_line = now
        return f"  ... still running after {now - self.started:.0f} s: {self.task}"

"""Say every 15 seconds which task is still running, so that no minute is silent."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from ansible.plugins.callback import CallbackBase

# Found from here, so that a plain `ansible-playbook site.yml` works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy.progress import Heartbeat

DOCUMENTATION = """
name: pdstack_progress
type: aggregate
short_description: Says which task is still running
description:
  - Prints a line with the task's name and age whenever 15 seconds passed without one.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "pdstack_progress"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._heartbeat = Heartbeat()
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None

    def _watch(self) -> None:
        while not self._finished.wait(1.0):
            with self._lock:
                line = self._heartbeat.line(time.monotonic())
            if line:
                self._display.display(line)

    def _started(self, task) -> None:
        with self._lock:
            self._heartbeat.start(task.get_name().strip(), time.monotonic())

    def v2_playbook_on_start(self, playbook) -> None:  # noqa: ARG002 - the interface is Ansible's
        self._thread = threading.Thread(target=self._watch, name="pdstack_progress", daemon=True)
        self._thread.start()

    def v2_playbook_on_task_start(self, task, is_conditional) -> None:  # noqa: ARG002 - the interface is Ansible's
        self._started(task)

    def v2_playbook_on_handler_task_start(self, task) -> None:
        self._started(task)

    def v2_runner_retry(self, result) -> None:
        # A task that waits for something long may say how far that is (the build of the runtime image).
        found = str(result._result.get("stdout", "")).partition("\n")[0]
        if found.startswith("progress: "):
            self._display.display(f"  ... {found.removeprefix('progress: ')}")

    def v2_playbook_on_stats(self, stats) -> None:  # noqa: ARG002 - the interface is Ansible's
        with self._lock:
            self._heartbeat.stop()
        self._finished.set()

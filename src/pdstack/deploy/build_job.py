"""A long command that goes on by itself, and a line that says how far it is. For the build host: standard library only.

    build_job.py run   --state DIR --log FILE --cwd DIR -- COMMAND ...   runs it to its end; DIR/pid and DIR/status
    build_job.py watch --state DIR --log FILE [--begun]                  says where it is

`watch` prints "progress: ..." and ends with 75 while the command runs, with 0 after it has succeeded, with 1 after it
has failed (then the log's last lines follow), and with 3 if there is no such command, or it was killed. With --begun
the command was started a moment ago, and a state that is not there yet is waited for.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RUNNING = 75
FAILED = 1
NOT_THERE = 3
TAIL_LINES = 25
TAIL_BYTES = 1 << 20
LONGEST_LINE = 160
BEGINS_WITHIN_S = 60.0

# BuildKit's plain progress, and the older builder's.
_STEP = re.compile(
    r"^#(?P<number>\d+) \[(?P<stage>[^\]]*\d+/\d+)\] (?P<what>.*)$|^Step (?P<old>\d+/\d+) : (?P<text>.*)$"
)
_DONE = re.compile(r"^#(\d+) (?:DONE|CACHED)|^ ---> [0-9a-f]{12}$")
_PREFIX = re.compile(r"^#\d+ (?:\d+\.\d+ )?")


def progress(text: str, seconds: float) -> str:
    """Return one line out of a build's log: steps done, the step at work, the last line, and the time so far."""
    done, step, last = 0, "", ""
    for line in text.splitlines():
        if match := _STEP.match(line):
            step = f"[{match['stage'] or match['old']}] {match['what'] or match['text']}"
        if _DONE.match(line):
            done += 1
        last = _PREFIX.sub("", line).strip() or last
    minutes, rest = divmod(int(seconds), 60)
    parts = [f"{minutes} min {rest:02d} s", f"{done} steps done", step, f"last line: {last}" if last else ""]
    return ", ".join(part[:LONGEST_LINE] for part in parts if part)


def tail(log: Path) -> str:
    """Return the end of the log, whole lines."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def alive(state: Path) -> bool:
    """Return whether the command of `state` runs."""
    try:
        pid, started = (state / "pid").read_text().split()
        return start_time(int(pid)) == started
    except (OSError, ValueError):
        return False


def start_time(pid: int) -> str:
    """Return when a process began, in the kernel's ticks, so that a pid that was given again is not taken for it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def say(*lines: str) -> None:
    """Print lines."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def run(state: Path, log: Path, cwd: Path, command: Sequence[str]) -> int:
    """Run the command, all output to the log; return its status."""
    state.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    (state / "status").unlink(missing_ok=True)
    (state / "pid").write_text(f"{os.getpid()} {start_time(os.getpid())}")
    with log.open("wb") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        status = subprocess.run(
            list(command), cwd=cwd, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
        ).returncode
    (state / "status").write_text(str(status))
    return status


def watch(state: Path, log: Path, patience_s: float = 0.0) -> int:
    """Print where the command is; return RUNNING, 0, FAILED or NOT_THERE. Waits `patience_s` for it to begin."""
    deadline = time.monotonic() + patience_s
    while not (state / "pid").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    began = (state / "pid").stat().st_mtime if (state / "pid").is_file() else time.time()
    text = tail(log)
    say(f"progress: {progress(text, time.time() - began)}")
    if (state / "status").is_file():
        status = int((state / "status").read_text())
        if status == 0:
            return 0
        say(f"ended with {status}; the last lines of {log}:", *text.splitlines()[-TAIL_LINES:])
        return FAILED
    if alive(state):
        return RUNNING
    say(f"it does not run, and has left no status: it was killed, or never began; its log is {log}")
    return NOT_THERE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="build_job", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=["run", "watch"])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--begun", action="store_true")
    parser.add_argument("--cwd", type=Path, default=Path())
    given = list(sys.argv[1:] if arguments is None else arguments)
    # By hand: argparse of older Pythons takes no list of words after options.
    at = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:at])
    if options.verb == "watch":
        return watch(options.state, options.log, BEGINS_WITHIN_S if options.begun else 0.0)
    return run(options.state, options.log, options.cwd, given[at + 1 :])


if __name__ == "__main__":
    sys.exit(main())

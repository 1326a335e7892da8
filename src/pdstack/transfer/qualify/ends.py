"""One end as the one who asks sees it: a process that is started here and answers on its standard output."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pdstack.transfer.metadata import read_json

# Results are some ten KiB.
_MAX_ANSWER = 8 << 20


class EndFailed(RuntimeError):
    """An end died, was silent for too long, or refused a request. The message says which and why."""


def ended_how(code: int, asked: str) -> str:
    """How a process ended that was asked something: by its exit code, or minus the number of a signal."""
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"ended with {how} at {asked!r}: see its standard error"


def answered(name: str, asked: str, answer: Any) -> dict[str, Any]:
    """An end's answer, unless it is none, or says that it failed. Raises :class:`EndFailed`."""
    if not isinstance(answer, dict):
        raise EndFailed(f"{name} answered {asked!r} with {type(answer).__name__}, wanted an object")
    if "failed" in answer:
        raise EndFailed(f"{name} could not {asked}: {answer['failed']!s:.2000}")
    return answer


class End:
    """One process that answers. Raises :class:`EndFailed`; after that it is dead and has to be started again."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=dict(environment), bufsize=0)
        self._rest = b""

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a request."""
        source, target = self._process.stdout, self._process.stdin
        if source is None or target is None:
            raise EndFailed(f"{self.name} was started without pipes")
        limit = time.monotonic() + timeout_s
        try:
            target.write(json.dumps(request).encode() + b"\n")
            while b"\n" not in self._rest:
                if not select.select([source], [], [], max(0.0, limit - time.monotonic()))[0]:
                    self.close()
                    raise EndFailed(f"{self.name} did not answer {request['do']!r} within {timeout_s:g} s: ended it")
                more = os.read(source.fileno(), 1 << 20)
                if not more:
                    raise BrokenPipeError
                self._rest += more
                if len(self._rest) > _MAX_ANSWER:
                    self.close()
                    raise EndFailed(f"{self.name} answered {request['do']!r} with more than {_MAX_ANSWER} bytes")
        except BrokenPipeError:
            raise EndFailed(f"{self.name} {ended_how(self._process.wait(), request['do'])}") from None
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            answer = read_json(line)
        except ValueError as error:
            self.close()
            raise EndFailed(f"{self.name} answered {request['do']!r} with what is not JSON: {error}") from None
        return answered(self.name, request["do"], answer)

    @property
    def alive(self) -> bool:
        """False once it has ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it, at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

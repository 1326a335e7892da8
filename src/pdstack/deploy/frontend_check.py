"""The health check of a frontend: it is well while it lists the model and takes requests for it.

    python3 -S -E frontend_check.py URL MODEL NAMESPACE ETCD_URL [ETCD_URL ...]

Dynamo 0.7's frontend answers /health with 200 whatever it knows, and it can lose a model for good: a worker whose
lease ran out registers again, and a frontend whose watch of etcd broke at that moment (a member restarted, the
cluster had no quorum) never hears of it. Then it lists nothing and answers 503, while etcd has the worker's card. Such
a frontend is ended after STALE_S, so that the engine starts it again: a new one reads etcd from the beginning.
(A list with the model is not enough: a prefill worker alone is listed too, and every request gets 503.)

Exit 0: it serves. Exit 1 with the reason otherwise. It runs inside the frontend's container, whose process
is number 1, in the python3 of any image: standard library only, in one file.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

# A frontend that starts, or whose worker just registered, needs a moment; three checks of 15 s are more than that.
STALE_S = 40.0
TIMEOUT_S = 2.0
# Since when a worker is missed, in the container's own memory: a restart forgets it.
STATE = Path("/tmp/pdstack-worker-missed")  # noqa: S108  # a memory mount of the container's own
# The component of the workers that do prefill alone; a model is listed once one of another component is there.
PREFILL = "prefill"


def ask(url: str, body: object = None) -> object:
    """GET `url` (POST with a body) past any proxy; the decoded JSON. Raises OSError or ValueError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310  # http, from us
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def models(url: str) -> list[str]:
    """The names that the frontend lists."""
    answer = ask(f"{url}/v1/models")
    return [str(entry["id"]) for entry in answer["data"]] if isinstance(answer, dict) else []


def takes_requests(url: str) -> bool:
    """Whether /v1/completions looks at a request at all (this one is empty, so the answer is 400, and no work)."""
    try:
        ask(f"{url}/v1/completions", {})
    except urllib.error.HTTPError as error:
        return error.code != 503
    return True


def cards(endpoints: list[str], namespace: str) -> list[str]:
    """Keys of the model cards of workers that answer requests; from the first endpoint that answers. Raises OSError."""
    prefix = f"v1/mdc/{namespace}/"
    keys = [base64.b64encode(text.encode()).decode() for text in (prefix, prefix[:-1] + "0")]
    problem: Exception = OSError("no etcd endpoint was given")
    for endpoint in endpoints:
        try:
            found = ask(f"{endpoint}/v3/kv/range", {"key": keys[0], "range_end": keys[1], "keys_only": True})
        except (OSError, ValueError) as error:
            problem = error
            continue
        entries = found.get("kvs", []) if isinstance(found, dict) else []
        named = [base64.b64decode(entry["key"]).decode() for entry in entries]
        return [key for key in named if key.removeprefix(prefix).partition("/")[0] != PREFILL]
    raise OSError(f"etcd: {problem}")


def missed_since(now: float, state: Path) -> float:
    """Since when a worker is missed, in seconds of `now`'s clock; notes `now` the first time."""
    try:
        return float(state.read_text())
    except (OSError, ValueError):
        state.write_text(repr(now))
        return now


def check(url: str, model: str, namespace: str, endpoints: list[str], *, now: float, state: Path) -> tuple[str, bool]:
    """Return (what is wrong, "" if nothing; whether the frontend is to be started again)."""
    listed = models(url)
    if model in listed and takes_requests(url):
        state.unlink(missing_ok=True)
        return "", False
    found = f"{url}/v1/models lists {', '.join(listed) or 'no model'}, wanted {model}"
    if model in listed:
        found = f"{url}/v1/completions answers 503, wanted requests for {model} to be taken"
    try:
        registered = cards(endpoints, namespace)
    except OSError as error:
        state.unlink(missing_ok=True)
        return f"{found}; {error}", False
    if not registered:
        state.unlink(missing_ok=True)
        return f"{found}; etcd has no card of a decode worker: look at the workers", False
    missed = now - missed_since(now, state)
    found += f"; etcd has the card of {len(registered)} worker(s), unseen by this frontend for {missed:.0f} s"
    return found, missed > STALE_S


def main(arguments: list[str]) -> int:
    """Run the check of the command line."""
    if len(arguments) < 4:
        sys.stderr.write("usage: frontend_check URL MODEL NAMESPACE ETCD_URL [ETCD_URL ...]\n")
        return 2
    url, model, namespace, *endpoints = arguments
    try:
        wrong, again = check(url, model, namespace, endpoints, now=time.monotonic(), state=STATE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong, again = f"{url}/v1/models: {error}", False
    if again:
        wrong += ": it is started again"
        # Its log is where people look for the reason of a restart; the check's own output ends with the container.
        with contextlib.suppress(OSError):
            Path("/proc/1/fd/2").write_text(f"pdstack: {wrong}\n")
        STATE.unlink(missing_ok=True)
        os.kill(1, signal.SIGTERM)
    if wrong:
        sys.stderr.write(wrong + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

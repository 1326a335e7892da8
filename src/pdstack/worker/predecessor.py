"""Withdraw what a killed process of the same worker left behind in etcd.

After kill -9 the lease lives on for up to 10 s, and the router goes on sending requests to nobody. The next process of
the same name knows that its predecessor is dead: it revokes that lease, and then leaves a note of its own.

The note is the key `pdstack/NAMESPACE/workers/NAME`, its value the lease in hex. Spoken is etcd's JSON gateway (on by
default in 3.4 and later), over plain http; over https this is skipped, and the lease runs out by itself.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

TIMEOUT_S = 3.0


def key_of(namespace: str, name: str) -> str:
    """Return the key of a worker's note."""
    return f"pdstack/{namespace}/workers/{name}"


async def replace(endpoints: Sequence[str], namespace: str, name: str, lease: int) -> None:
    """Revoke the lease that the last process of this name noted, and note `lease`. Failure is logged, not raised."""
    endpoint = next((e for e in endpoints if e.startswith("http://")), None)
    if endpoint is None:
        return
    try:
        await asyncio.to_thread(_replace, endpoint, key_of(namespace, name), lease)
    except (OSError, http.client.HTTPException, ValueError) as error:
        log.warning("could not look for a predecessor in %s: %s; a stale lease ends by itself in 10 s", endpoint, error)


def _replace(endpoint: str, key: str, lease: int) -> None:
    found = _call(endpoint, "kv/range", {"key": _encode(key)}).get("kvs") or []
    if found:
        old = int(base64.b64decode(found[0]["value"]), 16)
        if old != lease:
            known = _call(endpoint, "lease/timetolive", {"ID": str(old)})
            if int(known.get("TTL", -1)) > 0:
                _call(endpoint, "lease/revoke", {"ID": str(old)})
                log.info("revoked lease %x, which an earlier process of this worker left behind", old)
    _call(endpoint, "kv/put", {"key": _encode(key), "value": _encode(f"{lease:x}")})


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _call(endpoint: str, method: str, body: dict[str, Any]) -> dict[str, Any]:
    """One call of the gateway. Raises OSError, HTTPException, or ValueError for an answer that is no success."""
    url = urlsplit(endpoint)
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 2379, timeout=TIMEOUT_S)
    try:
        connection.request("POST", f"/v3/{method}", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{method}: wanted status 200, found {response.status}: {text[:200].decode(errors='replace')}")
    answer: dict[str, Any] = json.loads(text)
    return answer

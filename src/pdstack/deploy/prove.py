"""Proves that etcd and NATS do what Dynamo needs of them: a write that can be read back, on every member.

    python3 prove.py etcd TIMEOUT_S http://10.0.0.1:2379 [http://10.0.0.2:2379 ...]
    python3 prove.py jetstream TIMEOUT_S nats://10.0.0.1:4222 [nats://10.0.0.2:4222 ...] [http://10.0.0.1:8222 ...]

    python3 prove.py replicate TIMEOUT_S NAMESPACE nats://10.0.0.1:4222 [nats://10.0.0.2:4222 ...]
    python3 prove.py leases TIMEOUT_S http://10.0.0.1:2379 [http://10.0.0.2:2379 ...]

The last two prove nothing. replicate gives the streams of a Dynamo namespace a copy on every server, and says how many
it changed: Dynamo 0.7 makes them with one copy, which is gone for as long as its server is. leases waits until every
client of etcd has renewed its lease: Dynamo 0.7 renews a lease of 10 s every 5 s, so a client that loses its
connection twice within 10 s, because two members were restarted, loses its lease as well, and ends.

Standard library only, and in one file: the playbooks feed it to the python3 of a host. Both proofs use names of their
own (a random part) and remove them again. Exit 0 with one line of what was proved, or 1 with found, wanted and fix.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

CALL_TIMEOUT_S = 3.0
PAUSE_S = 0.3
# With these a server without JetStream says at once that nobody listens on its subjects.
OPTIONS = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True}


class Unproved(Exception):
    """The service answered wrongly or not at all; the text says how."""


def etcd_call(endpoint: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST to etcd's JSON gateway and return the answer; Unproved when it is not JSON with status 200."""
    request = urllib.request.Request(  # noqa: S310  # the URLs are http, out of the inventory
        f"{endpoint}/v3/{path}", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    # No proxy: the members are reached as the workers reach them.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=CALL_TIMEOUT_S) as answer:
            result: dict[str, Any] = json.load(answer)
            return result
    except urllib.error.HTTPError as error:
        text = error.read(300).decode(errors="replace").strip()
        raise Unproved(f"{endpoint}: status {error.code}: {text}") from error
    except (OSError, ValueError) as error:
        raise Unproved(f"{endpoint}: {getattr(error, 'reason', None) or error}") from error


def prove_etcd(endpoints: list[str]) -> str:
    """Write a key through the first endpoint, read it through each, delete it; return what was proved."""
    key = base64.b64encode(f"pdstack/probe/{secrets.token_hex(8)}".encode()).decode()
    value = base64.b64encode(secrets.token_bytes(16)).decode()
    etcd_call(endpoints[0], "kv/put", {"key": key, "value": value})
    try:
        for endpoint in endpoints:
            found = etcd_call(endpoint, "kv/range", {"key": key}).get("kvs", [])
            if [entry.get("value") for entry in found] != [value]:
                raise Unproved(f"{endpoint}: the key that was just written reads as {found!r}")
    finally:
        with contextlib.suppress(Unproved):
            etcd_call(endpoints[0], "kv/deleterange", {"key": key})
    return f"etcd: a key written through {endpoints[0]} was read through {len(endpoints)} of {len(endpoints)} members"


def settle(endpoints: list[str], timeout_s: float) -> str:
    """Wait until every lease of now was renewed or is gone, for `timeout_s` at most; return how many were.

    Time to live is given in whole seconds, and goes up only if the client renews.
    """

    def left(lease: str) -> int:
        return int(etcd_call(endpoints[0], "lease/timetolive", {"ID": lease}).get("TTL", -1))

    deadline = time.monotonic() + timeout_s
    leases = [entry["ID"] for entry in etcd_call(endpoints[0], "lease/leases", {}).get("leases", [])]
    last = {lease: left(lease) for lease in leases}
    waiting, gone = set(leases), 0
    while waiting and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
        for lease in sorted(waiting):
            now = left(lease)
            if now < 0:
                gone += 1
            if now < 0 or now > last[lease]:
                waiting.discard(lease)
            last[lease] = now
    renewed = len(leases) - gone - len(waiting)
    return f"etcd: {renewed} of {len(leases)} leases were renewed, {gone} ran out, {len(waiting)} not renewed yet"


class NatsClient:
    """As much of the NATS protocol as a request and its reply need."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 4222), CALL_TIMEOUT_S)
        self._stream = self._socket.makefile("rb")
        if not self._stream.readline().startswith(b"INFO "):
            raise Unproved(f"{url}: does not greet as NATS does")
        self._inbox = f"_INBOX.{secrets.token_hex(8)}"
        self._send(f"CONNECT {json.dumps(OPTIONS)}\r\nSUB {self._inbox} 1\r\n".encode())

    def _send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._socket.close()

    def request(self, subject: str, payload: bytes = b"") -> dict[str, Any]:
        """Publish with a reply subject and return the reply, which JetStream gives as JSON."""
        self._send(f"PUB {subject} {self._inbox} {len(payload)}\r\n".encode() + payload + b"\r\n")
        while line := self._stream.readline():
            words = line.split()
            if words[:1] == [b"PING"]:
                self._send(b"PONG\r\n")
            elif words[:1] == [b"-ERR"]:
                raise Unproved(line.decode(errors="replace").strip())
            elif words[:1] in ([b"MSG"], [b"HMSG"]):
                data = self._stream.read(int(words[-1]) + 2)[:-2]
                if words[0] == b"HMSG":
                    raise Unproved(f"{subject}: {data.decode(errors='replace').strip()} (is JetStream off?)")
                reply: dict[str, Any] = json.loads(data)
                if error := reply.get("error"):
                    raise Unproved(f"{subject}: {error.get('description', error)}")
                return reply
        raise Unproved("the server closed the connection")


def nats_health(monitor: str) -> None:
    """Ask a server whether it and its part of JetStream are up to date; Unproved with what it says otherwise."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{monitor}/healthz", timeout=CALL_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        raise Unproved(f"{monitor}/healthz: {error.read(300).decode(errors='replace').strip()}") from error
    except OSError as error:
        raise Unproved(f"{monitor}/healthz: {getattr(error, 'reason', None) or error}") from error


def stored(client: NatsClient, stream: str, sequence: int) -> bytes:
    """Return a message of a stream."""
    request = json.dumps({"seq": sequence}).encode()
    return base64.b64decode(client.request(f"$JS.API.STREAM.MSG.GET.{stream}", request)["message"]["data"])


def prove_jetstream(*servers: str) -> str:
    """Store a message on every server, read it back through each, delete it; return what was proved.

    `servers` are the NATS URLs of a cluster or of a server that stands alone, and http URLs of their monitors. A
    stream that has a replica on each server can be made only while all of them are up.
    """
    urls = [server for server in servers if not server.startswith("http")]
    name = f"pdstack-probe-{secrets.token_hex(6)}"
    subject = f"pdstack.probe.{secrets.token_hex(6)}"
    payload = secrets.token_hex(16).encode()
    at = urls[0]
    try:
        for monitor in set(servers) - set(urls):
            nats_health(monitor)
        client = NatsClient(at)
    except OSError as error:
        raise Unproved(f"{at}: {error}") from error
    clients = [client]
    try:
        stream = {
            "name": name, "subjects": [subject], "storage": "file", "max_bytes": 65536, "num_replicas": len(urls),
        }  # fmt: skip
        client.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(stream).encode())
        try:
            sequence = client.request(subject, payload)["seq"]
            for at in urls:
                peer = client if at == urls[0] else NatsClient(at)
                clients.append(peer)
                if (read := stored(peer, name, sequence)) != payload:
                    raise Unproved(f"{at}: the message that was just stored reads as {read!r}")
        finally:
            with contextlib.suppress(Unproved):
                client.request(f"$JS.API.STREAM.DELETE.{name}")
    except (OSError, KeyError, ValueError) as error:
        raise Unproved(f"{at}: {error or type(error).__name__}") from error
    finally:
        for peer in clients:
            peer.close()
    if len(urls) == 1:
        return f"NATS: JetStream of {urls[0]} stored a message on disk and gave it back"
    return f"NATS: JetStream stored a message on {len(urls)} servers, and it was read through each"


def replicate(namespace: str, servers: list[str]) -> str:
    """Give every stream of the Dynamo namespace a replica on each server; return what was changed."""
    # Dynamo's own spelling of the names; OBJ_ marks the bucket of the router's snapshots.
    begins = f"namespace-{namespace.replace('_', '-').replace('.', '-')}-"
    changed, offset, total = [], 0, 1
    try:
        client = NatsClient(servers[0])
        try:
            while offset < total:
                page = client.request("$JS.API.STREAM.LIST", json.dumps({"offset": offset}).encode())
                streams = page.get("streams") or []
                total, offset = int(page["total"]), offset + max(1, len(streams))
                for stream in streams:
                    config = stream["config"]
                    ours = config["name"].removeprefix("OBJ_").startswith(begins)
                    if ours and config["num_replicas"] != len(servers):
                        wanted = json.dumps(config | {"num_replicas": len(servers)}).encode()
                        client.request(f"$JS.API.STREAM.UPDATE.{config['name']}", wanted)
                        changed.append(config["name"])
        finally:
            client.close()
    except (OSError, KeyError, ValueError) as error:
        raise Unproved(f"{servers[0]}: {error or type(error).__name__}") from error
    return f"NATS: {len(changed)} streams of {namespace} were given a copy on {len(servers)} servers {changed}"


def until(proof: Callable[[], str], timeout_s: float) -> str:
    """Repeat a proof until it succeeds; its last failure is raised when the time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return proof()
        except Unproved:
            if time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE_S)


def main(arguments: list[str]) -> int:
    """Run the proof that the command line names."""
    what, timeout_s, *urls = arguments
    proofs: dict[str, Callable[[], str]] = {
        "etcd": lambda: prove_etcd(urls),
        "jetstream": lambda: prove_jetstream(*urls),
        "replicate": lambda: replicate(urls[0], urls[1:]),
        "leases": lambda: settle(urls, float(timeout_s)),
    }
    wanted = {
        "etcd": ("a key written and read back through every member", "etcd"),
        "jetstream": ("a message stored by JetStream and read back through every server", "nats"),
        "replicate": ("a copy of Dynamo's streams on every server", "nats"),
        "leases": ("every client's lease renewed", "etcd"),
    }[what]
    proof = what in ("etcd", "jetstream")
    try:
        sys.stdout.write(until(proofs[what], float(timeout_s)) + "\n")
    except Unproved as error:
        sys.stderr.write(
            f"{what} could not be {'proved' if proof else 'done'} within {timeout_s} s"
            f"{', so no worker is started' if proof else ''}.\n"
            f"   found:  {error}\n   wanted: {wanted[0]}\n"
            f"   fix:    read the log of its container (docker logs pdstack-NAME-{wanted[1]}), then deploy again\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

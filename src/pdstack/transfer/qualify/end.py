"""One end of the qualification: a process where a worker will run, that does what is asked on its standard input.

A request and an answer are one line of JSON each, so an end can be started anywhere a command can be: here, in a
container, over ssh. It ends when its input does. The key of the measurement's streams comes in the first request. With
``--listen`` it is a server that starts such a process for whoever knows the cluster key: `listen`.

    {"do": "open", "role": "prefill", ...}   -> {"metadata": {path: base64}, "refused": {path: why}, "facts": {...}}
    {"do": "measure", "path": "cma", ...}    -> what :class:`pdstack.transfer.qualify.measure.Measured` holds
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import gcd
from typing import Any

import numpy as np

from pdstack.transfer.backends import BACKENDS, open_exporter
from pdstack.transfer.channel import Identity
from pdstack.transfer.errors import TransferError
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.layout import KVLayout, PoolView, allocate_pool
from pdstack.transfer.paths import CmaExporter, Region, SharedExporter, SharedPool, StreamExporter
from pdstack.transfer.qualify import gpu
from pdstack.transfer.qualify.facts import observe
from pdstack.transfer.qualify.limits import Address, Copy, Stream, StreamServer
from pdstack.transfer.qualify.listen import serve
from pdstack.transfer.qualify.measure import PATHS, Bytes, Measured, attempt, case, fill, measure, open_reader
from pdstack.transfer.roles import Role

_AUDIENCE = "qualification"
_PAGE = 4096


def private_pool(nbytes: int) -> Bytes:
    """Anonymous memory as the agents have it: huge pages where the kernel may."""
    return allocate_pool(KVLayout(nbytes, 1, 1, 1, 1, "uint8")).reshape(-1)[:nbytes].view(np.uint8)


class Prefill:
    """Its pools, filled with what decode will look for, and an exporter for each path that can be."""

    metadata: dict[str, str]
    refused: dict[str, str]

    def __init__(self, request: dict[str, Any]) -> None:
        nbytes, self._owner, host = int(request["nbytes"]), int(request["owner"]), str(request["host"])
        stream_port, limit_port = (int(port) for port in request.get("ports", (0, 0)))
        identity = Identity(
            str(request["name"]), "1", Role.PREFILL, _AUDIENCE, ClusterKey(str(request["key"]).encode())
        )
        self._kept: list[Any] = []
        self._pages = ""
        if gpu.wanted(request["paths"]):
            made = gpu.Prefill(request["paths"], nbytes, self._owner, identity, host, [stream_port, limit_port])
            self._kept.append(made)
            self.metadata, self.refused, self.limit = made.metadata, made.refused, made.limit
            return
        pool = private_pool(nbytes)
        fill(pool, self._owner)
        region = Region.of(pool)
        view = PoolView(region.address, _PAGE, nbytes // _PAGE)
        openers: dict[str, Callable[[], Any]] = {
            "shared": lambda: self._shared(nbytes),
            "cma": lambda: CmaExporter(region),
            "stream": lambda: StreamExporter(region, identity, host, stream_port),
        }
        openers |= {name: partial(open_exporter, name, identity.name, view) for name in BACKENDS}
        self.metadata = {}
        self.refused = {}
        for path in request["paths"]:
            try:
                exporter = openers[path]()
            except (TransferError, OSError, MemoryError) as error:
                self.refused[path] = str(error)
            else:
                self._kept.append(exporter)
                self.metadata[path] = b64encode(exporter.metadata()).decode()
        server = StreamServer(host, limit_port)
        self._kept += [pool, server]
        self.limit = list(server.address)

    def _shared(self, nbytes: int) -> SharedExporter:
        shared = SharedPool(nbytes)
        fill(shared.array, self._owner)
        self._pages = shared.pages().kind
        self._kept.append(shared)
        return SharedExporter(shared)

    def opened(self) -> dict[str, Any]:
        """The answer to "open"."""
        facts = observe(pool_pages=self._pages).as_json()
        return {"metadata": self.metadata, "refused": self.refused, "limit": self.limit, "facts": facts}


class Decode:
    """Its pool, into which every path reads in turn."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._identity = Identity(
            str(request["name"]), "1", Role.DECODE, _AUDIENCE, ClusterKey(str(request["key"]).encode())
        )
        nbytes = int(request["nbytes"])
        # Where the plain stream arrives: sockets know host memory only.
        self._host = private_pool(nbytes)
        self._pool: Any = self._host
        if gpu.wanted(request.get("paths")):
            self._pool = gpu.GpuPool(nbytes)
        self._copy = Copy(nbytes // 2) if self._pool is self._host else gpu.GpuCopy(nbytes // 2)

    def opened(self) -> dict[str, Any]:
        """The answer to "open"."""
        return {"facts": observe().as_json()}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """One path to one prefill."""
        sizes = [int(size) for size in request["sizes"]]
        path, owner = str(request["path"]), int(request["owner"])
        cases = [case(size, len(self._pool) // 2, owner + size) for size in sizes]

        def measured() -> Measured:
            metadata = b64decode(request["metadata"])
            with contextlib.ExitStack() as stack:
                reader = open_reader(path, metadata, self._pool, gcd(*sizes), self._identity)
                stack.callback(reader.close)
                stream = Stream(Address(*request["limit"]), Region.of(self._host))
                stack.callback(stream.close)
                limits = {"memcpy": self._copy, "socket": stream}
                return measure(path, reader, self._pool, cases, owner, int(request["rounds"]), limits)

        return asdict(attempt(path, measured))


def converse(read: Callable[[], str], write: Callable[[str], object]) -> None:
    """Answer until there are no more requests. A request that fails is answered with its error."""
    end: Prefill | Decode | None = None
    while line := read():
        answer: dict[str, Any]
        try:
            request = json.loads(line)
            match request["do"], end:
                case "open", _:
                    if unknown := set(request.get("paths", ())) - set(PATHS):
                        raise ValueError(f"paths {sorted(unknown)}, wanted some of {', '.join(PATHS)}")
                    end = Prefill(request) if request["role"] == Role.PREFILL else Decode(request)
                    answer = end.opened()
                case "ping", _:
                    answer = {}
                case "measure", Decode():
                    answer = end.measure(request)
                case _:
                    raise ValueError(f"{request['do']!r} is not asked of {type(end).__name__}")
        except Exception as error:  # whatever it is, the one who asked must hear of it
            answer = {"failed": f"{type(error).__name__}: {error}"}
        write(json.dumps(answer) + "\n")


def main() -> int:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="python -m pdstack.transfer.qualify.end", description=__doc__)
    parser.add_argument("--listen", metavar="ADDRESS:PORT", help="serve there instead of standard input and output")
    parser.add_argument("--name", default="end", help="of the end, with --listen")
    parser.add_argument("--key-file", help="the cluster key, with --listen")
    options = parser.parse_args()
    if options.listen:
        if options.key_file is None:
            parser.error("--listen wants --key-file: an end answers those only who know the cluster key")
        host, _, port = options.listen.rpartition(":")
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
        asyncio.run(serve(options.name, ClusterKey.from_file(options.key_file), host.strip("[]"), int(port)))
        return 0
    # Libraries that print must not print into the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)

    def write(line: str) -> None:
        answers.write(line)
        answers.flush()

    converse(sys.stdin.readline, write)
    return 0


if __name__ == "__main__":
    main()
    # The threads and libraries of NIXL's wheel do not all end well at the interpreter's exit.
    os._exit(0)

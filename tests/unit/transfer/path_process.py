"""Prefill's process of a path test: makes a pool, exports it, and does as told. Started by `path_pair.py`."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Client

import numpy as np

from pdstack.transfer.channel import Identity
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.paths import CmaExporter, Region, SharedExporter, SharedPool, StreamExporter
from pdstack.transfer.paths.base import hash_pieces
from pdstack.transfer.roles import Role


def main() -> None:
    with Client(sys.argv[1], authkey=os.environ["PAIR_AUTH"].encode()) as pipe:
        nbytes, key = pipe.recv()
        shared = SharedPool(nbytes)
        array = shared.array
        array[:] = np.random.default_rng(11).integers(0, 255, nbytes, np.uint8)
        region = Region.of(array)
        identity = Identity("prefill-0", "run-1", Role.PREFILL, "ns/model", ClusterKey(key))
        exporters = {
            "shared": SharedExporter(shared),
            "cma": CmaExporter(region),
            "stream": StreamExporter(region, identity, "127.0.0.1"),
        }
        pipe.send({name: exporter.metadata() for name, exporter in exporters.items()})
        while True:
            match pipe.recv():
                case ("hashes", source, sizes):
                    pipe.send(hash_pieces(region.bytes(), source, sizes))
                case ("poke", at, value):
                    array[at] = value
                    pipe.send(None)
                case "pid":
                    pipe.send((os.getpid(), shared.pages().kind))
                case "close":
                    for exporter in exporters.values():
                        exporter.close()
                    shared.close()
                    pipe.send(None)
                    return


if __name__ == "__main__":
    main()

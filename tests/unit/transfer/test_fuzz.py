"""Whatever a peer sends as bytes, JSON or metadata: only errors of the package come of it. No sockets; see fuzz_live.

PDSTACK_FUZZ=100 makes it a hundred times as long, with other cases each time.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import fuzz
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy_stage import NumpyStage
from path_pair import identity

from pdstack.transfer import ProtocolError, ReadFailed, Role, Ticket, TicketError, TransferError
from pdstack.transfer.backends import open_exporter, open_importer
from pdstack.transfer.gpu.ipc import Export
from pdstack.transfer.layout import PoolView
from pdstack.transfer.metadata import MAX_DEPTH, read_json
from pdstack.transfer.paths import (
    CmaExporter,
    CmaPeer,
    Region,
    SharedExporter,
    SharedPeer,
    SharedPool,
    StreamExporter,
    StreamPeer,
    read_offers,
)
from pdstack.transfer.paths.offers import Offers
from pdstack.transfer.paths.staged import StagedExporter
from pdstack.transfer.paths.staged_peer import StagedPeer
from pdstack.transfer.plan import blocks
from pdstack.transfer.qualify.facts import Facts
from pdstack.transfer.qualify.measure import Measured
from pdstack.transfer.ticket import VERSION, verify
from pdstack.transfer.wire import Greeting, Seal, parse

NBYTES = 1 << 20
WIRE = {each.name: {"int": 1, "float": 1.0, "str": "x"}.get(str(each.type), [1, 2]) for each in fields(Ticket)}
WIRE["version"] = VERSION
HELLO = Greeting.new("decode-0", "i", Role.DECODE, "a").message("hello")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    """How many cases there were is shown with -s."""
    fuzz.CASES.clear()
    yield
    print(f"\ncases: {sum(fuzz.CASES.values())} {dict(fuzz.CASES)}")


@fuzz.long
@given(fuzz.documents(HELLO) | st.integers(1, 3000).map(lambda deep: b'{"type":' * deep + b"1" + b"}" * deep))
def test_any_frame_is_a_message_or_a_protocol_error(body: bytes) -> None:
    fuzz.count("frames")
    try:
        message = parse(body)
    except ProtocolError as error:
        assert len(str(error)) < 1000
        return
    with contextlib.suppress(ProtocolError):
        greeting = Greeting.parse(message)
        assert greeting.name.isprintable()
    repr(message)  # nothing may be so deep that an error about it could not be made


def test_depth_is_counted_where_texts_have_brackets() -> None:
    with pytest.raises(ValueError, match="deeper"):
        read_json(b'["]",' * (MAX_DEPTH + 1) + b"1" + b"]" * (MAX_DEPTH + 1))
    assert read_json(b'["' + b"[" * 5000 + b'"]') == ["[" * 5000]
    assert read_json(b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH)


@fuzz.long
@given(st.binary(max_size=300))
def test_any_sealed_frame_is_refused(frame: bytes) -> None:
    fuzz.count("seals")
    with pytest.raises(TransferError):
        Seal(b"s" * 32, b"r" * 32).check(frame)


@fuzz.long
@given(fuzz.changed(WIRE) | fuzz.values)
def test_any_ticket_is_read_or_refused(wire: Any) -> None:
    fuzz.count("tickets")
    try:
        ticket = Ticket.from_wire(wire)
    except TicketError as error:
        assert error.code in ("malformed", "version")
        assert len(str(error)) < 1000
        return
    assert json.loads(json.dumps(ticket.to_wire())) == ticket.to_wire()
    with pytest.raises(TicketError):
        verify(ticket, identity().key, audience="x")


@fuzz.long
@given(fuzz.values | st.dictionaries(st.sampled_from(["shared", "cma", "stream"]), fuzz.values | st.binary().map(b64)))
def test_any_offers_are_read_or_refused(value: Any) -> None:
    fuzz.count("offers")
    try:
        assert all(isinstance(blob, bytes) and len(blob) <= 4096 for blob in read_offers(value, "p").values())
    except ProtocolError as error:
        assert len(str(error)) < 1000


@fuzz.long
@given(
    fuzz.documents(
        {
            "version": 1,
            "handle": "0" * 128,
            "offset": 0,
            "nbytes": 1,
            "place": {"boot": "", "pid_namespace": "", "pid": 1, "gpu": "", "mig": False},
        }
    )
)
def test_any_cuda_handle_is_read_or_refused(body: bytes) -> None:
    fuzz.count("cuda handles")
    with contextlib.suppress(TransferError):
        Export.from_json(body.decode(errors="replace"))


# --- metadata of the paths and backends


class Bench:
    """An exporter of each kind in this process, and how decode connects to it."""

    def __init__(self) -> None:
        self.shared = SharedPool(NBYTES)
        self.shared.array[:] = 7
        source = Region.of(self.shared.array)
        self.target = np.zeros(NBYTES, np.uint8)
        region, prefill = Region.of(self.target), identity(Role.PREFILL)
        view = PoolView(region.address, 4096, NBYTES // 4096)
        staging = np.zeros(NBYTES, np.uint8)
        stage = NumpyStage(self.shared.array.reshape(-1, 4096), staging, NBYTES // 2)
        here = NumpyStage(np.zeros((64, 4096), np.uint8), np.zeros(NBYTES, np.uint8), NBYTES // 2)
        host = "127.0.0.1"
        carriers = Offers({"cma": CmaExporter(Region.of(staging))})
        self.importers = {name: open_importer(name, "fuzz", view) for name in ("ucx", "nixl")}
        self.exporters: dict[str, Any] = {
            "shared": SharedExporter(self.shared),
            "cma": CmaExporter(source),
            "stream": StreamExporter(source, prefill, host),
            "staged": StagedExporter(stage, carriers, prefill, host, advertise=host, patience_s=1),
            **{name: open_exporter(name, "fuzz", view) for name in self.importers},
        }
        self.connect: dict[str, Callable[[bytes], Any]] = {
            "shared": lambda metadata: SharedPeer(metadata, region, 1),
            "cma": lambda metadata: CmaPeer(metadata, region, 1),
            "stream": lambda metadata: StreamPeer(metadata, region, identity(), 1, 1.0),
            "staged": lambda metadata: StagedPeer(
                metadata, here, identity(), {"cma": lambda blob: CmaPeer(blob, here.region, 1)}, 1.0
            ),
            **{name: importer.connect for name, importer in self.importers.items()},
        }

    def close(self) -> None:
        for each in (*self.exporters.values(), *self.importers.values()):
            each.close()
        self.shared.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return True


# What could be meant for a host, a socket or a process, and must not reach the network: no name is looked up.
NASTY = (
    st.sampled_from(["", "\0", "\0a\0b", "a\0b", "x" * 300, "\ud800", "/", "/dev/null", "127.0.0.1\n", "." * 70])
    | st.sampled_from(["a..b", "-1", "[::1", "\u00e9" * 70, "127.0.0.1:80", "0x7f.1", "255.255.255.255"])
    | st.sampled_from([-1, 0, 65536, 1 << 31, 1 << 63, 1 << 64, 1 << 200, float("inf"), float("nan"), 0.5])
    | st.sampled_from([True, None, [], {}, [[]], {"a": "b"}])
)


@pytest.mark.parametrize("path", ["shared", "cma", "stream", "staged", "ucx", "nixl"])
def test_any_metadata_connects_or_fails_as_it_should(bench: Bench, path: str) -> None:
    genuine = json.loads(bench.exporters[path].metadata())
    texts = NASTY | st.text(max_size=3).map(lambda text: f"\0{text}")
    if path in ("ucx", "nixl"):
        # What is base64 they take apart in native code, and UCX ends the process over it: see docs/kv-paths.md.
        texts = NASTY.filter(lambda value: not isinstance(value, str) or not is_base64(value))
    swaps = st.dictionaries(st.sampled_from(sorted(genuine)), texts, min_size=1, max_size=2)
    garbage = st.binary(max_size=60) | st.integers(1, 2000).map(lambda deep: b"[" * deep)

    @fuzz.settings(20)
    @given(swaps.map(lambda swap: json.dumps({**genuine, **swap}).encode()) | garbage)
    def run(metadata: bytes) -> None:
        fuzz.count(f"metadata {path}")
        try:
            peer = bench.connect[path](metadata)
        except TransferError as error:
            assert len(str(error)) < 2000
            return
        # Believable still, as with another size or address: then what is read is checked as ever.
        if path in ("shared", "cma", "stream"):
            with contextlib.suppress(ReadFailed, ValueError):
                peer.read(blocks(4096, [0, 9], [1, 2]), checksum=True)
        peer.close()

    run()
    peer = bench.connect[path](bench.exporters[path].metadata())
    peer.close()


# --- answers of the ends that qualify a pair


SIZE = {"block_bytes": 1, "nbytes": 1, "extents": 1, "gbps": [1, 1, 1], "ratios": {"m": [1, 1, 1]}, "limits": {}}
MEASURED = {"path": "cma", "transport": "", "detail": "", "wrong": 0, "error": None, "sizes": [SIZE]}


@fuzz.long
@given(fuzz.changed(MEASURED) | fuzz.changed(SIZE).map(lambda size: {**MEASURED, "sizes": [size]}))
def test_any_measurement_is_read_or_refused(answer: Any) -> None:
    fuzz.count("measurements")
    with contextlib.suppress(ValueError):
        Measured.parse(answer)
    with contextlib.suppress(ValueError):
        Facts.parse(answer)

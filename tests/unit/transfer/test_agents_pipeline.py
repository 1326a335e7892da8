"""Blocks that move while the prompt is computed, prefixes that do not move, lost links, wrong bytes, and records."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_agents import KEY, LAYOUT, Copying, Pair, agent, backend, in_pair, pair_of, refused, run, until

from pdstack.transfer import ChecksumMismatch, KVLayout, PeerUnreachable, Refused, Role, TransferError

__all__ = ["backend"]  # the fixture


def started(pair: Pair, blocks: Sequence[int] = (1, 2, 3), request: str = "r") -> asyncio.Task[Any]:
    """A fetch of a prompt that is still being computed, into the blocks 5, 6, ..."""
    ticket = pair.prefill.export(request, blocks, len(blocks), None, lambda r, why: pair.released.append((r, str(why))))
    return asyncio.create_task(pair.decode.fetch(ticket, [5 + place for place in range(len(blocks))]))


def arrived(pair: Pair, block: int) -> bool:
    pool: Any = pair.decode._store.pool
    return bool(pool[block].all())


class Wire:
    """Between the agents: can be cut, and refuse or freeze what connects."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.frozen = False
        self._writers: list[asyncio.StreamWriter] = []

    async def open(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            self._writers += [writer, back]
            await asyncio.gather(self._carry(reader, back), self._carry(there, writer))
        except (OSError, asyncio.CancelledError):
            pass

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            while self.frozen:
                await asyncio.sleep(0.01)
            writer.write(data)
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self.cut()
        self._server.close()


def over_wire(
    **options: Any,
) -> Callable[[Callable[[Pair, Wire], Coroutine[Any, Any, None]]], Callable[[Copying], None]]:
    def wrap(case: Callable[[Pair, Wire], Coroutine[Any, Any, None]]) -> Callable[[Copying], None]:
        def test(backend: Copying) -> None:
            async def body() -> None:
                async with pair_of(backend, **options) as pair:
                    prefill: Any = pair.prefill
                    wire = Wire(prefill.port)
                    prefill.port = await wire.open()
                    try:
                        await case(pair, wire)
                    finally:
                        await wire.close()

            run(body())

        return test

    return wrap


def counting(backend: Copying) -> list[int]:
    """Prefill's blocks, in the order in which they are read from now on."""
    read: list[int] = []
    backend.on_read = lambda runs: read.extend(run.remote + at for run in runs for at in range(run.blocks))
    return read


@in_pair()
async def test_blocks_move_while_the_prompt_is_computed(pair: Pair) -> None:
    fetch = started(pair)
    await until(lambda: pair.prefill.stats()["exports"]["granted"])
    assert not arrived(pair, 5)
    pair.prefill.advance("r", 1)
    await until(lambda: arrived(pair, 5))
    assert not arrived(pair, 6)
    pair.prefill.advance("r", 1)  # nothing new
    pair.prefill.advance("r", 2)
    await until(lambda: arrived(pair, 6))
    assert not fetch.done()
    pair.prefill.complete("r", 42)
    report = await fetch
    assert (report.first_token, report.blocks, report.bytes) == (42, 3, 3 * LAYOUT.block_bytes)
    await until(lambda: pair.released == [("r", "read")])
    # What comes late is about nothing.
    pair.prefill.advance("r", 3)
    pair.prefill.complete("r", 1)
    pair.prefill.fail("r", "late")


@in_pair()
async def test_a_prompt_that_cannot_be_computed_ends_its_fetch(pair: Pair) -> None:
    fetch = started(pair)
    await until(lambda: pair.prefill.stats()["exports"]["granted"])
    pair.prefill.advance("r", 2)
    await until(lambda: arrived(pair, 6))
    pair.prefill.fail("r", "out of memory")
    with pytest.raises(TransferError, match="out of memory") as error:
        await fetch
    assert (error.value.code, error.value.verified_blocks) == ("prefill_failed", 2)
    assert pair.released == [("r", "uncomputed")]
    # Also where nobody had asked yet.
    ticket = pair.prefill.export("s", [1], 1, None, lambda r, why: pair.released.append((r, str(why))))
    pair.prefill.fail("s", "again")
    await refused(pair, ticket, "prefill_failed", Refused)


@in_pair(stall_timeout_s=0.2)
async def test_a_prompt_that_does_not_go_on_is_given_up(pair: Pair) -> None:
    fetch = started(pair)
    await until(lambda: pair.prefill.stats()["exports"]["granted"])
    pair.prefill.advance("r", 1)
    with pytest.raises(TransferError, match="1 of 3 blocks ready") as error:
        await fetch
    assert error.value.code == "prefill_stalled"
    await until(lambda: pair.released == [("r", "failed")])


@in_pair()
async def test_a_fetch_that_waits_can_be_cancelled(pair: Pair) -> None:
    fetch = started(pair)
    await until(lambda: pair.prefill.stats()["exports"]["granted"])
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    await until(lambda: pair.released == [("r", "failed")])


@in_pair(window_bytes=2 * LAYOUT.block_bytes)
async def test_no_more_is_announced_than_the_window_allows(pair: Pair) -> None:
    pair.backend.gate.clear()
    tickets = [pair.export(name, range(8)) for name in ("a", "b")]
    fetches = [
        asyncio.create_task(pair.decode.fetch(ticket, range(8 * number, 8 * number + 8)))
        for number, ticket in enumerate(tickets)
    ]
    await until(lambda: pair.prefill.stats()["exports"]["granted"] == 2)
    await asyncio.sleep(0.1)  # for announcements that must not come
    book: Any = pair.prefill._book  # type: ignore[attr-defined]
    assert sum(export.announced for export in book._held.values()) == 2
    pair.backend.gate.set()
    assert [(await fetch).blocks for fetch in fetches] == [8, 8]


@in_pair()
async def test_blocks_that_decode_holds_are_compared_and_not_moved(pair: Pair) -> None:
    pool: Any = pair.decode._store.pool
    pool[5] = 1.0  # as prefill's
    read = counting(pair.backend)
    report = await pair.decode.fetch(pair.export("r", [1, 2]), [5, 6], held=1)
    assert (report.bytes, report.blocks, report.held_blocks) == (LAYOUT.block_bytes, 1, 1)
    assert read == [2]
    pool[7] = 3.0
    with pytest.raises(ChecksumMismatch) as error:
        await pair.decode.fetch(pair.export("s", [1, 2]), [7, 8], held=1)
    assert (error.value.code, error.value.verified_blocks) == ("prefix", 0)
    assert (pool[7] == 3.0).all(), "others use a block that is held: it is never written"
    await pair.decode.fetch(pair.export("all", [1]), [5], held=1)
    assert read == [2]


@over_wire(heartbeat_s=1.0)
async def test_a_lost_connection_is_made_anew_and_only_missing_blocks_move(pair: Pair, wire: Wire) -> None:
    read = counting(pair.backend)
    fetch = started(pair)
    await until(lambda: pair.prefill.stats()["exports"]["granted"])
    pair.prefill.advance("r", 2)
    await until(lambda: arrived(pair, 6))
    wire.cut()
    await until(lambda: any(entry["event"] == "resumed" for entry in pair.decode.audit.recent()))
    pair.prefill.complete("r", 9)
    report = await fetch
    assert (report.resumes, report.first_token, read) == (1, 9, [1, 2, 3])
    await until(lambda: pair.released == [("r", "read")])
    assert "suspended" in [entry["event"] for entry in pair.prefill.audit.recent()]


@over_wire(heartbeat_s=1.0)
async def test_a_read_that_is_cut_off_goes_on_where_it_was(pair: Pair, wire: Wire) -> None:
    pair.backend.gate.clear()
    fetch = started(pair)
    pair.prefill.complete("r", 9)
    await until(lambda: any(link.reads for link in pair.decode._links.values()))  # type: ignore[attr-defined]
    wire.cut()
    await until(lambda: any(entry["event"] == "resumed" for entry in pair.decode.audit.recent()))
    pair.backend.gate.set()
    assert (await fetch).resumes == 1
    assert all(arrived(pair, block) for block in (5, 6, 7))


@over_wire(heartbeat_s=0.05, resume_s=0.4)
async def test_a_partition_frees_both_ends(pair: Pair, wire: Wire) -> None:
    fetch = started(pair)
    await until(lambda: pair.prefill.stats()["exports"]["granted"])
    pair.prefill.advance("r", 1)
    await until(lambda: arrived(pair, 5))
    wire.frozen = True
    with pytest.raises(PeerUnreachable, match="silent") as error:
        await fetch
    assert error.value.verified_blocks == 1
    await error.value.settled()
    await until(lambda: pair.released == [("r", "peer_lost")])
    wire.frozen = False
    await pair.decode.fetch(pair.export("next"), [0, 1])


def test_the_ticket_of_one_reader_is_of_no_use_to_another(backend: Copying) -> None:
    async def body() -> None:
        async with pair_of(backend, heartbeat_s=1.0) as pair:
            thief = await agent(Role.DECODE, name="decode-1")
            prefill: Any = pair.prefill
            wire = Wire(prefill.port)
            prefill.port = await wire.open()
            fetch = started(pair)
            await until(lambda: pair.prefill.stats()["exports"]["granted"])
            ticket = next(iter(prefill._book._held.values())).ticket
            with pytest.raises(Refused, match="used before"):
                await thief.fetch(ticket, [0, 1, 2])
            wire.cut()
            with pytest.raises(Refused, match="used before"):
                await thief.fetch(ticket, [0, 1, 2])
            pair.prefill.complete("r", 1)
            assert (await fetch).first_token == 1
            await thief.close()
            await wire.close()

    run(body())


@in_pair(path="auto", order={"prefill-0": ["backend", "cma"]})
async def test_wrong_bytes_are_read_again_over_another_path(pair: Pair) -> None:
    pair.backend.flip = True
    report = await pair.decode.fetch(pair.export("r", [1, 2]), [5, 6])
    assert report.bytes == 4 * LAYOUT.block_bytes
    assert arrived(pair, 5)
    mismatch = next(entry for entry in pair.decode.audit.recent() if entry["event"] == "mismatch")
    assert (mismatch["path"], mismatch["again"], mismatch["blocks"]) == ("backend", "cma", [1, 2])
    assert pair.decode.metrics.retries.labels("prefill-0")._value.get() == 1


@in_pair()
async def test_bytes_that_stay_wrong_fail_the_fetch(pair: Pair) -> None:
    pair.backend.flip = True
    await refused(pair, pair.export(), "checksum", ChecksumMismatch)
    await until(lambda: pair.released == [("r", "failed")])


@in_pair(path="auto", order={"prefill-0": ["backend", "cma"]})
async def test_a_path_that_fails_is_left_and_that_is_said(pair: Pair) -> None:
    pair.backend.fail = True
    report = await pair.decode.fetch(pair.export("r", [1, 2]), [5, 6])
    assert (report.backend, report.transport) == ("path", "cma")
    change = next(entry for entry in pair.decode.audit.recent() if entry["event"] == "path_changed")
    assert (change["before"], change["after"]) == ("backend", "cma")
    assert "as asked" in change["reason"]
    assert "backend" not in pair.decode.stats()["peers"][0]["paths"]


def test_blocks_that_had_another_owner_are_refused(backend: Copying) -> None:
    async def body() -> None:
        numbers = dict.fromkeys(range(16), 3)
        prefill = await agent(Role.PREFILL, generations=lambda blocks: [numbers[block] for block in blocks])
        decode = await agent(Role.DECODE)
        pair = Pair(backend, prefill, decode)
        ticket = pair.export()
        assert ticket.generations == (3, 3)
        numbers[2] = 4
        await refused(pair, ticket, "generation", Refused)
        assert pair.released == [("r", "stale")]
        await refused(pair, ticket, "generation", Refused)
        # While it is read: the bytes were right, but the record says it.
        other = pair.export("s")
        backend.gate.clear()
        fetch = asyncio.create_task(decode.fetch(other, [0, 1]))
        await until(lambda: prefill.stats()["exports"]["granted"])
        numbers[1] = 9
        backend.gate.set()
        await fetch
        await until(lambda: pair.released[1:] == [("s", "stale")])
        await decode.close()
        await prefill.close()

    run(body())


def records(file: Path, event: str) -> list[dict[str, Any]]:
    return [entry for entry in map(json.loads, file.read_text().splitlines()) if entry["event"] == event]


def test_every_transfer_and_refusal_is_on_record(backend: Copying, tmp_path: Path) -> None:
    files = {role: tmp_path / f"{role}.jsonl" for role in Role}

    async def body() -> None:
        prefill = await agent(Role.PREFILL, audit_file=str(files[Role.PREFILL]))
        decode = await agent(Role.DECODE, audit_file=str(files[Role.DECODE]))
        pair = Pair(backend, prefill, decode)
        ticket = pair.export()
        await decode.fetch(ticket, [5, 6])
        await refused(pair, ticket, "replayed", Refused)
        await until(lambda: pair.released)
        await decode.close()
        await prefill.close()

    run(body())
    first, second = records(files[Role.DECODE], "transfer")
    (export,) = records(files[Role.PREFILL], "export")
    (refusal,) = records(files[Role.PREFILL], "refused")
    assert (first["verdict"], second["verdict"], export["verdict"]) == ("ok", "replayed", "ok")
    assert (first["agent"], first["peer"], first["request"]) == ("decode-0", "prefill-0", "r")
    assert (first["blocks"], first["local"], first["bytes"]) == ([1, 2], [5, 6], 2 * LAYOUT.block_bytes)
    assert first["hash"] == export["hash"] != second["hash"]
    assert first["peer_incarnation"] == export["incarnation"]
    assert export["peer_incarnation"] == first["incarnation"]
    assert (refusal["peer"], refusal["verdict"]) == ("decode-0", "replayed")
    assert KEY  # and neither file holds it
    assert not any("k" * 8 in file.read_text() for file in files.values())


COARSE = replace(LAYOUT, block_size=8, num_blocks=12)


def numbered(pool: Any) -> None:
    pool[...] = np.arange(pool.size, dtype=np.float32).reshape(pool.shape) + 1


def tokens_of(pool: Any, blocks: Sequence[int], tokens: int) -> Any:
    """(layers, 2, tokens, heads, dim), wherever they lie."""
    return np.concatenate([pool[block] for block in blocks], axis=2)[:, :, :tokens]


@pytest.mark.parametrize("path", ["backend", "cma", "stream"])
@pytest.mark.parametrize(("theirs", "ours"), [(LAYOUT, COARSE), (COARSE, LAYOUT)])
def test_blocks_of_another_length_are_verified_whole_and_then_sliced(
    backend: Copying, theirs: KVLayout, ours: KVLayout, path: str
) -> None:
    async def body() -> None:
        prefill = await agent(Role.PREFILL, layout=theirs, path=path)
        decode = await agent(Role.DECODE, layout=ours, path=path)
        pair = Pair(backend, prefill, decode)
        source, target = pool_of(prefill), pool_of(decode)
        numbered(source)
        tokens = 29
        blocks = [9, 3, 4, 11, 5, 6, 7, 8][: -(-tokens // theirs.block_size)]
        local = [2, 7, 4, 1, 10, 9, 0, 3][: -(-tokens // ours.block_size)]
        ticket = prefill.export("r", blocks, tokens, None, lambda r, why: pair.released.append((r, str(why))))
        fetch = asyncio.create_task(decode.fetch(ticket, local))
        for ready in range(1, len(blocks)):
            prefill.advance("r", ready)
            await asyncio.sleep(0.005)
        prefill.complete("r", 3)
        report = await fetch
        assert report.bytes == len(blocks) * theirs.block_bytes
        assert np.array_equal(tokens_of(source, blocks, tokens), tokens_of(target, local, tokens))
        untouched = [block for block in range(ours.num_blocks) if block not in local]
        assert not target[untouched].any()
        # What decode holds is compared, and written by nobody.
        again = prefill.export("s", blocks, tokens, 3, lambda _r, _why: None)
        assert (await decode.fetch(again, local, held=1)).first_token == 3
        target[local[0]].reshape(-1)[3] += 1
        before = target.copy()
        again = prefill.export("t", blocks, tokens, 3, lambda _r, _why: None)
        with pytest.raises(ChecksumMismatch) as error:
            await decode.fetch(again, local, held=1)
        assert error.value.code == "prefix"
        assert np.array_equal(target[local[0]], before[local[0]])
        # Bytes that are wrong never reach the pool.
        target[...] = 0
        again = prefill.export("u", blocks, tokens, 3, lambda _r, _why: None)
        source[blocks[0]].reshape(-1)[5] += 1
        with pytest.raises(ChecksumMismatch):
            await decode.fetch(again, local)
        size = min(theirs.block_size, ours.block_size)
        assert not tokens_of(target, local, size).any()
        await decode.close()
        await prefill.close()

    run(body())


def pool_of(one: Any) -> Any:
    return one._store.pool

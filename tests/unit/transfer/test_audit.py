"""The audit log: one line a record, rotated, and never a reason for a transfer to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdstack.transfer.audit import AuditLog, digest


def test_one_json_object_a_line_with_who_wrote_it(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    log = AuditLog(str(file), 1 << 20, 2, agent="decode-0", role="decode")
    log.record("transfer", request="r%s\n", blocks=[1, 2], verdict="ok")
    log.record("refused", verdict="forged")
    log.close()
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["event"], first["agent"], first["request"], first["blocks"]) == (
        "transfer", "decode-0", "r%s\n", [1, 2],
    )  # fmt: skip
    assert second["time"] >= first["time"] > 1.7e9
    assert [entry["event"] for entry in log.recent()] == ["transfer", "refused"]


def test_it_rotates_and_keeps_so_many(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    log = AuditLog(str(file), 2000, 2, agent="a")
    for number in range(200):
        log.record("transfer", number=number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [found.name for found in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(found.stat().st_size <= 2000 for found in files)
    lines = [json.loads(line)["number"] for found in reversed(files) for line in found.read_text().splitlines()]
    assert lines == list(range(lines[0], 200))


def test_a_file_that_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        AuditLog(str(tmp_path / "missing" / "audit.jsonl"), 1, 1)


def test_a_record_that_cannot_be_written_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog("/dev/full", 0, 0, agent="a")
    log.record("transfer")
    log.record("transfer")
    assert log.lost == 2
    assert caplog.text.count("cannot be written") == 1
    assert len(log.recent()) == 2


def test_without_a_file_records_are_only_in_memory() -> None:
    log = AuditLog("", 1, 1)
    for number in range(1000):
        log.record("transfer", number=number)
    assert [entry["number"] for entry in log.recent()] == list(range(744, 1000))
    log.close()


def test_the_digest_is_of_all_hashes_in_order() -> None:
    assert digest([1, 2]) != digest([2, 1])
    assert digest([1, 2]) == digest([1, 2])
    assert len(digest([])) == 16

"""Settings, the cluster key, and the yardstick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdstack.transfer import AuthenticationFailed, ClusterKey, TransferConfig
from pdstack.transfer.limit import main, measure


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.key"
    file.write_text("0123456789abcdef" * 4 + "\n")
    file.chmod(0o440)
    return file


def test_reads_the_transfer_part_of_worker_json(key_file: Path) -> None:
    config = TransferConfig.from_mapping(
        {
            "backend": "nixl",
            "path": "auto",
            "cluster_key_file": str(key_file),
            "listen": {"host": "0.0.0.0", "port": 9201},
            "advertise": "10.0.0.1",
            "ticket_ttl_s": 60.0,
            "read_timeout_s": 20.0,
            "heartbeat_s": 2.0,
        }
    )
    assert (config.backend, config.path) == ("nixl", "auto")
    assert (config.listen_port, config.advertise) == (9201, "10.0.0.1")


def test_without_a_word_the_backend_moves_kv(key_file: Path) -> None:
    assert TransferConfig.from_mapping({"cluster_key_file": str(key_file)}).path == "backend"


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "mpi"},
        {"path": "rdma"},
        {"path": None},
        {"colour": 1},
        {"listen": {"prot": 1}},
        {"listen": 9200},
        {"ticket_ttl_s": 0},
        {"heartbeat_s": -1},
        {"order": {"prefill-0": ["rdma"]}},
        {"resume_s": 0},
        {"stall_timeout_s": 0},
        {"audit_files": -1},
        {"stream_port": True},
    ],
)
def test_wrong_settings_are_refused(key_file: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)) + "|backend"):
        TransferConfig.from_mapping({"cluster_key_file": str(key_file), **change})


def test_a_missing_key_file_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="cluster_key_file"):
        TransferConfig.from_mapping({})


def test_the_key_must_be_secret_long_and_there(key_file: Path, tmp_path: Path) -> None:
    assert repr(ClusterKey.from_file(key_file)) == "ClusterKey(secret)"
    key_file.chmod(0o444)
    with pytest.raises(AuthenticationFailed, match="every user"):
        ClusterKey.from_file(key_file)
    with pytest.raises(AuthenticationFailed, match="openssl rand"):
        ClusterKey(b"short")
    with pytest.raises(AuthenticationFailed, match="cannot be read"):
        ClusterKey.from_file(tmp_path / "none")


def test_space_around_the_key_does_not_matter() -> None:
    assert ClusterKey(b"k" * 32).derive("p") == ClusterKey(b" " + b"k" * 32 + b"\n").derive("p")
    assert ClusterKey(b"k" * 32).derive("p") != ClusterKey(b"k" * 32).derive("q")


def test_memcpy_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bytes", "1000000", "--rounds", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == 1_000_000
    assert printed["memcpy_gbps"] > 0.05
    with pytest.raises(ValueError, match="at least 1"):
        measure(0)

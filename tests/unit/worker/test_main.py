from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pdstack.worker.__main__ import EXIT_CONFIG, EXIT_FAILED, main

CONFIG: dict[str, Any] = {
    "name": "aggregated-0",
    "role": "aggregated",
    "namespace": "local",
    "model_name": "tiny",
    "model_path": "/no/such/model",
    "etcd_endpoints": ["http://127.0.0.1:9"],
    "nats_server": "nats://127.0.0.1:9",
    "status": {"host": "127.0.0.1", "port": 0},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ETCD_ENDPOINTS", "NATS_SERVER", "RUST_BACKTRACE", "DYN_SDK_DISABLE_ANSI_LOGGING", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_a_bad_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "worker.json"
    file.write_text(json.dumps({**CONFIG, "rolle": "prefill"}))
    assert main(["--config", str(file)]) == EXIT_CONFIG
    assert "rolle: unknown key" in capsys.readouterr().err


def test_a_missing_model_is_one_line_and_an_exit_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "worker.json"
    file.write_text(json.dumps(CONFIG))
    assert main(["--config", str(file)]) == EXIT_FAILED
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "worker aggregated-0 cannot run" in record.getMessage()
    assert "/no/such/model" in record.getMessage()
    assert record.exc_info is None

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdstack.worker.config import ConfigError, load

GOOD: dict[str, Any] = {
    "name": "prefill-0",
    "role": "prefill",
    "namespace": "local",
    "model_name": "tiny",
    "model_path": "/models/tiny",
    "etcd_endpoints": ["http://10.0.0.1:2379"],
    "nats_server": "nats://10.0.0.1:4222",
    "status": {"host": "0.0.0.0", "port": 9100},
    "engine": {"kv_blocks": 64, "queue_timeout_s": 5},
    "transfer": {
        "backend": "ucx",
        "cluster_key_file": "/etc/pdstack/cluster.key",
        "listen": {"host": "0.0.0.0", "port": 9200},
        "advertise": "10.0.0.1",
    },
}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "worker.json"
    file.write_text(json.dumps({**GOOD, **changes}))
    return file


def test_values_and_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path))
    assert config.engine.kv_blocks == 64
    assert config.engine.queue_timeout_s == 5.0
    assert isinstance(config.engine.queue_timeout_s, float)
    assert config.engine.block_size == 16
    assert config.transfer is not None
    assert config.transfer.listen.port == 9200
    assert config.audience == "local/tiny"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "colour: unknown key"),
        ({"engine": {"kv_block": 3}}, "engine.kv_block: unknown key"),
        ({"engine": {"kv_blocks": "3"}}, "engine.kv_blocks: found '3', wanted int"),
        ({"engine": {"kv_blocks": True}}, "engine.kv_blocks: found True, wanted int"),
        ({"engine": {"prefix_cache": 1}}, "engine.prefix_cache: found 1, wanted bool"),
        ({"status": {"host": "0.0.0.0"}}, "status.port: is missing"),
        ({"status": 9100}, "status: found 9100, wanted an object"),
        ({"etcd_endpoints": []}, "etcd_endpoints: found an empty list"),
        ({"etcd_endpoints": ["10.0.0.1:2379"]}, "etcd_endpoints: found '10.0.0.1:2379'"),
        ({"etcd_endpoints": [1]}, r"etcd_endpoints\[0\]: found 1, wanted str"),
        ({"nats_server": "tls://10.0.0.1:4222"}, "nats_server"),
        ({"role": "both"}, "role: found 'both'"),
        ({"transfer": None}, "transfer: role prefill needs this section"),
        ({"role": "aggregated"}, "transfer: role aggregated moves no KV cache"),
        ({"transfer": {**GOOD["transfer"], "backend": "tcp"}}, "transfer.backend: found 'tcp'"),
        ({"transfer": {**GOOD["transfer"], "path": "tcp"}}, "transfer.path: found 'tcp'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, **changes))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load(tmp_path / "bad.json")

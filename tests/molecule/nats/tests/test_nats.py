from __future__ import annotations

from collections.abc import Callable

from testinfra.host import Host

from pdstack.deploy import ask, prove

CONFIG = "/etc/pdstack/molecule/nats/nats.conf"
DATA = "/var/lib/pdstack/molecule/nats"


def test_it_is_confined_and_healthy(is_confined: Callable[[str], bool], check_health: Callable[[str], bool]) -> None:
    assert is_confined("nats")
    assert check_health("nats")


def test_jetstream_is_on_and_stores_where_it_should(at: Callable[..., str]) -> None:
    status = ask.get_json(at(8222, "/jsz"))
    assert status["config"]["store_dir"].startswith(DATA)
    assert status["config"]["max_storage"] == 1024 * 1024 * 1024


def test_a_message_can_be_stored_and_read_back(at: Callable[..., str]) -> None:
    assert "stored a message" in prove.prove_jetstream(at(4222, scheme="nats"))


def test_no_probe_leaves_a_stream(at: Callable[..., str]) -> None:
    assert ask.get_json(at(8222, "/jsz"))["streams"] == 0


def test_it_listens_on_its_address_alone(host: Host, address: str) -> None:
    assert host.socket(f"tcp://{address}:9222").is_listening
    assert host.socket(f"tcp://{address}:13222").is_listening
    assert not host.socket("tcp://0.0.0.0:9222").is_listening


def test_its_configuration_is_not_for_everybody(host: Host) -> None:
    assert (host.file(CONFIG).uid, host.file(CONFIG).mode) == (64000, 0o440)
    assert host.file(CONFIG).contains("max_payload: 8388608")

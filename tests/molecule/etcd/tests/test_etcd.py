from __future__ import annotations

from collections.abc import Callable

from testinfra.host import Host

from pdstack.deploy import ask, prove

DATA = "/var/lib/pdstack/molecule/etcd"


def test_it_is_confined_and_healthy(is_confined: Callable[[str], bool], check_health: Callable[[str], bool]) -> None:
    assert is_confined("etcd")
    assert check_health("etcd")


def test_it_says_that_it_is_healthy(at: Callable[..., str]) -> None:
    assert ask.get_json(at(2379, "/health"))["health"] == "true"


def test_a_write_can_be_read_back(at: Callable[..., str]) -> None:
    assert "1 of 1 members" in prove.prove_etcd([at(2379)])


def test_it_listens_on_its_address_alone(host: Host, address: str) -> None:
    assert host.socket(f"tcp://{address}:7379").is_listening
    assert host.socket(f"tcp://{address}:7380").is_listening
    assert not host.socket("tcp://0.0.0.0:7379").is_listening


def test_its_data_is_its_own_and_on_disk(host: Host) -> None:
    assert (host.file(DATA).uid, host.file(DATA).mode) == (64000, 0o700)
    assert host.file(f"{DATA}/member/wal").is_directory


def test_it_does_not_warn_for_long(host: Host) -> None:
    logs = host.run("docker logs --tail 200 pdstack-molecule-etcd")
    assert '"level":"fatal"' not in logs.stdout + logs.stderr

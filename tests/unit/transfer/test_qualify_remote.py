"""Ends behind ports: who gets one, what a lost one costs, and a whole measurement over them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdstack.transfer.channel import Identity, connect
from pdstack.transfer.errors import AuthenticationFailed, Refused, TransferError
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.qualify.__main__ import main
from pdstack.transfer.qualify.control import Keys, Wish, _Agent, _path
from pdstack.transfer.qualify.ends import EndFailed
from pdstack.transfer.qualify.listen import AUDIENCE
from pdstack.transfer.qualify.places import Place
from pdstack.transfer.qualify.remote import RemoteEnd
from pdstack.transfer.roles import Role

WISH = Wish(("shared", "cma", "stream"), (4096,), 1 << 20, 2, 20)
END = (sys.executable, "-m", "pdstack.transfer.qualify.end")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "cluster.key"
    file.write_text(secrets.token_hex(32))
    file.chmod(0o600)
    return file


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def listening(key_file: Path, address: str, *before: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*before, *END, "--listen", address, "--name", "end", "--key-file", str(key_file)])
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(10) in (0, -signal.SIGTERM)  # the latter before it listens


@pytest.fixture
def port(key_file: Path) -> Iterator[int]:
    (found,) = free_ports(1)
    with listening(key_file, f"127.0.0.1:{found}"):
        yield found


def reached(port: int, key_file: Path) -> RemoteEnd:
    return RemoteEnd("prefill-0", "127.0.0.1", port, ClusterKey.from_file(key_file), 15)


def test_a_stranger_gets_nothing(port: int, key_file: Path) -> None:
    reached(port, key_file).close()
    stranger = ClusterKey(secrets.token_hex(32).encode())
    with pytest.raises(EndFailed, match=r"none of ours.*does not know this cluster's key"):
        RemoteEnd("prefill-0", "127.0.0.1", port, stranger, 15)
    # Without a word of the protocol, and with words of the wrong one.
    for said in (b"", json.dumps({"do": "open", "role": "prefill"}).encode() + b"\n", b"\0\0\0\2{}"):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(10)
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""


def test_a_worker_s_own_channel_does_not_reach_it(port: int, key_file: Path) -> None:
    reached(port, key_file).close()
    key = ClusterKey.from_file(key_file)
    for audience, error in (("local/model", Refused), (AUDIENCE, AuthenticationFailed)):
        who = Identity("decode-0", "1", Role.DECODE, audience, key if error is Refused else ClusterKey(b"x" * 32))
        with pytest.raises(TransferError) as refused:
            asyncio.run(connect("127.0.0.1", port, who))
        assert isinstance(refused.value, error)


def test_it_answers_as_a_process_does_and_ends_with_the_connection(port: int, key_file: Path) -> None:
    end = reached(port, key_file)
    opened = end.ask({"do": "open", "role": "decode", "name": "d", "owner": 1, "nbytes": 1 << 20, "run": "r"}, 20)
    pid = opened["facts"]["pid"]
    assert Path(f"/proc/{pid}").exists() and end.alive
    with pytest.raises(EndFailed, match="prefill-0 could not nonsense"):
        end.ask({"do": "nonsense"}, 10)
    assert end.ask({"do": "ping"}, 10) == {}
    end.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "its process outlived the connection"
        time.sleep(0.02)


def test_a_new_conversation_ends_the_one_before(port: int, key_file: Path) -> None:
    old, new = reached(port, key_file), reached(port, key_file)
    with pytest.raises(EndFailed, match="prefill-0 was lost at 'ping'"):
        old.ask({"do": "ping"}, 10)
    assert not old.alive and new.ask({"do": "ping"}, 10) == {}


def agents(port: int, key_file: Path) -> tuple[_Agent, _Agent]:
    keys = Keys.new(ClusterKey.from_file(key_file))
    place = Place("prefill-0", (), "127.0.0.1", "here", port)
    local = Place("decode-0", END, "127.0.0.1", "here")
    return (
        _Agent(place, Role.PREFILL, 1, keys, WISH, os.environ),
        _Agent(local, Role.DECODE, 1, keys, WISH, os.environ),
    )


def test_one_that_dies_is_named_with_its_signal_and_made_again(port: int, key_file: Path) -> None:
    source, target = agents(port, key_file)
    try:
        source.ready()
        pid = source.facts().pid
        assert _path(source, target, "stream", WISH).usable
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EndFailed, match=r"prefill-0 did not answer 'ping' within 0\.3 s: ended it"):
            source.ready().ask({"do": "ping"}, 0.3)
        source.ready()
        os.kill(source.facts().pid, signal.SIGKILL)
        with pytest.raises(EndFailed, match="prefill-0 ended with signal 9 at 'ping'"):
            source.ready().ask({"do": "ping"}, 10)
        assert _path(source, target, "cma", WISH).usable
        assert source.facts().pid != pid
    finally:
        source.close()
        target.close()


def test_it_listens_where_it_is_told_and_nowhere_else(port: int, key_file: Path) -> None:
    stream, limit = free_ports(2)
    keys = Keys.new(ClusterKey.from_file(key_file))
    source = _Agent(
        Place("prefill-0", (), "127.0.0.1", "here", port, stream, limit), Role.PREFILL, 1, keys, WISH, os.environ
    )
    try:
        source.ready()
        assert source.opened["limit"][1] == limit
        assert json.loads(b64decode(source.opened["metadata"]["stream"]))["port"] == stream
    finally:
        source.close()


def test_one_that_is_not_there_is_named() -> None:
    (port,) = free_ports(1)
    with pytest.raises(EndFailed, match=rf"prefill-0 at 127\.0\.0\.1:{port} was not reached within 0\.3 s"):
        RemoteEnd("prefill-0", "127.0.0.1", port, ClusterKey(b"k" * 32), 0.3)


def test_without_the_key_the_command_says_which_option_is_missing(
    port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agents.json"
    entry = {"host": "127.0.0.1", "shares": "here"}
    here = {"prefill": [entry | {"name": "p", "ports": [port]}], "decode": [entry | {"name": "d", "ports": [port]}]}
    file.write_text(json.dumps(here))
    assert main(["--agents", str(file), "--sizes", "4K", "--bytes", "1M"]) == 1
    assert "name its file (--key-file)" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="only root can make network namespaces")
def test_two_ends_in_network_namespaces_of_their_own(key_file: Path, tmp_path: Path) -> None:
    """As on two hosts: all that goes between them goes over the ports that the topology names."""
    tag = secrets.token_hex(3)
    names = {role: f"kvp-{role[0]}{tag}" for role in ("prefill", "decode")}
    address = {"prefill": "10.213.7.1", "decode": "10.213.7.2"}

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    with contextlib.ExitStack() as stack:
        for name in names.values():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", "eth0", "netns", names["prefill"], "type", "veth", "peer", "eth0", "netns", names["decode"])
        for role, name in names.items():
            ip("-n", name, "address", "add", f"{address[role]}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            stack.enter_context(listening(key_file, f"{address[role]}:9500", "ip", "netns", "exec", name))
        agents = {
            role: [{"name": f"{role}-0", "host": address[role], "shares": role, "ports": ports}]
            for role, ports in (("prefill", [9500, 9501, 9502]), ("decode", [9500]))
        }
        file, out = tmp_path / "agents.json", tmp_path / "out.json"
        file.write_text(json.dumps(agents))
        # As in a deployment: the one who asks sits beside an end, and nobody else reaches them.
        command = ["ip", "netns", "exec", names["decode"], sys.executable, "-m", "pdstack", "kv-path"]
        command += ["--agents", str(file), "--key-file", str(key_file), "--bytes", "1M", "--sizes", "64K"]
        command += ["--rounds", "2", "--backend", "none", "--want", "stream", "cma", "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (pair,) = json.loads(out.read_text())["pairs"]
        paths = {one["path"]: one for one in pair["paths"]}
        assert paths["shared"]["error"] and paths["stream"]["error"] is None
        assert key_file.read_text() not in out.read_text()

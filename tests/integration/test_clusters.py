"""Clusters of three etcd members and three NATS servers, as deployed, and a client of Dynamo that loses its server."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import Coordination, Ports, Program, find_program, get, start, wait_for

from pdstack.deploy import coordination, prove, topology

# Dynamo 0.7's, fixed.
LEASE_S = 10
# Serves an endpoint and calls it once for every line on its standard input; prints what came back.
CLIENT = """
import asyncio, sys
from dynamo.runtime import DistributedRuntime

async def generate(request, context):
    yield request

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", False)
    component = runtime.namespace("clusters").component("echo")
    await component.create_service()
    endpoint = component.endpoint("generate")
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate))
    client = await endpoint.client()
    await client.wait_for_instances()
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        answer = [item.data() async for item in await client.random(line.strip())]
        print("answer", *answer, flush=True)

asyncio.run(main())
"""


class Servers:
    """NATS servers of one cluster, each run from the configuration that is deployed."""

    def __init__(self, folder: Path, ports: Ports) -> None:
        self.folder = folder
        deployment: Any = {"name": "t"}
        self.entries: list[topology.Nats] = []
        cluster = [ports.take() for _ in range(3)]
        for number in range(3):
            client, monitor = ports.take(), ports.take()
            self.entries.append(
                {
                    "host": f"n{number}", "address": "127.0.0.1", "server_name": f"t-n{number}", "client_port": client,
                    "cluster_port": cluster[number], "monitor_port": monitor, "url": f"nats://127.0.0.1:{client}",
                    "route_url": f"nats://127.0.0.1:{cluster[number]}", "container": "x",
                    "monitor_url": f"http://127.0.0.1:{monitor}",
                    "routes": [f"nats://127.0.0.1:{port}" for port in cluster if port != cluster[number]],
                }
            )  # fmt: skip
        self.programs: dict[int, Program] = {}
        for number, entry in enumerate(self.entries):
            store = str(folder / f"store{number}")
            text = coordination.nats_config(entry, deployment, store_dir=store, store_mib=64, payload_mib=1)
            (folder / f"nats{number}.conf").write_text(text)

    def start(self, number: int) -> None:
        server = find_program("nats-server")
        assert server
        command = [server, "--config", str(self.folder / f"nats{number}.conf")]
        self.programs[number] = start(f"nats{number}", command, self.folder)

    def clients(self, number: int) -> int:
        return int(get(f"{self.entries[number]['monitor_url']}/varz")[1]["connections"])

    def prove(self) -> str:
        urls = [entry["url"] for entry in self.entries] + [entry["monitor_url"] for entry in self.entries]
        return prove.until(lambda: prove.prove_jetstream(*urls), 30)


@pytest.fixture
def servers(tmp_path: Path, ports: Ports) -> Iterator[Servers]:
    made = Servers(tmp_path, ports)
    for number in range(3):
        made.start(number)
    yield made
    for program in made.programs.values():
        program.stop()


@pytest.fixture
def etcd(own_coordination: Coordination) -> Coordination:
    own_coordination.start()
    return own_coordination


def test_jetstream_keeps_a_message_on_every_server(servers: Servers) -> None:
    assert "on 3 servers, and it was read through each" in servers.prove()


def test_a_server_that_is_away_is_told(servers: Servers) -> None:
    servers.prove()
    servers.programs[2].kill()
    urls = [entry["url"] for entry in servers.entries]
    with pytest.raises(prove.Unproved):
        prove.prove_jetstream(*urls)
    servers.start(2)
    assert "3 servers" in servers.prove()


def test_a_client_goes_on_with_another_server_when_it_loses_its_own(servers: Servers, etcd: Coordination) -> None:
    servers.prove()
    environment = {"ETCD_ENDPOINTS": etcd.etcd_url, "NATS_SERVER": servers.entries[1]["url"]}
    with Client(environment, servers.folder) as client:
        assert client.ask("before") == "answer before"
        assert (servers.clients(0), servers.clients(2)) == (0, 0)
        servers.programs[1].kill()
        assert client.ask("after") == "answer after"
        assert servers.clients(0) + servers.clients(2) > 0


def test_streams_of_dynamo_outlive_the_server_that_made_them(servers: Servers) -> None:
    servers.prove()
    urls = [entry["url"] for entry in servers.entries]
    client = prove.NatsClient(urls[0])
    for name in ("namespace-my-own-component-prefill-kv-events", "namespace-other-component-prefill-kv-events"):
        made = {"name": name, "subjects": [f"{name}.*"], "storage": "file", "num_replicas": 1}
        client.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(made).encode())
    assert "1 streams of my_own" in prove.replicate("my_own", urls)
    assert "0 streams of my_own" in prove.replicate("my_own", urls)
    name = "namespace-my-own-component-prefill-kv-events"

    def information(through: str) -> dict[str, Any]:
        asking = prove.NatsClient(through)
        try:
            return asking.request(f"$JS.API.STREAM.INFO.{name}")
        finally:
            asking.close()

    def current() -> bool:
        copies = information(urls[0])["cluster"].get("replicas") or []
        return len(copies) == 2 and all(copy["current"] for copy in copies)

    wait_for("every server has a copy", current)
    leader = str(information(urls[0])["cluster"]["leader"])
    lost = next(number for number, entry in enumerate(servers.entries) if entry["server_name"] == leader)
    client.close()
    servers.programs[lost].kill()
    left = [url for number, url in enumerate(urls) if number != lost]

    def another_leads() -> bool:
        try:
            return information(left[0])["cluster"].get("leader") not in (None, "", leader)
        except prove.Unproved:
            return False

    wait_for("another server leads the stream", another_leads, 30)


def test_dynamo_takes_one_nats_server_only(servers: Servers, etcd: Coordination) -> None:
    # If this fails, a later Dynamo takes a list, and topology.nats_server should give it one.
    servers.prove()
    both = f"{servers.entries[0]['url']},{servers.entries[1]['url']}"
    with pytest.raises(BrokenPipeError), Client({"ETCD_ENDPOINTS": etcd.etcd_url, "NATS_SERVER": both}, servers.folder):
        pass


class Client:
    """A process that serves an endpoint of Dynamo and calls it."""

    def __init__(self, settings: dict[str, str], folder: Path) -> None:
        from tests.integration.processes import environment

        script = folder / "client.py"
        script.write_text(CLIENT)
        self._log = (folder / "client.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env=environment(**settings), text=True,
        )  # fmt: skip

    def __enter__(self) -> Client:
        try:
            self._read("ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _read(self, begins: str) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(begins):
                return line.strip()
        raise BrokenPipeError("the client ended")

    def ask(self, text: str) -> str:
        assert self._process.stdin
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        return self._read("answer")


class Members:
    """Three etcd members, each run with the command that is deployed."""

    def __init__(self, folder: Path, ports: Ports) -> None:
        self.folder = folder
        self.entries: list[topology.Etcd] = []
        for number in range(3):
            client, peer = ports.take(), ports.take()
            self.entries.append(
                {
                    "host": f"e{number}", "address": "127.0.0.1", "member": f"e{number}", "client_port": client,
                    "peer_port": peer, "client_url": f"http://127.0.0.1:{client}",
                    "peer_url": f"http://127.0.0.1:{peer}", "container": "x",
                }
            )  # fmt: skip
        self.urls = [entry["client_url"] for entry in self.entries]
        cluster = ",".join(f"{entry['member']}={entry['peer_url']}" for entry in self.entries)
        self._deployment: Any = {"name": "t", "etcd_initial_cluster": cluster}
        self.programs: dict[int, Program] = {}

    def start(self, number: int) -> None:
        entry, data = self.entries[number], str(self.folder / self.entries[number]["member"])
        spec = coordination.etcd(entry, self._deployment, image="i:1", version="3", data_dir=data, quota_mib=64)
        program = find_program("etcd")
        assert program
        self.programs[number] = start(entry["member"], [program, *spec["command"]], self.folder)

    def prove(self) -> str:
        return prove.until(lambda: prove.prove_etcd(self.urls), 30)

    def leader(self) -> int:
        for number, url in enumerate(self.urls):
            status = prove.etcd_call(url, "maintenance/status", {})
            if status["leader"] == status["header"]["member_id"]:
                return number
        raise AssertionError("nobody leads")


@pytest.fixture
def members(tmp_path: Path, ports: Ports) -> Iterator[Members]:
    made = Members(tmp_path, ports)
    for number in range(3):
        made.start(number)
    yield made
    for program in made.programs.values():
        program.stop()


def test_etcd_of_three_is_proved_through_each_member(members: Members) -> None:
    assert "through 3 of 3 members" in members.prove()
    members.programs[0].stop()
    with pytest.raises(prove.Unproved):
        prove.prove_etcd(members.urls)


def test_a_client_keeps_its_lease_while_the_members_change_one_after_another(
    members: Members, own_coordination: Coordination
) -> None:
    members.prove()
    own_coordination.start()
    settings = {"ETCD_ENDPOINTS": ",".join(members.urls), "NATS_SERVER": own_coordination.nats_url}
    with Client(settings, members.folder) as client:
        keys = registered(members.urls[0])
        assert len(keys) == 1
        led = members.leader()
        # As playbooks/coordination.yml does it: the next only after a proof, the leader last.
        for number in sorted(range(3), key=lambda each: each == led):
            members.programs[number].stop()
            members.start(number)
            members.prove()
            assert client.ask("still there") == "answer still there"
        # A lease that nobody keeps is gone by then, and the key with it.
        time.sleep(LEASE_S + 1)
        assert registered(members.urls[0]) == keys
        assert client.ask("and after that") == "answer and after that"


def registered(endpoint: str) -> list[str]:
    """Return the keys of the endpoints that Dynamo lists."""
    whole = {
        "key": base64.b64encode(b"v1/instances/").decode(),
        "range_end": base64.b64encode(b"v1/instances0").decode(),
    }
    found = prove.etcd_call(endpoint, "kv/range", whole).get("kvs", [])
    return sorted(base64.b64decode(entry["key"]).decode() for entry in found)

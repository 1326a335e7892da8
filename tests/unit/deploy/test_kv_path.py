"""The step kv_path: ends that are the workers' own containers, the command that measures, what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdstack.deploy import kv_path, service, services, topology
from pdstack.transfer.qualify.__main__ import arguments
from pdstack.transfer.qualify.places import read_places
from pdstack.transfer.qualify.result import FORMAT
from pdstack.transfer.roles import Role

KEPT = {"format": FORMAT, "pairs": [], "date": "2026-11-24"}


@pytest.fixture
def built(inventory: Any) -> topology.Topology:
    hosts = inventory.hosts("a", "b", ansible_connection="ssh", prefill_workers=[{"env": {"SITE": "1"}}, {}])
    groups = inventory.groups(prefill=["a"], decode=["b", "a"])
    return topology.build(groups, hosts, inventory.settings(pdstack_name="t"))


def parts(entry: topology.Worker, built: topology.Topology, inventory: Any, **changed: Any) -> tuple[Any, Any]:
    """The worker's spec and its end's."""
    known = {"model_dir": "/m", "engine": inventory.common["engine_defaults"]}
    fabric = inventory.common["kv_fabrics"][changed.pop("fabric", "same_host")]
    shown = {"image": "i:1", "version": "0.7", "fabric": fabric, "cluster_key": "secret"}
    config = services.worker_config(
        entry, built, namespace="t", model_name="m", transfer={"path": "auto"}, drain_timeout_s=30, migration_limit=3,
        data_dir="/d", **known,
    )  # fmt: skip
    return services.worker(entry, config, **shown), kv_path.end(entry, built, **known, **shown, **changed)


@pytest.mark.parametrize("fabric", ["same_host", "tcp"])
def test_an_end_is_its_worker_but_for_what_runs_in_it(built: topology.Topology, inventory: Any, fabric: str) -> None:
    for entry in built["workers"]:
        worker, end = parts(entry, built, inventory, fabric=fabric)
        assert service.errors(end, "t") == []
        differ = {key for key in {*worker, *end} if worker.get(key) != end.get(key)}
        assert differ <= {"name", "command", "files", "healthcheck", "data_dirs", "stop_timeout"}
        assert [(file["path"], file["secret"]) for file in end["files"]] == [("cluster.key", True)]
    names = [kv_path.end_name(entry) for entry in built["workers"] if entry["host"] == "a"]
    assert names == ["kv-path-d0", "kv-path-p0", "kv-path-p1"]


def test_a_longest_name_still_gives_a_container(inventory: Any) -> None:
    hosts = inventory.hosts(prefill_workers=[{}] * 50)
    built = topology.build(inventory.groups(), hosts, inventory.settings(pdstack_name="n" * 32))
    _, end = parts(built["workers"][-1], built, inventory)
    assert service.errors(end, "n" * 32) == []


def test_leftovers_of_an_interrupted_run_are_pruned(built: topology.Topology) -> None:
    assert services.stale(["pdstack-t-kv-path-p0", "pdstack-t-prefill-0"], built, "a") == ["kv-path-p0"]


def test_the_one_that_asks_knows_all_ends(built: topology.Topology, inventory: Any, tmp_path: Path) -> None:
    asker = kv_path.asker(built)
    assert asker == {"name": "decode-0", "host": "b", "container": "pdstack-t-kv-path-d0"}
    entry = next(worker for worker in built["workers"] if worker["name"] == asker["name"])
    _, end = parts(entry, built, inventory, asks=True)
    files = {file["path"]: file["content"] for file in end["files"]}
    (tmp_path / "agents.json").write_text(files["agents.json"])
    places = read_places(tmp_path / "agents.json")
    assert [(one.name, one.host, one.shares) for one in places[Role.PREFILL]] == [
        ("prefill-0", "a", "a"),
        ("prefill-1", "a", "a"),
    ]
    first = places[Role.PREFILL][0]
    assert (first.control, first.stream, first.limit) == (9500, 9501, 9502)
    assert [one.control for one in places[Role.DECODE]] == [9650, 9650]
    listens = [end["command"][end["command"].index("--listen") + 1] for _, end in [parts(entry, built, inventory)]]
    assert listens == ["b:9650"]


def words(built: topology.Topology, inventory: Any, **changed: Any) -> list[str]:
    known = {"path": "auto", "backend": "ucx", "floor": 0, "fabric": inventory.common["kv_fabrics"]["same_host"]}
    known |= {"model_dir": "/m", "engine": inventory.common["engine_defaults"], "nbytes": 1 << 25, "rounds": 5}
    return kv_path.command(built, **known | changed)


@pytest.mark.parametrize(
    ("changed", "path", "floor", "want"),
    [
        ({}, "auto", 0.1, ["shared", "cma"]),
        ({"floor": 99.0}, "auto", 99.0, ["shared", "cma"]),
        ({"path": "backend", "backend": "nixl"}, "nixl", 0.1, ["cma"]),
        ({"path": "shared"}, "shared", 0.1, ["shared"]),
    ],
)
def test_the_command_is_one_that_the_program_takes(
    built: topology.Topology, inventory: Any, changed: dict[str, Any], path: str, floor: float, want: list[str]
) -> None:
    made = kv_path.compared(words(built, inventory, **changed), json.dumps(KEPT))
    assert made[:4] == ["python3", "-m", "pdstack", "kv-path"]
    options = arguments().parse_args(made[4:])
    assert (options.path, options.floor, options.want) == (path, floor, want)
    assert options.block_tokens == [16] and options.backend == changed.get("backend", "ucx")
    assert str(options.compare) == "-" and str(options.json) == kv_path.JSON_FILE


def test_workers_with_other_blocks_are_measured_with_them(inventory: Any) -> None:
    hosts = inventory.hosts(prefill_workers=[{"engine": {"block_size": 32}}], decode_workers=[{}])
    built = topology.build(inventory.groups(), hosts, inventory.settings())
    made = words(built, inventory)
    assert made[made.index("--block-tokens") + 1 :][:2] == ["16", "32"]


def test_what_another_version_kept_is_not_compared_with() -> None:
    assert kv_path.FORMAT == FORMAT
    for kept in ("", "{}", json.dumps(KEPT | {"format": "pdstack kv path/0"})):
        assert kv_path.compared(["x"], kept) == ["x"]


def test_a_fingerprint_changes_with_anything() -> None:
    known = [["cmd"], [["6.1", "boot-1", "image:1", {"env": {}}, []]]]
    other = [["cmd"], [["6.1", "boot-2", "image:1", {"env": {}}, []]]]
    assert kv_path.fingerprint(known) == kv_path.fingerprint(json.loads(json.dumps(known)))
    assert kv_path.fingerprint(known) != kv_path.fingerprint(other)


def test_orders_are_those_that_are_not_the_usual_one() -> None:
    pairs = [
        {"prefill": "p0", "decode": "d0", "order": ["cma", "shared"]},
        {"prefill": "p1", "decode": "d0", "order": []},
        {"prefill": "p0", "decode": "d1", "order": ["stream", "backend"]},
    ]
    assert kv_path.orders({"pairs": pairs}) == {"d0": {"p0": ["cma", "shared"]}, "d1": {"p0": ["stream", "backend"]}}
    assert kv_path.orders({}) == {}

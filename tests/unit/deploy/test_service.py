from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy import service


def spec(**changes: Any) -> dict[str, Any]:
    return {"name": "etcd", "image": "pdstack/etcd:0123456789ab"} | changes


def plan(**changes: Any) -> service.Plan:
    return service.plan(spec(**changes), deployment="local", config_dir="/etc/pdstack/local",
                        data_dir="/var/lib/pdstack/local", uid=64000)  # fmt: skip


def test_the_least_that_a_service_needs() -> None:
    found = plan()
    assert found["container"] == "pdstack-local-etcd"
    assert found["user"] == "64000:64000"
    assert found["env"] == {"RUST_BACKTRACE": "0"}
    assert found["volumes"] == []
    assert found["pid_mode"] == ""
    assert found["security_opts"] == ["no-new-privileges:true"]


def test_files_are_mounted_and_secrets_kept_apart() -> None:
    found = plan(files=[{"path": "a.json", "content": "{}"}, {"path": "key", "content": "s", "secret": True}])
    assert found["volumes"] == ["/etc/pdstack/local/etcd:/etc/pdstack:ro"]
    assert [f["path"] for f in found["files"]] == ["a.json"]
    assert [f["path"] for f in found["secrets"]] == ["key"]


def test_the_label_follows_every_part_of_every_file_and_not_their_order() -> None:
    one, two = {"path": "a", "content": "1"}, {"path": "b", "content": "2", "secret": True}
    digests = [
        plan(files=files)["labels"]["pdstack.config"]
        for files in (
            [one, two],
            [one | {"content": "2"}, two],
            [one | {"mode": "0400"}, two],
            [one | {"path": "c"}, two],
        )
    ]
    assert len(set(digests)) == 4
    assert plan(files=[two, one])["labels"]["pdstack.config"] == digests[0]


def test_data_directories_are_mounted_where_they_are() -> None:
    found = plan(data_dirs=[".", "wal", "/srv/etcd"])
    assert found["data_dirs"] == [
        "/var/lib/pdstack/local/etcd", "/var/lib/pdstack/local/etcd/wal", "/srv/etcd",
    ]  # fmt: skip
    assert "/srv/etcd:/srv/etcd:rw" in found["volumes"]
    assert found["data_roots"] == ["/var/lib/pdstack/local/etcd", "/srv/etcd"]


def test_own_labels_cannot_be_overridden() -> None:
    assert plan(labels={"pdstack.service": "x", "n": 1})["labels"] | {"pdstack.config": ""} == {
        "n": "1", "pdstack.config": "", "pdstack.deployment": "local", "pdstack.service": "etcd",
    }  # fmt: skip


def test_environment_becomes_text() -> None:
    assert plan(env={"A": 1, "B": True, "C": "x"})["env"] == {"RUST_BACKTRACE": "0", "A": "1", "B": "true", "C": "x"}


@pytest.mark.parametrize("mode", ["pid_mode", "ipc_mode"])
def test_a_shared_namespace_names_what_the_engine_adds(mode: str) -> None:
    assert plan(**{mode: "host"})["security_opts"] == ["no-new-privileges:true", "label=disable"]
    assert plan(**{mode: "private"})["security_opts"] == ["no-new-privileges:true"]


def test_a_right_spec_has_no_errors() -> None:
    good = spec(files=[{"path": "a/b.json", "content": ""}], data_dirs=["."], env={"UCX_TLS": "tcp"})
    assert service.errors(good, "local") == []
    assert service.errors(spec(image="reg.example.org:5000/x/etcd@sha256:" + "0" * 64), "local") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "Etcd_0"}, "lower-case letters"),
        ({"name": "x" * 60}, "at most 63"),
        ({"image": "reg.example.org:5000/etcd"}, "pinned"),
        ({"files": [{"path": "/a", "content": ""}]}, "relative to /etc/pdstack"),
        ({"files": [{"path": "../a", "content": ""}]}, "relative to /etc/pdstack"),
        ({"files": [{"path": "a", "content": ""}, {"path": "a", "content": ""}]}, "each once"),
        ({"files": [{"path": "a", "content": "", "mode": "640"}]}, "four octal digits"),
        ({"files": [{"path": "a", "content": "", "mode": "0444", "secret": True}]}, "everyone may use"),
        ({"data_dirs": ["../x"]}, "'..'"),
        ({"env": {"A-B": 1}}, "'A-B'"),
    ],
)
def test_what_types_cannot_say_is_refused(changes: dict[str, Any], words: str) -> None:
    (error,) = service.errors(spec(**changes), "local")
    assert words in error
    assert "wanted" in error or "at most" in error


def test_files_belong_to_the_user_that_the_container_runs_as() -> None:
    found = plan(user="1000:0")
    assert (found["user"], found["owner"], found["group"]) == ("1000:0", 1000, 0)
    assert (plan()["owner"], plan()["group"]) == (64000, 64000)


def test_no_gpus_ask_for_nothing() -> None:
    found = plan()
    assert (found["runtime"], found["device_requests"], found["devices"]) == ("", [], [])
    assert "CUDA_VISIBLE_DEVICES" not in found["env"]


def test_cdi_gives_the_container_its_own_gpus_and_hides_the_rest_from_a_default_runtime() -> None:
    found = plan(gpus={"ids": [2, 3], "mode": "cdi"})
    (request,) = found["device_requests"]
    assert (request["driver"], request["device_ids"]) == ("cdi", ["nvidia.com/gpu=2", "nvidia.com/gpu=3"])
    # A key left out is null in what the engine answers, and the container would be made anew on every run.
    assert None not in request.values()
    assert (found["runtime"], found["devices"]) == ("", [])
    # The container has two, which CUDA counts from 0.
    assert found["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert found["env"]["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_cdi_gives_all_and_cuda_picks_where_processes_read_each_other_s_memory() -> None:
    found = plan(gpus={"ids": [2, 3], "mode": "cdi", "visible": "all"})
    assert found["device_requests"][0]["device_ids"] == ["nvidia.com/gpu=all"]
    assert found["env"]["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert found["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(("visible", "given", "picked"), [("own", "2,3", "0,1"), ("all", "all", "2,3")])
def test_the_runtime_is_told_in_the_environment_and_the_devices_named(visible: str, given: str, picked: str) -> None:
    nodes = ["/dev/nvidiactl", "/dev/nvidia2"]
    found = plan(
        gpus={"ids": [2, 3], "mode": "runtime", "visible": visible, "devices": nodes}, devices=["/dev/infiniband"]
    )
    assert (found["runtime"], found["device_requests"]) == ("nvidia", [])
    assert found["devices"] == ["/dev/infiniband", *nodes]
    assert (found["env"]["NVIDIA_VISIBLE_DEVICES"], found["env"]["CUDA_VISIBLE_DEVICES"]) == (given, picked)


def test_a_named_runtime_is_taken() -> None:
    assert plan(runtime="runc")["runtime"] == "runc"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": {"ids": [], "mode": "cdi"}}, "no ids"),
        ({"gpus": {"ids": [1, 1], "mode": "cdi"}}, "each GPU once"),
        ({"user": "dynamo"}, "wanted numbers"),
    ],
)
def test_gpus_and_users_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    (error,) = service.errors(spec(**changes), "local")
    assert words in error

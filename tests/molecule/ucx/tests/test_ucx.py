from __future__ import annotations

from testinfra.host import Host

ROOT = "/opt/pdstack/hosttools"


def test_the_tools_are_the_runtime_image_s_version_and_run_without_pip(host: Host) -> None:
    (tools,) = host.run(f"ls -d {ROOT}/libucx-cu13-1.19.0-*").stdout.split()
    said = host.run(f"LD_LIBRARY_PATH={tools}/libucx/lib {tools}/libucx/bin/ucx_info -v")
    assert "Library version: 1.19.0" in said.stdout, said.stderr
    assert host.file(f"{tools}/VERSION").content_string.strip() == "1.19.0"
    assert host.file(tools).user == "root"


def test_nothing_half_made_is_left(host: Host) -> None:
    assert host.run(f"ls -d {ROOT}/*.partial").stdout == ""


def test_the_libraries_with_infiniband_came_for_the_fabric_over_rdma_only(host: Host) -> None:
    """The scenario asked for ib once; with tcp alone there is one directory."""
    found = host.run(f"ls {ROOT}").stdout.split()
    assert sorted(name.partition("-cu13")[0] for name in found) == ["libucx", "nixl"]

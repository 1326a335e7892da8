from __future__ import annotations

import json
from pathlib import Path

import pytest
from testinfra.host import Host

ROOT = "/opt/pdstack/hosttools"


def test_the_libraries_are_the_runtime_image_s_and_have_the_ucx_plugin(host: Host, pytestconfig: pytest.Config) -> None:
    (root,) = host.run(f"ls -d {ROOT}/nixl-cu13-0.7.1-*").stdout.split()
    script = (Path(pytestconfig.rootpath) / "roles/nixl/files/look.py").read_text()
    said = host.run("python3 -c %s %s", script, root)
    found = json.loads(said.stdout)
    assert (found["version"], found["ucx"]) == ("0.7.1", "1.19.0")
    assert {"UCX", "POSIX"} <= set(found["plugins"])
    # Everything but the driver's own library was found.
    assert found["plugin"] == "libcuda.so.1: cannot open shared object file: No such file or directory"

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdstack.deploy import hosttools

COMMON = Path(__file__).resolve().parents[3] / "inventories/common/group_vars/all"
PINS: dict[str, Any] = yaml.safe_load((COMMON / "versions.yml").read_text())["versions"]
FILES = {
    "libucx/bin/ucx_info": b"program",
    "libucx/bin/io_demo": b"another",
    "libucx/lib/libucp.so": b"copy",
    "libucx/lib/libucp.so.0": b"library",
    "libucx/lib/libucp.so.0.0.0": b"copy",
    "libucx/lib/libucp.a": b"static",
    "libucx/lib/ucx/libuct_cuda.so.0": b"module",
    "nixl_cu13.libs/libucp-e470a167.so.0.0.0": b"other library",
    "nixl_cu13.libs/ucx/libuct_ib.so.0": b"module",
    ".nixl_cu13.mesonpy.libs/libucx_utils.so": b"needed",
    ".nixl_cu13.mesonpy.libs/plugins/libplugin_UCX.so": b"plugin",
    "nixl_cu13/_bindings.cpython-312-x86_64-linux-gnu.so": b"for Python",
    "nixl_cu13/_api.py": b"python",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "x-1.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


def test_the_wheels_are_of_the_runtime_image_s_versions() -> None:
    for name in ("ucx", "nixl"):
        assert PINS["wheels"][name]["version"] == PINS["trtllm_runtime"][name]
        assert PINS["wheels"][name]["package"].endswith("-cu" + PINS["trtllm_runtime"]["cuda"].partition(".")[0])
        assert set(PINS["wheels"][name]["sha256"]) == {"x86_64", "aarch64"}


def test_the_archive_holds_programs_and_libraries_once_and_links_for_ucx(wheel: Path, tmp_path: Path) -> None:
    hosttools.pack(wheel, "1.19.0", tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        found = {entry.name: entry for entry in archive.getmembers()}
    assert set(found) == {
        "libucx/bin/ucx_info", "libucx/lib/libucp.so.0", "libucx/lib/ucx/libuct_cuda.so.0",
        "nixl_cu13.libs/libucp-e470a167.so.0.0.0", "nixl_cu13.libs/ucx/libuct_ib.so.0",
        ".nixl_cu13.mesonpy.libs/libucx_utils.so", ".nixl_cu13.mesonpy.libs/plugins/libplugin_UCX.so",
        "ucx/libucp.so.0", "VERSION",
    }  # fmt: skip
    assert found["libucx/bin/ucx_info"].mode == 0o755
    assert found["ucx/libucp.so.0"].linkname == "../nixl_cu13.libs/libucp-e470a167.so.0.0.0"
    hosttools.pack(wheel, "1.19.0", tmp_path / "b.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()


def pin(digest: str) -> dict[str, Any]:
    return {"package": "x", "version": "1", "sha256": {"x86_64": digest}}


def test_a_wheel_is_fetched_once_and_its_checksum_is_checked(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Path] = []

    def fetch(pin: Any, machine: str, into: Path) -> Path:
        fetched.append(into)
        copy = into / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy

    monkeypatch.setattr(hosttools, "fetch", fetch)
    good = pin(hashlib.sha256(wheel.read_bytes()).hexdigest())
    first = hosttools.ensure(good, "x86_64", tmp_path / "cache")
    assert first == hosttools.ensure(good, "x86_64", tmp_path / "cache")
    assert len(fetched) == 1
    with pytest.raises(ValueError, match="sha256"):
        hosttools.ensure(pin("0" * 64), "x86_64", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_what_cannot_be_fetched_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Path:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(hosttools, "fetch", fail)
    words = ["--pin", '{"package": "x", "version": "1", "sha256": {"x86_64": "0123456789abcdef"}}']
    assert hosttools.main([*words, "--machine", "x86_64", "--cache", str(tmp_path)]) == 1
    assert "x-1-0123456789ab.tar.gz" in capsys.readouterr().err

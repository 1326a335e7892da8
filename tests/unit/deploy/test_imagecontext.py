from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from pdstack.deploy import elf, imagecontext

WHEELS = Path(__file__).parents[3] / "templates/images/requirements-worker.txt"


def libraries_of_this_python() -> list[Path]:
    """Real ELF files: the interpreter and what it is linked with."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = {Path(line.split()[-1]) for line in maps if ".so" in line and line.split()[-1].startswith("/")}
    return [*sorted(files), Path(sys.executable).resolve()]


def test_needed_names_the_c_library() -> None:
    found = {path: elf.needed(path) for path in libraries_of_this_python() if elf.is_elf(path)}
    assert any("libc.so.6" in names for names in found.values())
    assert all(name for names in found.values() for name in names)


def test_needed_refuses_other_files(tmp_path: Path) -> None:
    file = tmp_path / "x.so"
    file.write_text("not a library")
    assert not elf.is_elf(file)
    with pytest.raises(ValueError, match="wanted a 64-bit"):
        elf.needed(file)


def test_strip_removes_what_nothing_needs(tmp_path: Path) -> None:
    for name in (
        "nixl_ep_cu12/a.so",
        "libucx/lib/libucp.a",
        "libucx/lib/ucx/libuct_cuda.so.0",
        "libucx/lib/ucx/libuct_cma.so.0",
        "numpy/_core/tests/x.py",
        "numpy/linalg/tests/x.py",
        "numpy/linalg/linalg.pyi",
        "numpy/linalg/linalg.py",
        "x-1.dist-info/RECORD",
        "x-1.dist-info/METADATA",
        "x-1.dist-info/licenses/LICENSE",
        "nixl_cu12.libs/nixl/libplugin_UCX.so",
        "nixl_cu12.libs/nixl/libplugin_OBJ.so",
        "nixl_cu12.libs/libunused.so.1",
        "dynamo/vllm/main.py",
        "dynamo/frontend/main.py",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    imagecontext.strip(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [
        "dynamo/frontend/main.py",
        "libucx/lib/ucx/libuct_cma.so.0",
        "nixl_cu12.libs/nixl/libplugin_UCX.so",
        "numpy/linalg/linalg.py",
        "x-1.dist-info/METADATA",
        "x-1.dist-info/licenses/LICENSE",
    ]


def test_copies_become_links(tmp_path: Path) -> None:
    for name, text in (("libx.so", "a"), ("libx.so.0", "a"), ("libx.so.0.0.0", "a"), ("liby.so", "b")):
        (tmp_path / name).write_text(text)
    imagecontext.link_copies(tmp_path)
    assert os.readlink(tmp_path / "libx.so") == "libx.so.0.0.0"
    assert os.readlink(tmp_path / "libx.so.0") == "libx.so.0.0.0"
    assert not (tmp_path / "libx.so.0.0.0").is_symlink()
    assert not (tmp_path / "liby.so").is_symlink()
    assert imagecontext.tree_bytes(tmp_path) == 2


def test_application_is_readable_and_without_the_controller_part(tmp_path: Path) -> None:
    target = tmp_path / "app" / "pdstack"
    old = os.umask(0o077)
    try:
        imagecontext.copy_application(imagecontext.PACKAGE_ROOT, target)
    finally:
        os.umask(old)
    imagecontext.make_readable(tmp_path / "app")
    assert not (target / "deploy").exists()
    assert stat.S_IMODE((target / "probe.py").stat().st_mode) == 0o644
    assert stat.S_IMODE((target / "worker").stat().st_mode) == 0o755


def test_failure_says_what_pip_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("numpy==2.4.6\n")  # no hash
    arguments = ["worker", "--out", str(tmp_path / "out"), "--requirements", str(requirements)]
    assert imagecontext.main(arguments) == 1
    assert "require-hashes" in capsys.readouterr().err
    assert not (tmp_path / "out" / "site-packages").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_program_is_named() -> None:
    with pytest.raises(imagecontext.ContextError, match="found no command 'no-such-program'"):
        imagecontext.run(["no-such-program"], "test")


def test_every_wheel_is_pinned_with_a_hash() -> None:
    entries = [line for line in WHEELS.read_text().splitlines() if line and not line.startswith(("#", " "))]
    assert len(entries) == 14
    for entry in entries:
        assert "==" in entry, entry
        assert entry.endswith("\\"), entry


def test_sizes_are_printed_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(requirements: Path, target: Path, python_version: str, machine: str) -> None:
        (target / "numpy").mkdir(parents=True)
        (target / "numpy" / "x.py").write_text("12345")

    monkeypatch.setattr(imagecontext, "install_wheels", fake)
    assert imagecontext.main(["worker", "--out", str(tmp_path), "--requirements", str(WHEELS)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"]["site-packages"] == 5
    assert printed["bytes"]["app"] > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app", "site-packages", "site-packages.key"]


def test_wheels_stay_until_something_that_decides_about_them_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[str] = []

    def fake(requirements: Path, target: Path, python_version: str, machine: str) -> None:
        installed.append(python_version)
        target.mkdir()

    monkeypatch.setattr(imagecontext, "install_wheels", fake)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("a==1\n")
    out = tmp_path / "out"
    for version in ("3.11", "3.11", "3.13"):
        imagecontext.prepare_worker(out, requirements, version, "x86_64")
    assert installed == ["3.11", "3.13"]
    requirements.write_text("a==2\n")
    imagecontext.prepare_worker(out, requirements, "3.13", "x86_64")
    (out / "site-packages").rmdir()
    imagecontext.prepare_worker(out, requirements, "3.13", "x86_64")
    assert len(installed) == 4

"""The module pdstack_tree, run as Ansible runs it: arguments as JSON, in a process of its own."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).resolve().parents[3] / "plugins" / "modules" / "pdstack_tree.py"
FILES = [{"path": "a.json", "content": "{}\n", "mode": "0440"}, {"path": "sub/b", "content": "b", "mode": "0400"}]

pytest.importorskip("ansible")


def run(path: Path, *, check: bool = False, fails: bool = False, **arguments: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "path": str(path),
        "owner": os.getuid(),
        "group": os.getgid(),
        "_ansible_check_mode": check,
    }
    done = subprocess.run(
        [sys.executable, str(MODULE), json.dumps({"ANSIBLE_MODULE_ARGS": values | arguments})],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_writes_the_tree_and_then_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "etc" / "service"
    assert run(root, files=FILES)["changed"]
    assert (root / "sub" / "b").read_text() == "b"
    assert (mode(root), mode(root / "a.json"), mode(root / "sub"), mode(root / "sub" / "b")) == (
        0o750,
        0o440,
        0o750,
        0o400,
    )
    assert not run(root, files=FILES)["changed"]


def test_removes_what_is_not_wanted(tmp_path: Path) -> None:
    run(tmp_path / "t", files=FILES)
    (tmp_path / "t" / "stale").mkdir()
    (tmp_path / "t" / "sub" / "old").write_text("")
    result = run(tmp_path / "t", files=FILES[1:])
    assert len(result["changes"]) == 3
    assert sorted(p.name for p in (tmp_path / "t").rglob("*")) == ["b", "sub"]


def test_a_rehearsal_tells_the_same_and_touches_nothing(tmp_path: Path) -> None:
    result = run(tmp_path / "t", check=True, files=FILES, directories=[{"path": str(tmp_path / "d"), "mode": "0700"}])
    assert result["changed"]
    assert "+{}" in result["diff"]["prepared"]
    assert list(tmp_path.iterdir()) == []


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    for word in ("hush-hush", "hush-new"):
        secret = [{"path": "key", "content": word, "mode": "0400"}]
        result = run(tmp_path / "t", secrets=secret)
        assert "hush" not in json.dumps(result)
        assert result["changed"]
    assert (tmp_path / "t" / "key").read_text() == "hush-new"


def test_a_wrong_mode_is_mended(tmp_path: Path) -> None:
    run(tmp_path / "t", files=FILES)
    (tmp_path / "t" / "a.json").chmod(0o666)
    assert run(tmp_path / "t", files=FILES)["changes"] == [f"mode of {tmp_path / 't' / 'a.json'} to 0440"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.json").symlink_to(tmp_path / "victim")
    run(tmp_path / "t", files=FILES)
    assert (tmp_path / "victim").read_text() == "keep"
    assert not (tmp_path / "t" / "a.json").is_symlink()


def test_absent(tmp_path: Path) -> None:
    run(tmp_path / "t", files=FILES)
    assert run(tmp_path / "t", state="absent")["changed"]
    assert not (tmp_path / "t").exists()
    assert not run(tmp_path / "t", state="absent")["changed"]


def test_a_file_in_the_way_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("")
    assert "wanted a directory" in run(tmp_path / "t", files=FILES, fails=True)["msg"]

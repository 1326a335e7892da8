from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdstack.deploy import modelfiles

UID, GID = os.getuid(), os.getgid()


def safetensors(path: Path, count: int = 4, fill: bytes = b"\0") -> None:
    table = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path.write_bytes(len(table).to_bytes(8, "little") + table + fill * 4 * count)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    safetensors(directory / "model.safetensors")
    return directory


def look(directory: Path, uid: int = UID, gid: int = GID) -> dict[str, Any]:
    return modelfiles.look(directory, uid, gid)


def test_a_whole_model_is_described(model: Path) -> None:
    found = look(model)
    assert found["problems"] == []
    assert set(found["files"]) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert len(found["digest"]) == 64


def test_it_runs_by_itself_from_standard_input(model: Path) -> None:
    command = [sys.executable, "-S", "-E", "-", str(model), str(UID), str(GID)]
    done = subprocess.run(
        command, input=Path(modelfiles.__file__).read_text(), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == look(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_a_worker_needs_is_missed(model: Path, name: str) -> None:
    (model / name).unlink()
    (problem,) = look(model)["problems"]
    assert name.split(".")[-1] in problem


def test_no_directory(tmp_path: Path) -> None:
    assert look(tmp_path / "x")["problems"] == ["no such directory"]


def test_weights_that_were_cut_short(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (problem,) = look(model)["problems"]
    assert "found" in problem
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (problem,) = look(model)["problems"]
    assert "no table of tensors" in problem


def test_a_part_that_the_index_names(model: Path) -> None:
    (model / modelfiles.INDEX).write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    (problem,) = look(model)["problems"]
    assert "model-2.safetensors" in problem


def test_links_out_of_the_directory_lead_nowhere_in_a_container(model: Path, tmp_path: Path) -> None:
    safetensors(tmp_path / "blob")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../blob")
    (problem,) = look(model)["problems"]
    assert "model.safetensors" in problem
    (tmp_path / "blob").unlink()
    assert "model.safetensors: a link to nothing" in look(model)["problems"]


def test_files_that_the_container_cannot_read(model: Path) -> None:
    (model / "config.json").chmod(0o600)
    (problem,) = look(model, uid=UID + 1, gid=GID + 1)["problems"]
    assert "config.json (mode 0600)" in problem
    (model / "config.json").chmod(0o640)
    assert look(model, uid=UID + 1, gid=GID)["problems"] == []
    model.chmod(0o700)
    assert any("model (mode 0700)" in problem for problem in look(model, uid=UID + 1, gid=GID + 1)["problems"])


def test_the_digest_follows_contents_and_not_what_downloads_leave(model: Path) -> None:
    digests = [look(model)["digest"]]
    (model / ".cache").mkdir()
    (model / ".cache/x").write_text("x")
    assert look(model)["digest"] == digests[0]
    (model / "config.json").write_text("[]")
    digests.append(look(model)["digest"])
    safetensors(model / "model.safetensors", fill=b"\1")
    digests.append(look(model)["digest"])
    assert len(set(digests)) == 3


def test_large_files_are_read_at_their_edges(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelfiles, "SMALL", 64)
    monkeypatch.setattr(modelfiles, "EDGE", 16)
    safetensors(model / "model.safetensors", count=100)
    before = look(model)["digest"]
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] = 7
    (model / "model.safetensors").write_bytes(data)
    assert look(model)["digest"] != before


def test_hosts_with_another_model_are_named(model: Path, tmp_path: Path) -> None:
    same = look(model)
    (model / "extra.txt").write_text("x")
    more = look(model)
    (model / "extra.txt").unlink()
    safetensors(model / "model.safetensors", fill=b"\1")
    other = look(model)
    assert modelfiles.different({"a": same, "b": same}) == []
    assert modelfiles.different({"a": same, "b": look(tmp_path / "none")}) == []
    (sentence,) = modelfiles.different({"a": same, "b": same, "c": more})
    assert sentence == "c differs from a: with extra.txt"
    (sentence,) = modelfiles.different({"a": same, "b": other, "c": same})
    assert "b differs from a: files of the same sizes, other contents" in sentence

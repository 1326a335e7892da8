"""The collections come out of one pinned wheel, whole or not at all."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from pdstack.deploy import collections


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "ansible-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ansible_collections/ansible/posix/MANIFEST.json", "{}")
        archive.writestr("ansible_collections/ansible/posixish/MANIFEST.json", "{}")
        archive.writestr("ansible_collections/community/docker/plugins/x.py", "x = 1\n")
        archive.writestr("ansible_collections/community/docker/../../../escape", "no")
    return path


def pin(*names: str) -> collections.CollectionsPin:
    return {"wheel": "ansible", "version": "1", "sha256": "0" * 64, "names": list(names)}


def test_only_the_named_collections_are_taken(wheel: Path, tmp_path: Path) -> None:
    collections.extract(wheel, ["ansible.posix", "community.docker"], tmp_path / "out")
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert names == [
        "ansible_collections/ansible/posix/MANIFEST.json",
        "ansible_collections/community/docker/plugins/x.py",
    ]


def test_a_collection_the_wheel_lacks_is_named(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no collection community\.crypto"):
        collections.extract(wheel, ["ansible.posix", "community.crypto"], tmp_path / "out")


def test_second_run_does_nothing_and_a_new_pin_replaces_the_tree(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collections, "fetch_wheel", lambda _pin, _into: wheel)
    cache = tmp_path / "cache"
    assert collections.ensure(pin("ansible.posix", "community.docker"), cache)
    assert not collections.ensure(pin("ansible.posix", "community.docker"), cache)
    assert collections.ensure(pin("ansible.posix"), cache)
    assert not (cache / "collections/ansible_collections/community").exists()


def test_a_failed_fetch_keeps_the_old_tree(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(collections, "fetch_wheel", lambda _pin, _into: wheel)
    collections.ensure(pin("ansible.posix"), cache)
    with pytest.raises(ValueError, match="no collection"):
        collections.ensure(pin("no.such"), cache)
    assert (cache / "collections/ansible_collections/ansible/posix/MANIFEST.json").is_file()

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pdstack.deploy import modelid


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    directory = tmp_path / "weights"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"0" * 1000)
    return directory


def identify(inventory: Any, cache: Path, source: str = "package", ref: str = "", name: str = "Some Model") -> str:
    pins = inventory.common["versions"]["models"]
    return modelid.model_id(source, ref=ref, name=name, pins=pins, cache_dir=str(cache))


def test_the_id_is_a_directory_name(inventory: Any, tmp_path: Path) -> None:
    name = identify(inventory, tmp_path)
    assert name.startswith("some-model-")
    assert len(name) == len("some-model-") + modelid.DIGITS


def test_sources_differ(inventory: Any, tmp_path: Path) -> None:
    ids = {identify(inventory, tmp_path, source, "x/y") for source in ("package", "hub", "tiny")}
    assert len(ids) == 3


def test_what_is_said_about_sizes_does_not_move_the_model(inventory: Any, tmp_path: Path) -> None:
    before = identify(inventory, tmp_path)
    inventory.common["versions"]["models"]["package"]["disk_mib"] = 1
    assert identify(inventory, tmp_path) == before
    inventory.common["versions"]["models"]["package"]["sha256"] = "0"
    assert identify(inventory, tmp_path) != before


def test_a_changed_byte_is_another_model(inventory: Any, tmp_path: Path, weights: Path) -> None:
    before = identify(inventory, tmp_path, "path", str(weights))
    assert identify(inventory, tmp_path, "path", str(weights)) == before
    (weights / "model.safetensors").write_bytes(b"0" * 999 + b"1")
    assert identify(inventory, tmp_path, "path", str(weights)) != before


def test_unchanged_weights_are_not_read_again(
    inventory: Any, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identify(inventory, tmp_path, "path", str(weights))

    def read(_: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(modelid, "file_digest", read)
    assert identify(inventory, tmp_path, "path", str(weights)) == before
    os.utime(weights / "config.json", ns=(1, 1))
    with pytest.raises(AssertionError, match="read again"):
        identify(inventory, tmp_path, "path", str(weights))


def test_an_empty_directory_is_explained(inventory: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"wanted a directory with config\.json"):
        identify(inventory, tmp_path, "path", str(tmp_path / "empty"))

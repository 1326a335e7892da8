from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pdstack.deploy import image_tag


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "src"
    (root / "worker").mkdir(parents=True)
    (root / "deploy").mkdir()
    (root / "__init__.py").write_text("")
    (root / "worker" / "app.py").write_text("x = 1\n")
    (root / "deploy" / "plugin.py").write_text("y = 1\n")
    return root


def test_the_tag_is_twelve_hex_digits_and_ignores_the_order_of_keys() -> None:
    tag = image_tag.tag({"a": 1, "b": [1, 2]})
    assert len(tag) == 12
    assert int(tag, 16) >= 0
    assert tag == image_tag.tag({"b": [1, 2], "a": 1})
    assert tag != image_tag.tag({"a": 1, "b": [2, 1]})


def test_a_changed_source_file_gives_another_digest(tree: Path) -> None:
    before = image_tag.tree_digest(tree)
    (tree / "worker" / "app.py").write_text("x = 2\n")
    assert image_tag.tree_digest(tree) != before


def test_a_renamed_source_file_gives_another_digest(tree: Path) -> None:
    before = image_tag.tree_digest(tree)
    (tree / "worker" / "app.py").rename(tree / "worker" / "main.py")
    assert image_tag.tree_digest(tree) != before


def test_what_is_not_shipped_does_not_count(tree: Path) -> None:
    before = image_tag.tree_digest(tree, exclude=["deploy"])
    (tree / "deploy" / "plugin.py").write_text("y = 2\n")
    (tree / "worker" / "__pycache__").mkdir()
    (tree / "worker" / "__pycache__" / "app.cpython-311.pyc").write_bytes(b"made")
    (tree / "worker" / "app.py").chmod(0o600)
    os.utime(tree / "worker" / "app.py", (1, 1))
    assert image_tag.tree_digest(tree, exclude=["deploy"]) == before


def test_only_a_directory_at_the_top_is_left_out(tree: Path) -> None:
    (tree / "worker" / "deploy").mkdir()
    before = image_tag.tree_digest(tree, exclude=["deploy"])
    (tree / "worker" / "deploy" / "x.py").write_text("")
    assert image_tag.tree_digest(tree, exclude=["deploy"]) != before


def test_two_trees_cannot_run_together(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    for root, name, content in ((one, "ab", "c"), (two, "a", "bc")):
        root.mkdir()
        (root / name).write_text(content)
    assert image_tag.tree_digest(one) != image_tag.tree_digest(two)


def test_an_empty_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no source file"):
        image_tag.tree_digest(tmp_path)


def references(tree: Path, dockerfile: str = "FROM base:1\n", prefix: str = "pdstack", **entry: Any) -> dict[str, str]:
    catalog = {"worker": {"sources": "src", "exclude": ["deploy"], "files": ["req.txt"], **entry}}
    return image_tag.references(catalog, {"worker": dockerfile}, prefix=prefix, project=str(tree.parent))


def test_every_input_is_in_the_tag(tree: Path) -> None:
    requirements = tree.parent / "req.txt"
    requirements.write_text("numpy==1\n")
    first = references(tree)["worker"]
    assert first.startswith("pdstack/worker:")
    assert first == references(tree)["worker"]
    found = {
        first,
        references(tree, dockerfile="FROM base:2\n")["worker"],
        references(tree, architecture="arm")["worker"],
    }
    requirements.write_text("numpy==2\n")
    found.add(references(tree)["worker"])
    assert len(found) == 4


def test_a_registry_changes_the_name_and_not_the_tag(tree: Path) -> None:
    (tree.parent / "req.txt").write_text("")
    here = references(tree)["worker"]
    there = references(tree, prefix="registry.example.org/team/pdstack")["worker"]
    assert there == f"registry.example.org/team/{here}"


@pytest.mark.parametrize(
    ("engine", "coordination_image", "c1", "w1"),
    [
        ("reference", "own", ["etcd", "nats", "worker"], ["worker"]),
        ("trtllm", "own", ["etcd", "nats"], []),
        ("trtllm", "runtime", [], []),
    ],
)
def test_a_host_needs_the_images_of_what_it_runs(
    engine: str, coordination_image: str, c1: list[str], w1: list[str]
) -> None:
    topology = {
        "etcd": [{"host": "c1"}],
        "nats": [{"host": "c1"}],
        "frontends": [{"host": "c1"}],
        "workers": [{"host": "w1"}],
    }
    for host, images in (("c1", c1), ("w1", w1), ("builder", [])):
        assert image_tag.needed(topology, host, engine=engine, coordination_image=coordination_image) == images

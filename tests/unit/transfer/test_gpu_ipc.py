"""What can be said of CUDA IPC without a GPU: the description, the obstacles, and what is missing on this machine."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from pdstack.transfer import BackendUnavailable, ProtocolError
from pdstack.transfer.gpu import ipc, needs

GPU, OTHER = "a" * 32, "b" * 32
PLACE = ipc.Place(boot="one", pid_namespace="pid:[1]", pid=10, gpu=GPU, mig=False)
EXPORT = ipc.Export(handle="00" * 64, offset=512, nbytes=1 << 20, place=PLACE)
OURS = replace(PLACE, pid=11)


def test_a_description_survives_the_way_to_the_peer() -> None:
    assert ipc.Export.from_json(EXPORT.to_json()) == EXPORT


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"handle": "00"},
        {"handle": 5},
        {"offset": -1},
        {"offset": True},
        {"nbytes": 0},
        {"place": {}},
        {"place": 3},
        {"more": 1},
    ],
)
def test_anything_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        ipc.Export.from_json(json.dumps(json.loads(EXPORT.to_json()) | change))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1}'])
def test_so_is_what_is_no_description_at_all(text: str) -> None:
    with pytest.raises(ProtocolError):
        ipc.Export.from_json(text)


def test_nothing_speaks_against_a_neighbour_nor_against_another_gpu_that_is_seen() -> None:
    assert ipc.obstacle(PLACE, OURS, [GPU]) == ""
    assert ipc.obstacle(PLACE, replace(OURS, gpu=OTHER), [OTHER, GPU]) == ""
    assert ipc.obstacle(PLACE, replace(OURS, pid_namespace="pid:[2]"), [GPU]) == ""


@pytest.mark.parametrize(
    ("ours", "visible", "found", "fix"),
    [
        (replace(OURS, boot="two"), [GPU], "on another host", "gather, send, scatter"),
        (replace(OURS, mig=True), [GPU], "MIG mode", "whole GPUs"),
        (PLACE, [GPU], "this process's own", "use its address"),
        (replace(PLACE, pid_namespace="pid:[2]"), [GPU], "both workers are process 10", "--pid=host"),
        (replace(OURS, gpu=OTHER), [OTHER], f"on GPU {GPU}", "--gpus all"),
        (OURS, [], "it sees none", "--gpus all"),
    ],
)
def test_obstacles_are_named_with_the_fix(ours: ipc.Place, visible: list[str], found: str, fix: str) -> None:
    said = ipc.obstacle(PLACE, ours, visible)
    assert found in said
    assert fix in said


def no_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


@pytest.mark.skipif(not no_driver(), reason="this machine has NVIDIA's driver; tests/gpu looks at the real thing")
def test_without_a_driver_the_fix_is_said() -> None:
    with pytest.raises(BackendUnavailable, match=r"needs NVIDIA's driver.*--gpus all"):
        ipc.export(4096, 4096)


def test_without_torch_the_fix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    needs.gpu.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"importing torch failed.*pip install torch triton"):
        needs.gpu()


def test_nothing_of_the_package_imports_torch_or_triton() -> None:
    program = (
        "import sys, pdstack.transfer; from pdstack.transfer.gpu import checksum, copy, ipc, needs, view; "
        "sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""Checks each inventory here as the validate playbook does; `case_expect` and `case_message` say what must come out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted(Path(__file__).parent.glob("*.yml"))
# What a person begins with is right as it stands.
SHIPPED = [ROOT / "inventories" / name for name in ("local", "single_node", "cluster", "lab")]


def playbook(*inventories: Path) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent / "ansible-playbook"
    command = str(beside) if beside.is_file() else shutil.which("ansible-playbook")
    assert command, "ansible-playbook is not on the PATH"
    arguments = [argument for inventory in inventories for argument in ("-i", str(inventory))]
    return subprocess.run(
        [command, *arguments, "playbooks/validate.yml"],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.fixture(scope="session")
def found() -> dict[str, str]:
    """The problems of every case, evaluated in one process (see evaluate.py)."""
    command = [sys.executable, "-m", "tests.inventory_cases.evaluate", *map(str, [*CASES, *SHIPPED])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_inventory_case(case: Path, found: dict[str, str]) -> None:
    variables = yaml.safe_load(case.read_text())["all"]["vars"]
    said = found[str(case)]
    if variables["case_expect"] == "pass":
        assert said == ""
    else:
        assert variables["case_message"], f"{case.name} names no message"
        assert squeezed(variables["case_message"]) in squeezed(said)


@pytest.mark.parametrize("inventory", SHIPPED, ids=lambda inventory: inventory.name)
def test_a_shipped_inventory_passes(inventory: Path, found: dict[str, str]) -> None:
    assert found[str(inventory)] == ""


@pytest.mark.parametrize("name", ["pass_gpu_cluster", "fail_two_workers_on_a_gpu"])
def test_the_playbook_says_what_was_found_and_stops(name: str, found: dict[str, str]) -> None:
    case = CASES[0].parent / f"{name}.yml"
    result = playbook(ROOT / "inventories/common", case)
    output = result.stdout + result.stderr
    assert (result.returncode == 0) is name.startswith("pass"), output
    assert squeezed(found[str(case)]) in squeezed(output)


def test_common_inventory_missing_is_explained() -> None:
    result = playbook(ROOT / "inventories/local")
    assert result.returncode != 0
    assert "wanted: inventories/common before the inventory of the site" in squeezed(result.stdout + result.stderr)


def test_addresses_of_examples_are_pointed_at() -> None:
    result = playbook(ROOT / "inventories/common", ROOT / "inventories/single_node")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "addresses of examples, which no network has: gpu-1 (192.0.2.11)" in squeezed(result.stdout)


def test_a_written_inventory_passes(tmp_path: Path) -> None:
    arguments = ["--hosts", "g1=10.0.0.1,g2=10.0.0.2", "--service-hosts", "c1,c2,c3", "--fabric", "roce"]
    arguments += ["--net-devices", "mlx5_0:1", "--prefill", "2", "--decode", "1", "--tp-decode", "8"]
    command = [sys.executable, "-m", "pdstack.deploy.new_inventory", "rack", *arguments, "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    result = playbook(ROOT / "inventories/common", tmp_path / "rack")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "g2: 6 of its 8 GPUs have no worker" in squeezed(result.stdout)

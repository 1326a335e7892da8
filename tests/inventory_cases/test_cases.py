"""Runs the validate playbook over each inventory here; its `case_expect` and `case_message` say what must come out."""

from __future__ import annotations

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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_inventory_case(case: Path) -> None:
    variables = yaml.safe_load(case.read_text())["all"]["vars"]
    result = playbook(ROOT / "inventories/common", case)
    output = result.stdout + result.stderr
    if variables["case_expect"] == "pass":
        assert result.returncode == 0, output
    else:
        assert result.returncode != 0, f"{case.name} passed, but must fail"
        assert variables["case_message"], f"{case.name} names no message"
        assert squeezed(variables["case_message"]) in squeezed(output), output


def test_common_inventory_missing_is_explained() -> None:
    result = playbook(ROOT / "inventories/local")
    assert result.returncode != 0
    assert "wanted: inventories/common before the inventory of the site" in squeezed(result.stdout + result.stderr)


def test_local_inventory_passes() -> None:
    result = playbook(ROOT / "inventories/common", ROOT / "inventories/local")
    assert result.returncode == 0, result.stdout + result.stderr

"""What needs a host to be asked, and is refused before any change: a host that does not answer, no way to packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def facts(inventory: Path, *arguments: str, **environment: str) -> str:
    """Run the steps that change nothing, which must fail, and return what they said with single spaces."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "ansible-playbook"), "-i", "inventories/common", "-i", str(inventory)),
            *(
                "playbooks/facts.yml",
                "playbooks/preflight.yml",
                "-e",
                "pdstack_name=nowhere",
                "-e",
                "pdstack_port_offset=30000",
                *arguments,
            ),
        ],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert re.search(r"changed=[1-9]", done.stdout) is None, done.stdout
    return re.sub(r"\s+", " ", done.stdout + done.stderr)


def test_a_host_that_does_not_answer_is_named(tmp_path: Path) -> None:
    inventory = tmp_path / "far.yml"
    groups = ", ".join(
        f"{group}: {{hosts: {{far: null}}}}" for group in ("etcd", "nats", "frontend", "prefill", "decode")
    )
    inventory.write_text(
        f"all: {{hosts: {{far: {{ansible_host: 127.0.0.1, ansible_port: 1}}}}, children: {{{groups}}}}}\n"
    )
    said = facts(inventory, "-e", "pdstack_reach_timeout=3")
    assert "host far: cannot be reached by Ansible. Nothing was changed on any host." in said


def test_no_way_to_the_python_index_is_told() -> None:
    said = facts(
        Path("inventories/local"),
        *("-e", "images__base_serial=999999", "-e", "image_source=build"),
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
    )
    assert "The Python index does not answer" in said

"""That gpu_driver reboots host by host: what one host goes through is over before the next begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TASKS = Path(__file__).resolve().parents[3] / "roles/gpu_driver/tasks"


def test_a_host_is_drained_and_booted_before_the_next_is(tmp_path: Path) -> None:
    tasks: list[dict[str, Any]] = yaml.safe_load((TASKS / "run.yml").read_text())
    reboot = next(task for task in tasks if task.get("ansible.builtin.include_tasks") == "_reboot.yml")
    # In place of the file that boots: two steps that say whose turn it is.
    steps = [
        {"ansible.builtin.debug": {"msg": f"{step} of {{{{ inventory_hostname }}}}"}} for step in ("drain", "boot")
    ]
    variables = {"__gpu_driver__reason": "{{ 'versions differ' if inventory_hostname != 'b' else '' }}"}
    play = {"hosts": "all", "gather_facts": False, "connection": "local", "vars": variables, "tasks": [reboot]}
    (tmp_path / "_reboot.yml").write_text(yaml.safe_dump(steps))
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    (tmp_path / "ansible.cfg").write_text("[defaults]\n")
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg"), "ANSIBLE_STDOUT_CALLBACK": "default", "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCALHOST_WARNING": "false",
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "a,b,c", str(tmp_path / "play.yml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = [line.split('"')[3] for line in done.stdout.splitlines() if '"msg":' in line]
    one, other = ["drain of a", "boot of a"], ["drain of c", "boot of c"]
    # Whichever answered first is first; none begins before the other is over.
    assert said in (one + other, other + one), done.stdout + done.stderr

"""Evaluates the check of playbooks/validate.yml over many inventories in one process: Ansible's start takes longer.

    python -m tests.inventory_cases.evaluate INVENTORY ...

Prints a JSON object: the text of the problems (empty: none) by inventory. The expression is the playbook's own,
rendered by Ansible with the inventory chained after inventories/common.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Before Ansible is imported: it reads its configuration then.
os.environ["ANSIBLE_CONFIG"] = str(ROOT / "ansible.cfg")
os.chdir(ROOT)

from ansible.inventory.manager import InventoryManager  # noqa: E402  # needs the configuration above
from ansible.parsing.dataloader import DataLoader  # noqa: E402
from ansible.plugins.loader import init_plugin_loader  # noqa: E402
from ansible.template import Templar, trust_as_template  # noqa: E402
from ansible.vars.hostvars import HostVars  # noqa: E402
from ansible.vars.manager import VariableManager  # noqa: E402


def expression() -> str:
    """Return what the playbook asserts to be empty."""
    tasks = yaml.safe_load((ROOT / "playbooks/validate.yml").read_text())[0]["tasks"]
    return str(next(task["vars"]["problems"] for task in tasks if "problems" in task.get("vars", {})))


def problems(inventory: str, text: str) -> str:
    """Return what the expression `text` gives for an inventory."""
    loader = DataLoader()
    manager = InventoryManager(loader=loader, sources=[str(ROOT / "inventories/common"), inventory])
    variables = VariableManager(loader=loader, inventory=manager)
    hosts = manager.get_hosts("all")
    # The playbook's task runs once, on the first host of the play.
    known = variables.get_vars(host=hosts[0])
    known["hostvars"] = HostVars(manager, variables, loader)
    return str(Templar(loader=loader, variables=known).template(trust_as_template(text)))


def main(inventories: list[str]) -> int:
    """Command line; see the module's text."""
    init_plugin_loader()
    text = expression()
    json.dump({inventory: problems(inventory, text) for inventory in inventories}, sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

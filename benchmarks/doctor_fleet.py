"""How much longer the doctor takes over sixteen hosts than over one.

The hosts are simulated (fake trees of 8 GPUs, 4 NVSwitches and 8 adapters each) and asked over Ansible's local
connection, so that all probes share the cores of this machine: real hosts have their own. Both sizes run in turn, so
that a slower minute of the machine slows both; the time is that of the whole command.

    python -m benchmarks.doctor_fleet --hosts 16 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.standins import fleet

ROOT = Path(__file__).resolve().parents[1]


def run(inventory: Path, file: Path) -> float:
    """Seconds that the playbook and the report take."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "PYTHONPATH": str(ROOT / "src")}
    play = [programs / "ansible-playbook", "-i", "inventories/common", "-i", inventory, "playbooks/doctor.yml"]
    play += ["-e", f"doctor_file={file}", "-e", "doctor_table=false"]
    report = [sys.executable, "-m", "pdstack.doctor.report", "--json", file]
    began = time.monotonic()
    subprocess.run(play, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    # Its status tells of the hosts.
    subprocess.run(report, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        inventories = {}
        for count in (1, options.hosts):
            root = Path(scratch) / str(count)
            root.mkdir()
            what = {f"g{index:03d}": {"gpus": 8, "nvswitches": 4, "nics": 8} for index in range(count)}
            inventories[count] = fleet.write(root, what)
        taken: dict[int, list[float]] = {count: [] for count in inventories}
        for number in range(options.rounds):
            for count, inventory in inventories.items():
                seconds = run(inventory, inventory.parent / "doctor.json")
                told = json.loads((inventory.parent / "doctor.json").read_text())["hosts"]
                if len(told) != count or any(len(rows) != 51 for rows in told.values()):
                    raise RuntimeError(f"{len(told)} hosts were told of, not {count}")
                taken[count].append(seconds)
            one, many = taken[1][-1], taken[options.hosts][-1]
            print(f"round {number + 1}: 1 host {one:.2f} s, {options.hosts} hosts {many:.2f} s, ratio {many / one:.2f}")
    ratios = [many / one for one, many in zip(taken[1], taken[options.hosts], strict=True)]
    print(
        f"median: 1 host {statistics.median(taken[1]):.2f} s, {options.hosts} hosts "
        f"{statistics.median(taken[options.hosts]):.2f} s; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the Molecule scenarios in the order in which a host is deployed: `python -m tests.molecule [SCENARIO ...]`.

All scenarios share one host. Naming some runs only those; what they build on is converged first, untested, unless the
host of an earlier `--keep` run is still there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.molecule import hostimage

ROOT = Path(__file__).resolve().parents[2]
# Another name gives another host, beside the one of a run that goes on.
HOST = os.environ.get("PDSTACK_MOLECULE_HOST", "pdstack-molecule")
STATE = ROOT / ".pdstack" / f"{HOST}-host"
# Each builds on those before it.
ORDER = (
    "host_tuning",
    "rdma",
    "gpu_driver",
    "gdrcopy",
    "container_engine",
    "nvidia_toolkit",
    "ucx",
    "nixl",
    "images",
    "trtllm_image",
    "service",
    "etcd",
    "nats",
    "model",
    "transfer_agent",
    "kv_path",
    "frontend",
    "worker",
    "verify",
)

# These make the host look like a GPU host by themselves, and no other scenario builds on them.
GPU = ("host_tuning", "rdma", "gpu_driver", "gdrcopy", "nvidia_toolkit", "ucx", "nixl", "trtllm_image")


def run(*command: str, environment: dict[str, str] | None = None) -> None:
    """Run a command in the project's root; a failure ends the program with the command's status."""
    sys.stdout.flush()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **(environment or {})}, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)


def prepare_controller() -> None:
    """Make sure that the controller has a container engine, and the images that the test host is handed."""
    inventories = ("-i", "inventories/common", "-i", "inventories/local")
    run("ansible-playbook", *inventories, "playbooks/hosts.yml", "playbooks/images.yml")


def host_is_up() -> bool:
    """Tell whether the host of an earlier `--keep` run still runs."""
    command = ["docker", "container", "inspect", "--format", "{{.State.Running}}", HOST]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() == "true" and (STATE / "address").is_file()


def scenarios(names: Sequence[str]) -> list[str]:
    """Return Molecule's arguments that select `names`."""
    return [word for name in names for word in ("--scenario-name", name)]


def missing(names: Sequence[str]) -> list[str]:
    """Return what `names` build on and do not contain, in order."""
    last = max(ORDER.index(name) for name in names)
    return [name for name in ORDER[:last] if name not in names and name not in GPU]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="tests.molecule", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(ORDER)}; default: all of them")
    parser.add_argument("--keep", action="store_true", help="leave the host as it is at the end, for the next run")
    options = parser.parse_args(argv)
    if unknown := set(options.scenario) - set(ORDER):
        parser.error(f"found no scenario {', '.join(sorted(unknown))}; wanted some of {', '.join(ORDER)}")
    wanted = [name for name in ORDER if name in options.scenario] or list(ORDER)

    prepare_controller()
    environment = {
        "MOLECULE_GLOB": "tests/molecule/*/molecule.yml",
        "PDSTACK_MOLECULE_HOST": HOST,
        "PDSTACK_MOLECULE_STATE": str(STATE),
        "PDSTACK_MOLECULE_IMAGE": hostimage.build(),
    }
    started = time.monotonic()
    first = missing(wanted)
    try:
        if not host_is_up():
            # Molecule remembers a host that a restart of the engine has taken.
            run("molecule", "destroy", "--scenario-name", "default", environment=environment)
            run("molecule", "create", "--scenario-name", "default", environment=environment)
            if first:
                run("molecule", "converge", *scenarios(first), environment=environment)
        run("molecule", "test", "--destroy", "never", *scenarios(wanted), environment=environment)
    finally:
        if not options.keep:
            run("molecule", "destroy", "--scenario-name", "default", environment=environment)
        print(f"molecule: {time.monotonic() - started:.0f} s for {', '.join(wanted)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

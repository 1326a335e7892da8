"""A cluster on one machine: `python -m tests.lab up | images | exec HOST COMMAND ... | down`.

`up` starts the hosts that `inventories/lab` names; deploy to them with `nox -s deploy -- -i inventories/lab`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.lab import hosts

ROOT = Path(__file__).resolve().parents[2]


def build_and_copy() -> None:
    """Build the images that this tree wants on this machine's engine, and copy them into the hosts."""
    inventories = ("-i", "inventories/common", "-i", "inventories/local")
    subprocess.run(["ansible-playbook", *inventories, "tests/lab/images.yml"], cwd=ROOT, check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="tests.lab", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start the hosts that do not run yet")
    up.add_argument("--hosts", type=int, default=4, help=f"how many, at most {hosts.MOST['']} (default %(default)s)")
    up.add_argument("--bare", action="store_true", help="others, without a container engine (tests/lab/cluster.yml)")
    images = verbs.add_parser("images", help="build the images here and copy them into the hosts, so that none builds")
    images.add_argument("image", nargs="*", help="copy these, which are built; default: those of a deployment")
    run = verbs.add_parser("exec", help="run a command on a host")
    run.add_argument("host", type=int, help="its number")
    run.add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("down", help="remove the hosts and all that they kept")
    options = parser.parse_args(argv)
    started = time.monotonic()
    try:
        if options.verb == "up":
            print("\n".join(hosts.up(options.hosts, hosts.BARE if options.bare else "")))
        elif options.verb == "images":
            if options.image:
                hosts.hand_over(options.image, hosts.running())
            else:
                build_and_copy()
        elif options.verb == "down":
            hosts.down()
        else:
            terminal = ["--tty"] if os.isatty(0) else []
            command = ["docker", "exec", "--interactive", *terminal, hosts.name(options.host)]
            return subprocess.run([*command, *(options.command or ["bash"])], check=False).returncode
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    print(f"lab: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

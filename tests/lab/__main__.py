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

from tests.lab import hosts

IMAGES = ("pdstack/base", "pdstack/etcd", "pdstack/nats", "pdstack/worker")


def built() -> list[str]:
    """Return the images of a deployment that this machine's engine has, the newest tag of each."""
    found = [hosts.docker("images", "--format", "{{.Repository}}:{{.Tag}}", image).split() for image in IMAGES]
    return [names[0] for names in found if names]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="tests.lab", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start the hosts that do not run yet")
    up.add_argument("--hosts", type=int, default=4, help=f"how many, at most {hosts.MOST} (default %(default)s)")
    up.add_argument("--bare", action="store_true", help="without a container engine: the deployment installs it")
    images = verbs.add_parser("images", help="copy built images of this machine into the hosts, so that none builds")
    images.add_argument("image", nargs="*", help="default: the newest of each image of a deployment")
    run = verbs.add_parser("exec", help="run a command on a host")
    run.add_argument("host", type=int, help="its number")
    run.add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("down", help="remove the hosts and all that they kept")
    options = parser.parse_args(argv)
    started = time.monotonic()
    try:
        if options.verb == "up":
            print("\n".join(hosts.up(options.hosts, bare=options.bare)))
        elif options.verb == "images":
            hosts.hand_over(options.image or built(), hosts.running())
        elif options.verb == "down":
            hosts.down()
        else:
            terminal = ["--tty"] if os.isatty(0) else []
            command = ["docker", "exec", "--interactive", *terminal, hosts.name(options.host)]
            return subprocess.run([*command, *(options.command or ["bash"])], check=False).returncode
    except RuntimeError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    print(f"lab: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Copy images from the controller's engine into the test host's: `python -m tests.molecule.handover HOST IMAGE ...`.

Prints the images that were copied, one a line; those that the host has already, or the controller has not, are left.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def has(engine: Sequence[str], image: str) -> bool:
    """Tell whether the engine that `engine` speaks to (a command prefix) has an image."""
    return subprocess.run([*engine, "image", "inspect", image], capture_output=True, check=False).returncode == 0


def hand_over(host: str, images: Sequence[str]) -> list[str]:
    """Copy `images` into the engine of the container `host`; return those that were copied. RuntimeError on failure."""
    here, there = ["docker"], ["docker", "exec", "--interactive", host, "docker"]
    wanted = [image for image in images if has(here, image) and not has(there, image)]
    if wanted:
        # Together, so that what they share crosses once.
        saved = subprocess.Popen([*here, "save", *wanted], stdout=subprocess.PIPE)
        loaded = subprocess.run(
            [*there, "load", "--quiet"], stdin=saved.stdout, capture_output=True, text=True, check=False
        )
        if saved.wait() != 0 or loaded.returncode != 0:
            raise RuntimeError(f"copying {', '.join(wanted)} into {host} failed: {loaded.stderr.strip()}")
    return wanted


if __name__ == "__main__":
    print("\n".join(hand_over(sys.argv[1], sys.argv[2:])))

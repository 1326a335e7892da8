"""`python -m tests.standins.lab_runtime`: build the runtime image of the lab here, and print its reference.

The pdstack images must be here already (they are after `nox -s deploy`). `--repository DIR` only leaves the source
there, as a bare git repository, for a host that builds by itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.standins import dynamo_source, lab_runtime

from pdstack.deploy import image_tag

WHEEL = "tensorrt-llm==1.2.0rc3"
NAME = "pdstack-lab/trtllm-runtime"


def images() -> dict[str, str]:
    """Return the newest pdstack image of each kind that this machine has. SystemExit if one is missing."""
    listed = subprocess.run(
        ["docker", "images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", "reference=pdstack/*"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    found: dict[str, str] = {}
    for image in listed:
        found.setdefault(image.split(":")[0].rpartition("/")[2], image)
    missing = {"worker", "etcd", "nats"} - set(found)
    if missing:
        sys.exit(f"lab_runtime: found no pdstack image {', '.join(sorted(missing))}; wanted all three: nox -s deploy")
    return found


def flags(base: Mapping[str, str], tag: str) -> list[str]:
    """Return the options of container/build.sh."""
    name, _, version = base["worker"].rpartition(":")
    words = ["--framework", "trtllm", "--tensorrtllm-pip-wheel", WHEEL, "--target", "runtime", "--no-tag-latest"]
    words += ["--tag", tag, "--base-image", name, "--base-image-tag", version]
    return [*words, "--build-arg", f"ETCD_IMAGE={base['etcd']}", "--build-arg", f"NATS_IMAGE={base['nats']}"]


def build(tree: Path) -> str:
    """Build the image of the source tree unless it is here, and return its reference."""
    base = images()
    inputs = {"tree": image_tag.tree_digest(tree, exclude=(".git", "build-logs")), "base": base}
    reference = image_tag.reference("pdstack-lab", "trtllm-runtime", inputs)
    here = subprocess.run(["docker", "image", "inspect", reference], capture_output=True, check=False)
    if here.returncode == 0:
        return reference
    # A client of its own time has BuildKit as a part that may be missing; this build needs none of it.
    plugin = subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode == 0
    environment = os.environ | ({} if plugin else {"DOCKER_BUILDKIT": "0"})
    done = subprocess.run(
        ["bash", "container/build.sh", *flags(base, reference)],
        cwd=tree, env=environment, stdout=sys.stderr, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"lab_runtime: container/build.sh ended with {done.returncode}")
    return reference


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="tests.standins.lab_runtime", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repository", type=Path, help="leave the source here and build nothing")
    parser.add_argument("--wheel-flag", choices=dynamo_source.WHEEL_FLAGS, default="honoured")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pdstack-lab-") as folder:
        tree = Path(folder) / "dynamo"
        commit = dynamo_source.make(tree, lab_runtime.fill, options.wheel_flag)
        if options.repository is None:
            print(build(tree))
            return 0
        shutil.rmtree(options.repository, ignore_errors=True)
        dynamo_source.git(
            tree, "clone", "--quiet", "--bare", "--no-local", "--template=", ".", str(options.repository.resolve())
        )
        print(commit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

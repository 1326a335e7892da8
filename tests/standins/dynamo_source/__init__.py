"""A stand-in of Dynamo's source tree, as a git repository with a tag: what the Ansible role trtllm_image checks out.

`container/build.sh` takes upstream's options, runs upstream's two steps, and writes upstream's logs; what it builds
comes from `components` (a directory that the caller fills) and needs no network. The text is the project's own.

`wheel_flag` says how the tree treats `--tensorrtllm-pip-wheel`: "honoured"; "hard-coded" as Dockerfile.trtllm had it
while it was paired with 1.2.0rc2, where the text tells; or "ignored", where only the finished image tells.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
TAG = "v0.7.0.post1"
WHEELS = ("1.2.0rc2", "1.2.0rc3")
WHEEL_FLAGS = ("honoured", "hard-coded", "ignored")
# The URL's form in Dockerfile.trtllm of the time.
HARD_CODED = """\
ARG WHEEL_URL=https://pypi.nvidia.com/tensorrt-llm/tensorrt_llm-1.2.0rc2-cp312-cp312-linux_x86_64.whl
COPY ["container/wheels/tensorrt-llm==1.2.0rc2/", "/opt/dynamo/site-packages/"]
"""


def git(tree: Path, *arguments: str) -> str:
    """Run git in `tree` with an identity of its own; CalledProcessError when it fails."""
    identity = ("-c", "user.name=stand-in", "-c", "user.email=stand-in@example.org", "-c", "commit.gpgsign=false")
    # All of one time, so that the same files are the same commit.
    dates = {"GIT_AUTHOR_DATE": "2025-11-26T00:00:00Z", "GIT_COMMITTER_DATE": "2025-11-26T00:00:00Z"}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=tree, env=os.environ | dates, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def wheel(folder: Path, version: str) -> None:
    """Write what installing TensorRT-LLM's wheel adds to the components: its version, twice, as in real life."""
    package, info = folder / "tensorrt_llm", folder / f"tensorrt_llm-{version}.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "version.py").write_text(f'__version__ = "{version}"\n')
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n")


def make(root: Path, components: Callable[[Path], None] | None = None, wheel_flag: str = "honoured") -> str:
    """Make the repository in `root` (replaced) and return its commit. `components` fills a directory for the image."""
    if wheel_flag not in WHEEL_FLAGS:
        raise ValueError(f"wheel_flag: found {wheel_flag!r}, wanted one of {', '.join(WHEEL_FLAGS)}")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(HERE / "container", root / "container")
    for version in WHEELS:
        wheel(root / "container/wheels" / f"tensorrt-llm=={version}", version)
    dockerfile, script = root / "container/Dockerfile.trtllm", root / "container/build.sh"
    if wheel_flag == "hard-coded":
        honest = next(line for line in dockerfile.read_text().splitlines(keepends=True) if "PIP_WHEEL}/" in line)
        dockerfile.write_text(dockerfile.read_text().replace(honest, HARD_CODED))
    if wheel_flag == "ignored":
        passed = '"TENSORRTLLM_PIP_WHEEL=$TENSORRTLLM_PIP_WHEEL"'
        script.write_text(script.read_text().replace(passed, '"TENSORRTLLM_PIP_WHEEL=tensorrt-llm==1.2.0rc2"'))
    (root / "components").mkdir()
    if components is not None:
        components(root / "components")
    (root / "components/workspace").mkdir(parents=True, exist_ok=True)
    (root / "components/workspace/README.md").write_text("A stand-in of Dynamo's workspace.\n")
    git(root, "init", "--quiet", "--initial-branch", "main")
    git(root, "add", "--all", "--force")
    git(root, "commit", "--quiet", "--message", "A stand-in of Dynamo's source tree")
    git(root, "tag", TAG)
    return git(root, "rev-parse", "HEAD")

"""What goes into the lab's runtime image: everything of `dynamo.trtllm` real, TensorRT-LLM's engine a stand-in.

The image is built from tests/standins/dynamo_source, so by upstream's build interface. See README.md.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What the worker image leaves out of the wheels and the runtime image needs, from the same wheels.
PARTS = ("dynamo/trtllm", "dynamo/nixl_connect")
SITE = "opt/dynamo/site-packages"


def packages() -> Path:
    """Return the site-packages of the interpreter that runs this, which has ai-dynamo. RuntimeError without."""
    found = importlib.util.find_spec("dynamo.trtllm")
    if found is None or found.origin is None:
        raise RuntimeError("ai-dynamo is not installed here; run this in the project's development environment")
    return Path(found.origin).parents[2]


def fill(target: Path) -> None:
    """Write the files of the image, but for TensorRT-LLM's version, below `target`."""
    source = packages()
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "tests")
    shutil.copytree(HERE / "rootfs", target, dirs_exist_ok=True)
    shutil.copytree(HERE / "site", target / SITE, dirs_exist_ok=True, ignore=ignored)
    # The wheel brings it: tests/standins/dynamo_source.
    (target / SITE / "tensorrt_llm/version.py").unlink()
    for part in PARTS:
        shutil.copytree(source / part, target / SITE / part, ignore=ignored)
    # Its compiled part is for one Python; the rest is for all.
    shutil.copytree(source / "yaml", target / SITE / "yaml", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (target / "opt/dynamo/libexec").mkdir(parents=True)
    shutil.copy2(source / "libucx/bin/ucx_info", target / "opt/dynamo/libexec/ucx_info")
    (target / "opt/dynamo/libexec/ucx_info").chmod(0o755)
    (target / "home/dynamo").mkdir(parents=True)
    (target / "home/dynamo/.profile").write_text("")

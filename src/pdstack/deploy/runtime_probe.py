"""What is in a runtime image, read inside it: `docker run -i --entrypoint python3 IMAGE - < runtime_probe.py`.

Prints one JSON object, imports nothing of what it looks at: `import tensorrt_llm` needs a GPU driver, which a build
host may lack, and half a minute. So its version is read out of version.py, which is where `__version__` comes from.
Standard library only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Where upstream's image has them, before the Python packages' own copies.
LIBRARY_PLACES = ("/opt/nvidia/nvda_nixl", "/usr/local/lib")
VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)+")
SYMBOL = re.compile(r"\bU\s+(_Z\w*nixlDescList\w*)")
DEFINED = re.compile(r"\b[TWVBDR]\s+(_Z\w*nixlDescList\w*)")


def distribution(name: str) -> str:
    """Return the version of an installed distribution, or nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def module_version(name: str) -> str:
    """Return the `__version__` that a package's source says, or nothing."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ""
    for folder in (found.submodule_search_locations or []) if found else []:
        for file in (Path(folder) / "version.py", Path(folder) / "__init__.py"):
            match = VERSION.search(file.read_text(errors="replace")) if file.is_file() else None
            if match:
                return match[1]
    return ""


def output(*command: str) -> str:
    """Return what a command prints, or nothing where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def program_version(*command: str) -> str:
    """Return the first thing in a command's output that looks like a version."""
    match = NUMBER.search(output(*command))
    return match[0] if match else ""


def nixl_packages() -> dict[str, str]:
    """Return name -> version of every distribution of NIXL."""
    found = {}
    for each in importlib.metadata.distributions():
        name = (each.metadata["Name"] or "").lower().replace("_", "-")
        if re.fullmatch(r"nixl(-cu\d+)?", name):
            found[name] = each.version
    return found


def library_roots() -> list[Path]:
    """Return the directories in which NIXL's libraries may lie."""
    named = os.environ.get("NIXL_LIB_DIR", "")
    places = [Path(place) for place in (*LIBRARY_PLACES, named) if place]
    spec = importlib.util.find_spec("tensorrt_llm")
    places += [Path(folder) for folder in (spec.submodule_search_locations or []) if spec] if spec else []
    return [place for place in places if place.is_dir()]


def nixl_abi() -> dict[str, object]:
    """Compare what TensorRT-LLM's NIXL wrapper asks for with what the copies of libnixl have, if nm is there."""
    roots = library_roots()
    copies = sorted({path for root in roots for path in root.rglob("libnixl.so*") if not path.is_symlink()})
    wrappers = sorted({path for root in roots for path in root.rglob("libtensorrt_llm_nixl_wrapper.so")})
    facts: dict[str, object] = {"copies": [str(path) for path in copies], "wrappers": [str(path) for path in wrappers]}
    if shutil.which("nm") and copies and wrappers:
        wanted = {name for path in wrappers for name in SYMBOL.findall(output("nm", "-D", str(path)))}
        known = {name for path in copies for name in DEFINED.findall(output("nm", "-D", str(path)))}
        facts["missing"] = sorted(wanted - known)
    return facts


def main() -> None:
    """Print the facts."""
    facts = {
        "python": platform.python_version(),
        "tensorrt_llm": {"module": module_version("tensorrt_llm"), "distribution": distribution("tensorrt-llm")},
        "dynamo": distribution("ai-dynamo"),
        "nixl": nixl_packages(),
        "nixl_abi": nixl_abi(),
        "ucx": program_version("ucx_info", "-v"),
        "etcd": program_version("etcd", "--version"),
        "nats": program_version("nats-server", "--version"),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("TRTLLM_")},
        "uid": os.getuid(),
    }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()

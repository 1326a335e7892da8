"""What the NIXL at the given place is, as JSON: its version, its UCX's, its plugins, whether the UCX plugin loads."""

import ctypes
import json
import sys
from pathlib import Path


def ucx_version(root: Path) -> str:
    """Ask the UCX beside NIXL for its version; what keeps it from loading is the answer otherwise."""
    try:
        # By its own name: it finds its neighbours by where it lies.
        ask = ctypes.CDLL(str((root / "ucx" / "libucp.so.0").resolve())).ucp_get_version_string
    except OSError as error:
        return str(error)
    ask.restype = ctypes.c_char_p
    return ask().decode()


def obstacle(plugin: Path) -> str:
    """Say what keeps a plugin from being loaded; nothing when it can be."""
    try:
        # The entry that NIXL calls. Loading brings in all that the plugin needs.
        found = getattr(ctypes.CDLL(str(plugin)), "nixl_plugin_init", None)
    except OSError as error:
        return str(error)
    return "" if found else "it has no nixl_plugin_init"


def main() -> None:
    """Print what is found below the directory that the first argument names."""
    root = Path(sys.argv[1])
    plugins = {path.name[len("libplugin_") : -len(".so")]: path for path in root.glob(".*.libs/plugins/libplugin_*.so")}
    found = {
        "version": (root / "VERSION").read_text().strip(),
        "ucx": ucx_version(root),
        "plugins": sorted(plugins),
        "plugin": obstacle(plugins["UCX"]) if "UCX" in plugins else "there is no libplugin_UCX.so",
    }
    sys.stdout.write(json.dumps(found) + "\n")


main()

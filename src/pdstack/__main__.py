"""The console command: ``pdstack kv-path ...``, or ``python -m pdstack kv-path ...``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

# By name, and imported only when asked for: each needs other libraries.
COMMANDS = {"kv-path": ("pdstack.transfer.qualify.__main__", "measure how KV gets from prefill to decode workers")}


def main(words: list[str] | None = None) -> int:
    """Run a command with the words after it and return its exit code; 2 without a known command."""
    given = sys.argv[1:] if words is None else words
    if not given or given[0] not in COMMANDS:
        lines = ["usage: pdstack COMMAND ... (COMMAND --help says more)", ""]
        lines += [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
        sys.stderr.write("\n".join(lines) + "\n")
        return 0 if given[:1] in (["-h"], ["--help"]) else 2
    run: Callable[[list[str]], int] = import_module(COMMANDS[given[0]][0]).main
    return run(given[1:])


if __name__ == "__main__":
    sys.exit(main())

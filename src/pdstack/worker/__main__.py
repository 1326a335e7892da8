"""`python -m pdstack.worker --config FILE`.

Exit code 0 after a signal, 1 when it cannot run or cannot use Dynamo any more, 2 for a bad configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pdstack.transfer.errors import TransferError
from pdstack.worker.config import ConfigError, WorkerConfig, load
from pdstack.worker.dynamo_link import set_environment

log = logging.getLogger("pdstack.worker")

EXIT_FAILED = 1
EXIT_CONFIG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the worker, return its exit code."""
    parser = argparse.ArgumentParser(prog="pdstack.worker", description="A Dynamo worker.")
    parser.add_argument("--config", type=Path, required=True, help="the JSON file that says all about this worker")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=os.environ.get("PDSTACK_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        config = load(options.config)
    except ConfigError as error:
        sys.stderr.write(f"pdstack.worker: {error}\n")
        return EXIT_CONFIG
    set_environment(config.etcd_endpoints, config.nats_server)
    # Not asyncio.run, whose end cancels what Dynamo still streams: a cancelled stream ends with an error, a broken one
    # goes on on another worker.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(_run(config))
    except (OSError, ValueError, RuntimeError, TransferError) as error:
        # Model, cluster key, backend or port: the text says all. The traceback is there with PDSTACK_LOG=DEBUG.
        log.error("worker %s cannot run: %s: %s", config.name, type(error).__name__, error)
        log.debug("traceback", exc_info=True)
        return EXIT_FAILED


async def _run(config: WorkerConfig) -> int:
    # Imported late: the engine's libraries read the environment too.
    from pdstack.worker.app import Worker

    return await Worker(config).run()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of Rust and UCX are still there; their destructors race with the interpreter, and the loser gets SIGSEGV.
    os._exit(code)

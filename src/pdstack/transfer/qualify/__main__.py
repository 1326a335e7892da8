"""Measure the KV path of every prefill and decode pair, and fail if one is slow, wrong, or on another transport."""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

from pdstack.transfer.backends import BACKENDS
from pdstack.transfer.errors import AuthenticationFailed
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.paths import AUTO
from pdstack.transfer.paths import PATHS as OWN_PATHS
from pdstack.transfer.paths.base import GPU_PATHS, ORDER
from pdstack.transfer.qualify.control import Wish, qualify
from pdstack.transfer.qualify.ends import EndFailed
from pdstack.transfer.qualify.gpu import GRANULE
from pdstack.transfer.qualify.measure import PATHS
from pdstack.transfer.qualify.model import block_bytes
from pdstack.transfer.qualify.order import MARGIN
from pdstack.transfer.qualify.page import page
from pdstack.transfer.qualify.places import Place, local, read_places
from pdstack.transfer.qualify.result import (
    Demand,
    document,
    doubtful,
    judge,
    load,
    problem_lines,
    regressions,
    table,
)
from pdstack.transfer.roles import Role

_PAGE = 4096
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def nbytes(text: str) -> int:
    """A number of bytes: 4096, 4K, 2M, 1G."""
    found = re.fullmatch(r"(\d+)([KMG]?)(?:iB)?", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, wanted the form 4096, 32K or 2M")
    return int(found[1]) << _UNITS[found[2]]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pdstack kv-path", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--local", action="store_true", help="start all agents on this machine")
    where.add_argument("--agents", type=Path, metavar="FILE", help="JSON: where each agent is, or what starts it")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="cluster key, for agents behind ports")
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill agents of --local (default 1)")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode agents of --local (default 1)")
    parser.add_argument(
        "--path",
        choices=(AUTO, *PATHS),
        default=AUTO,
        help="the path that will be used; auto measures all and takes, as the agents do, the first that works of "
        f"{', '.join(ORDER)}, or one that is {MARGIN:g} times as fast (default auto)",
    )
    parser.add_argument(
        "--backend",
        choices=(*BACKENDS, "both", "none"),
        default="both",
        help="with auto: the backend; both: measure the libraries too, but take none (default both)",
    )
    parser.add_argument(
        "--memory",
        choices=("host", "gpu"),
        default="host",
        help="where the KV pools lie; gpu: auto measures cuda_ipc and staged, memcpy is a copy within decode's GPU",
    )
    what = parser.add_mutually_exclusive_group()
    sizes = [4 << 10, 32 << 10, 128 << 10, 2 << 20]
    what.add_argument(
        "--sizes", type=nbytes, nargs="+", default=sizes, help="block sizes of the model (default 4K 32K 128K 2M)"
    )
    what.add_argument("--model", type=Path, metavar="DIR", help="the model to be served: its own block sizes")
    parser.add_argument(
        "--block-tokens", type=int, nargs="+", default=[16], metavar="N", help="with --model (default 16)"
    )
    parser.add_argument("--bytes", type=nbytes, default=32 << 20, help="bytes of one read, at least (default 32M)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds for each block size (default 5)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one path of one pair (default 60)")
    parser.add_argument("--floor", type=float, help="least ratio to the limit (memcpy, or a plain TCP stream)")
    parser.add_argument(
        "--want",
        nargs="+",
        default=[],
        help="KV must go over one of these transports, such as shared, cma, stream, tcp or rc_mlx5",
    )
    parser.add_argument("--json", type=Path, help="write the result, for --compare")
    parser.add_argument("--html", type=Path, help="write the result as a page")
    parser.add_argument("--compare", type=Path, help="an earlier JSON (- for standard input)")
    parser.add_argument("--regression", type=float, default=0.2, help="how much worse is worse (default 0.2)")
    return parser


def main(words: list[str] | None = None) -> int:
    """0: all pairs hold. 1: one does not, or cannot be measured. 2: the command line is wrong."""
    parser = arguments()
    options = parser.parse_args(words)
    if min(options.prefill, options.decode, options.rounds) < 1:
        parser.error("--prefill, --decode and --rounds must be at least 1")
    try:
        earlier = load(options.compare) if options.compare else None
        places = read_places(options.agents) if options.agents else _local(options.prefill, options.decode)
        key = ClusterKey.from_file(options.key_file) if options.key_file else None
        sizes = (
            [block_bytes(options.model, tokens) for tokens in options.block_tokens] if options.model else options.sizes
        )
    except (ValueError, AuthenticationFailed) as error:
        parser.error(str(error))
    if options.model:
        # Some blocks of any model; what the engine can serve is a multiple of 8 bytes.
        options.bytes = max(options.bytes, -(-8 * max(sizes) // _PAGE) * _PAGE)
    if options.bytes % _PAGE or any(size < 8 or size % 8 or size > options.bytes for size in sizes):
        parser.error(f"--bytes must be a multiple of {_PAGE}, and --sizes multiples of 8 that are not larger")
    paths: tuple[str, ...] = (options.path,)
    gpu = options.memory == "gpu"
    if options.path != AUTO and gpu != (options.path in GPU_PATHS):
        parser.error(f"--path {options.path} is not one of --memory {options.memory}")
    if gpu and any(size % GRANULE for size in sizes):
        parser.error(f"--sizes must be multiples of {GRANULE} with --memory gpu")
    if options.path == AUTO and gpu:
        paths = GPU_PATHS
    elif options.path == AUTO:
        paths = OWN_PATHS + {"both": BACKENDS, "none": ()}.get(options.backend, (options.backend,))
    wish = Wish(paths, tuple(sorted(set(sizes))), options.bytes, options.rounds, options.timeout)
    backend = options.backend if options.backend in BACKENDS else ""
    demand = Demand(options.path, options.floor, tuple(options.want), backend)

    def progress(line: str) -> None:
        sys.stderr.write(line + "\n")

    try:
        again = partial(doubtful, demand=demand)
        found = qualify(
            places[Role.PREFILL], places[Role.DECODE], wish, progress=progress, again=again, cluster_key=key
        )
    except EndFailed as error:
        sys.stderr.write(f"the KV path cannot be measured: {error}\n")
        return 1
    verdicts = [judge(pair, demand) for pair in found]
    result = document(verdicts, wish, demand)
    worse = regressions(earlier, result, options.regression) if earlier else []
    twice = sum(pair.first is not None for pair in found)
    note = [f"{twice} of {len(found)} pairs were below the floor and measured again; the better one counts"]
    lines = [*table(verdicts), *(note if twice else ()), *problem_lines(verdicts)]
    sys.stdout.write("\n".join([*lines, *(f"worse: {line}" for line in worse)]) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.html:
        options.html.write_text(page(result, lines, worse))
    return int(any(verdict.problems for verdict in verdicts))


def _local(prefill: int, decode: int) -> dict[Role, list[Place]]:
    counts = {Role.PREFILL: prefill, Role.DECODE: decode}
    return {role: [local(role, number) for number in range(count)] for role, count in counts.items()}


if __name__ == "__main__":
    sys.exit(main())

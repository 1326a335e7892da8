"""What a qualification found against what was wanted: verdicts, the table, the JSON, and what changed since."""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pdstack.transfer.paths import AUTO, BACKEND
from pdstack.transfer.qualify.causes import Cause, Question, causes
from pdstack.transfer.qualify.control import PairFound, Wish
from pdstack.transfer.qualify.measure import Measured, Size, Spread
from pdstack.transfer.qualify.order import order, unusual

FORMAT = "pdstack kv path/1"
_PACKAGES = ("pdstack", "numpy", "xxhash", "nixl-cu12", "libucx-cu12")


@dataclass(frozen=True)
class Demand:
    """What must hold for each pair. `path` is the one that will be used; "auto" is the best of :mod:`order`.

    `floor` is the least ratio to the limit, at every block size; KV has to go over one of the transports `want`, if
    there are any. `backend` is the library that ``auto`` may take beside the own paths ("": none).
    """

    path: str = AUTO
    floor: float | None = None
    want: tuple[str, ...] = ()
    backend: str = ""


@dataclass(frozen=True)
class Problem:
    """A pair that does not hold, with why and what to do, as far as its surroundings tell."""

    pair: str
    found: str
    wanted: str
    causes: tuple[Cause, ...]


@dataclass(frozen=True)
class Verdict:
    """One pair, judged. `limit` names its yardstick: memcpy within a host's network namespace, else a plain stream.

    `order` is how agents with ``auto`` shall try the paths, the backend's under that name.
    """

    found: PairFound
    chosen: Measured | None
    limit: str
    fastest: tuple[str, ...]
    order: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def pair(self) -> str:
        """Its name."""
        return f"{self.found.prefill} > {self.found.decode}"

    def worst(self) -> float | None:
        """The chosen path's smallest ratio to the limit over all block sizes."""
        return None if self.chosen is None else worst(self.chosen, self.limit)

    def slowest(self) -> Size | None:
        """What the chosen path did at that block size."""
        sizes = () if self.chosen is None else self.chosen.sizes
        return min(sizes, key=lambda size: size.ratios[self.limit].median, default=None)


def worst(measured: Measured, limit: str) -> float:
    """The smallest median ratio to `limit` over all block sizes."""
    return min((size.ratios[limit].median for size in measured.sizes), default=0.0)


def judge(pair: PairFound, demand: Demand) -> Verdict:
    """What is used, what is fastest (by the time for one read of each block size), and what does not hold.

    Of a pair that was measured twice the better one counts, unless the second brought a wrong byte.
    """
    verdict = _judged(pair, demand)
    if pair.first is None or any(one.wrong for one in pair.paths):
        return verdict
    return max(verdict, _judged(pair.first, demand), key=lambda one: one.worst() or 0.0)


def doubtful(pair: PairFound, demand: Demand) -> bool:
    """True for a pair that is below the floor and has no other fault: a busy moment does that, so measure it again."""
    verdict = _judged(pair, demand)
    ratio = verdict.worst()
    slow = demand.floor is not None and ratio is not None and ratio < demand.floor
    return slow and len(verdict.problems) == 1


def _judged(pair: PairFound, demand: Demand) -> Verdict:
    limit = "memcpy" if pair.one_host and not _apart(pair) else "socket"
    usable = {one.path: one for one in pair.paths if one.usable}
    seconds = {path: _seconds(one) for path, one in usable.items()}
    names = {path: BACKEND if path == demand.backend else path for path in usable}
    best = order({name: seconds[path] for path, name in names.items()})
    wanted = best[:1] if demand.path == AUTO else (demand.path,)
    chosen = next((usable[path] for path, name in names.items() if {path, name} & set(wanted)), None)
    fastest = tuple(sorted(usable, key=seconds.__getitem__))
    return Verdict(pair, chosen, limit, fastest, best, tuple(_problems(pair, chosen, limit, demand)))


def _apart(pair: PairFound) -> bool:
    """True for network namespaces that differ: of one host or not, what goes between them goes over a network."""
    mine, theirs = (facts.namespaces.get("net") for facts in (pair.prefill_facts, pair.decode_facts))
    return mine is not None and theirs is not None and mine != theirs


def _seconds(one: Measured) -> Spread:
    """Of one read of each block size."""

    def at(speed: Callable[[Spread], float]) -> float:
        return sum(size.nbytes / speed(size.gbps) / 1e9 for size in one.sizes)

    return Spread(at(lambda gbps: gbps.median), at(lambda gbps: gbps.high), at(lambda gbps: gbps.low))


def _problems(pair: PairFound, chosen: Measured | None, limit: str, demand: Demand) -> Iterator[Problem]:
    name = f"{pair.prefill} > {pair.decode}"

    def why(wanted: str, found: str) -> tuple[Cause, ...]:
        return tuple(causes(Question(pair.prefill_facts, pair.decode_facts, wanted, found)))

    for one in pair.paths:
        if one.wrong:
            fix = "do not serve with it: check memory (rasdaemon) and the versions of kernel, driver and UCX"
            evidence = "every byte was compared with what prefill had written"
            found = f"{one.wrong} blocks came wrong, or were written unasked, over {one.path}"
            yield Problem(name, found, "prefill's bytes, and no others", (Cause("wrong bytes", evidence, fix),))
    errors = [Cause(f"{one.path} cannot be used", one.error, "as it says") for one in pair.paths if one.error]
    if chosen is None:
        wanted = demand.want or ((demand.path,) if demand.path != AUTO else ("",))
        reasons = dict.fromkeys(cause for transport in wanted for cause in why(transport, ""))
        yield Problem(name, "no path works", f"path {demand.path}", (*errors, *reasons))
        return
    transport = chosen.transport
    if demand.want and transport not in demand.want:
        mine = [cause for cause in errors if cause.name.split()[0] in demand.want]
        reasons = dict.fromkeys(cause for wanted in demand.want for cause in why(wanted, transport))
        found = f"{transport} (path {chosen.path}) carries KV"
        yield Problem(name, found, " or ".join(demand.want), (*mine, *reasons))
    if demand.floor is not None and (ratio := worst(chosen, limit)) < demand.floor:
        slow = min(chosen.sizes, key=lambda size: size.ratios[limit].median)
        found = (
            f"{ratio:.2f} of {limit} over {chosen.path} with blocks of {size_text(slow.block_bytes)} "
            f"({slow.gbps.median:.2f} of {slow.limits[limit].median:.2f} GB/s)"
        )
        yield Problem(name, found, f"at least {demand.floor:.2f}", why(transport, transport))


def size_text(nbytes: int) -> str:
    """A number of bytes for people."""
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << bits:
            return f"{nbytes / (1 << bits):g} {unit}"
    return f"{nbytes} bytes"


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """All pairs and paths; a star marks what is used."""
    sizes = sorted({size.block_bytes for verdict in verdicts for one in verdict.found.paths for size in one.sizes})
    head = f"{'pair':<24} {'path':<8} {'transport':<10} {'limit':<7}"
    lines = ["".join([head, *(f" {size_text(size):>16}" for size in sizes)]), ""]
    for verdict in verdicts:
        name = verdict.pair
        for one in verdict.found.paths:
            star = "*" if one is verdict.chosen else " "
            text = f"{name:<24}{star}{one.path:<8} "
            name = ""
            if one.error is not None:
                lines.append(f"{text}cannot be used: {one.error}")
                continue
            if one.wrong:
                lines.append(f"{text}WRONG BYTES in {one.wrong} blocks")
                continue
            cells = {size.block_bytes: _cell(size, verdict.limit) for size in one.sizes}
            text += f"{one.transport:<10} {verdict.limit:<7}"
            lines.append("".join([text, *(f" {cells.get(size, ''):>16}" for size in sizes)]))
    for names, number in Counter(verdict.fastest for verdict in verdicts if verdict.fastest).items():
        lines.append(f"fastest first, in {number} of {len(verdicts)} pairs: {', '.join(names)}")
    lines[1] = "each: ratio to the limit in the same rounds, and GB/s (medians); * is what is used"
    return lines


def _cell(size: Size, limit: str) -> str:
    return f"{size.ratios[limit].median:.2f} ({size.gbps.median:.2f})"


def problem_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Each problem as the operator needs it: pair, found, wanted, cause, fix."""
    lines = []
    for problem in (problem for verdict in verdicts for problem in verdict.problems):
        lines.append(f"FAILED {problem.pair}: found {problem.found}; wanted {problem.wanted}")
        for cause in problem.causes:
            lines += [f"  cause: {cause.name}: {cause.evidence}", f"  fix:   {cause.fix}"]
        if not problem.causes:
            lines += [
                "  cause: none of the known ones was found on these hosts",
                "  fix:   compare with an earlier result (--compare), and read what UCX says with UCX_LOG_LEVEL=info",
            ]
    return lines


def document(verdicts: Sequence[Verdict], wish: Wish, demand: Demand) -> dict[str, Any]:
    """The whole result as JSON; `format` says what a later version has to understand."""
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "measured": asdict(wish),
        "demand": asdict(demand),
        "pairs": [
            {
                "prefill": verdict.found.prefill,
                "decode": verdict.found.decode,
                "one_host": verdict.found.one_host,
                "limit": verdict.limit,
                "chosen": verdict.chosen.path if verdict.chosen else None,
                "transport": verdict.chosen.transport if verdict.chosen else None,
                "worst_ratio": verdict.worst(),
                "worst_gbps": slowest.gbps.median if (slowest := verdict.slowest()) else None,
                # For worker.json; empty where agents find it by themselves.
                "order": list(verdict.order) if unusual(verdict.order) else [],
                "fastest_first": list(verdict.fastest),
                "paths": [_path(one) for one in verdict.found.paths],
                "problems": [asdict(problem) for problem in verdict.problems],
                "prefill_facts": verdict.found.prefill_facts.as_json(),
                "decode_facts": verdict.found.decode_facts.as_json(),
            }
            for verdict in verdicts
        ],
    }


def _path(one: Measured) -> dict[str, Any]:
    found = asdict(one)
    for size in found["sizes"]:
        size["gbps"] = size["gbps"]._asdict()
        for field in ("ratios", "limits"):
            size[field] = {name: spread._asdict() for name, spread in size[field].items()}
    return found


def versions() -> dict[str, str]:
    """What the result may depend on."""
    found = {"kernel": platform.release(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def load(file: Path) -> dict[str, Any]:
    """An earlier result, "-" for that on standard input. Raises ValueError, saying what is wrong with the file."""
    try:
        found: dict[str, Any] = json.loads(sys.stdin.read() if str(file) == "-" else file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be compared with: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{file} is not of the format {FORMAT!r}: measure with this version and compare from then on")
    return found


def regressions(earlier: dict[str, Any], now: dict[str, Any], threshold: float) -> list[str]:
    """What is worse than it was: ratios down by more than `threshold` (0.2 is a fifth), lost paths, other transports.

    Ratios are compared and not GB/s, so that a host that is slower today is not taken for a worse path.
    """
    lines = []
    before = {(pair["prefill"], pair["decode"]): pair for pair in earlier["pairs"]}
    for pair in now["pairs"]:
        old = before.get((pair["prefill"], pair["decode"]))
        if old is None:
            continue
        name = f"{pair['prefill']} > {pair['decode']}"
        if old["transport"] != pair["transport"]:
            lines.append(f"{name}: KV went over {old['transport']}, now over {pair['transport']}")
        paths = {one["path"]: one for one in old["paths"]}
        for one in pair["paths"]:
            was = paths.get(one["path"])
            if was is None or was["error"] or was["wrong"]:
                continue
            if one["error"]:
                lines.append(f"{name}: {one['path']} worked, now it does not: {one['error']}")
                continue
            sizes = {size["block_bytes"]: size for size in was["sizes"]}
            for size in one["sizes"]:
                if size["block_bytes"] not in sizes:
                    continue
                then = sizes[size["block_bytes"]]["ratios"].get(pair["limit"], {}).get("median")
                ratio = size["ratios"][pair["limit"]]["median"]
                if then and ratio < then * (1 - threshold):
                    lines.append(
                        f"{name}: {one['path']} with blocks of {size_text(size['block_bytes'])} had {then:.2f} of "
                        f"{pair['limit']}, now {ratio:.2f}"
                    )
    return lines + _changed(earlier["versions"], now["versions"]) if lines else []


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    changed = [f"{name} {before.get(name, 'unknown')} -> {value}" for name, value in now.items()]
    changed = [text for text, name in zip(changed, now, strict=True) if before.get(name) != now[name]]
    return [f"changed since: {', '.join(changed) or 'none of the versions that are recorded'}"]

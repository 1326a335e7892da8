"""Verdicts, the table, the JSON with its comparison, and the page."""

from __future__ import annotations

import copy
import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pdstack.transfer.qualify.control import PairFound, Wish
from pdstack.transfer.qualify.facts import Facts
from pdstack.transfer.qualify.measure import Measured, Size, Spread
from pdstack.transfer.qualify.page import page
from pdstack.transfer.qualify.result import (
    Demand,
    Verdict,
    document,
    doubtful,
    judge,
    load,
    problem_lines,
    regressions,
    table,
)

FACTS = Facts(host="a", boot="b1", cores=8, load=0.1, namespaces={"pid": 1, "net": 3}, readv="ok")
WISH = Wish(("shared", "cma", "stream"), (4096, 32768), 1 << 20, 3, 10)
K = 1 << 10


def size(block: int, ratio: float, gbps: float = 5.0) -> Size:
    near = Spread(ratio, ratio * 0.9, ratio * 1.1)
    half = Spread(ratio * 4, ratio * 3, ratio * 5)
    return Size(
        block,
        1 << 20,
        9,
        Spread(gbps, gbps, gbps),
        {"memcpy": near, "socket": half},
        {"memcpy": Spread(gbps / ratio, 1, 99), "socket": Spread(gbps / ratio / 4, 1, 99)},
    )


def path(name: str, *ratios: float, gbps: float = 5.0, transport: str = "") -> Measured:
    sizes = tuple(size(4 * K << 3 * n, ratio, gbps) for n, ratio in enumerate(ratios))
    return Measured(name, transport or name, "", 0, None, sizes)


def pair(*paths: Measured, one_host: bool = True, decode: Facts = FACTS, names: str = "00") -> PairFound:
    return PairFound(f"prefill-{names[0]}", f"decode-{names[1]}", one_host, paths, FACTS, decode)


SHARED, CMA = path("shared", 0.6, 0.9), path("cma", 0.5, 0.95, gbps=5.4)
BROKEN = Measured("shared", error="the socket cannot be opened (read_failed)")


def test_the_first_usable_path_is_used_and_the_fastest_is_told() -> None:
    verdict = judge(pair(SHARED, CMA), Demand())
    assert verdict.chosen is SHARED and verdict.fastest == ("cma", "shared") and not verdict.problems
    assert verdict.worst() == 0.6 and verdict.limit == "memcpy"


def test_a_path_that_is_clearly_faster_is_used_and_told_to_the_agents() -> None:
    fast = path("cma", 0.9, 0.95, gbps=7.0)
    verdict = judge(pair(SHARED, fast), Demand())
    assert verdict.chosen is fast and verdict.order == ("cma", "shared")
    usual = judge(pair(SHARED, CMA), Demand())
    found = [one["order"] for one in document([verdict, usual], WISH, Demand())["pairs"]]
    assert found == [["cma", "shared"], []]


def test_auto_takes_the_configured_backend_alone() -> None:
    ucx, nixl = path("ucx", 0.9, transport="cma", gbps=8.0), path("nixl", 0.9, transport="cma", gbps=9.0)
    verdict = judge(pair(SHARED, ucx, nixl), Demand(backend="ucx"))
    assert verdict.chosen is ucx and verdict.order == ("backend", "shared")
    assert judge(pair(SHARED, ucx, nixl), Demand()).chosen is SHARED


def test_one_of_several_transports_is_enough() -> None:
    assert judge(pair(SHARED), Demand(want=("cma", "shared"))).problems == ()
    (problem,) = judge(pair(path("stream", 0.9)), Demand(want=("cma", "shared"))).problems
    assert (problem.found, problem.wanted) == ("stream (path stream) carries KV", "cma or shared")


def test_auto_takes_no_backend_unless_one_is_named() -> None:
    ucx = path("ucx", 0.9, transport="cma")
    assert judge(pair(BROKEN, ucx), Demand()).problems[0].found == "no path works"
    assert judge(pair(ucx), Demand(path="ucx", want=("cma",))).problems == ()


def test_between_hosts_the_plain_stream_is_the_limit() -> None:
    verdict = judge(pair(path("stream", 0.25), one_host=False), Demand(floor=0.9))
    assert verdict.limit == "socket" and verdict.worst() == 1.0 and not verdict.problems


def test_between_network_namespaces_of_one_host_too() -> None:
    apart = dataclasses.replace(FACTS, namespaces={"pid": 1, "net": 4})
    assert judge(pair(path("stream", 0.25), decode=apart), Demand()).limit == "socket"


def test_another_path_is_used_where_the_first_refuses_and_a_wish_tells_why() -> None:
    assert judge(pair(BROKEN, CMA), Demand()).problems == ()
    elsewhere = dataclasses.replace(FACTS, namespaces={"pid": 1, "net": 4})
    verdict = judge(pair(BROKEN, CMA, decode=elsewhere), Demand(want=("shared",)))
    (problem,) = verdict.problems
    assert (problem.found, problem.wanted) == ("cma (path cma) carries KV", "shared")
    assert [cause.name for cause in problem.causes] == ["shared cannot be used", "net namespace"]


def test_below_the_floor_at_one_block_size_is_a_problem() -> None:
    assert judge(pair(SHARED), Demand(floor=0.6)).problems == ()
    (problem,) = judge(pair(SHARED), Demand(floor=0.61)).problems
    assert problem.found.startswith("0.60 of memcpy over shared with blocks of 4 KiB (5.00 of 8.33 GB/s)")
    assert problem.wanted == "at least 0.61" and problem.causes == ()


def test_only_a_pair_that_is_merely_slow_is_measured_again() -> None:
    wrong = dataclasses.replace(CMA, wrong=3, sizes=())
    assert doubtful(pair(SHARED), Demand(floor=0.61))
    assert not doubtful(pair(SHARED), Demand(floor=0.6))
    assert not doubtful(pair(SHARED), Demand())
    assert not doubtful(pair(SHARED, wrong), Demand(floor=0.61))
    assert not doubtful(pair(SHARED), Demand(floor=0.61, want=("cma",)))
    assert not doubtful(pair(BROKEN), Demand(floor=0.61))


def test_of_two_measurements_the_better_counts_but_no_wrong_byte_is_forgotten() -> None:
    slow, fast = path("shared", 0.3, 0.9), path("shared", 0.7, 0.8)
    demand = Demand(floor=0.5)
    for one, other in ((slow, fast), (fast, slow)):
        twice = dataclasses.replace(pair(one), first=pair(other))
        assert judge(twice, demand).worst() == 0.7 and not judge(twice, demand).problems
    wrong = dataclasses.replace(fast, wrong=1)
    assert judge(dataclasses.replace(pair(wrong), first=pair(fast)), demand).problems


def test_wrong_bytes_are_a_problem_on_any_path() -> None:
    wrong = dataclasses.replace(CMA, wrong=3, sizes=())
    verdict = judge(pair(SHARED, wrong), Demand())
    assert verdict.chosen is SHARED
    assert "3 blocks came wrong" in verdict.problems[0].found


def test_a_named_path_does_not_fall_back() -> None:
    verdict = judge(pair(BROKEN), Demand(path="shared", floor=0.1, want=("shared",)))
    assert verdict.chosen is None and verdict.worst() is None
    assert [problem.found for problem in verdict.problems] == ["no path works"]


def test_the_operator_reads_pair_found_wanted_cause_and_fix() -> None:
    busy = dataclasses.replace(FACTS, load=20.0)
    lines = problem_lines([judge(pair(SHARED, decode=busy), Demand(floor=0.9))])
    assert lines[0].startswith("FAILED prefill-0 > decode-0: found 0.60 of memcpy") and "at least 0.90" in lines[0]
    assert lines[1].startswith("  cause: busy host: on the host of both the load was 20.0")
    assert lines[2] == "  fix:   measure again when nothing else runs there"
    silent = problem_lines([judge(pair(SHARED), Demand(floor=0.9))])
    assert "none of the known ones" in silent[1]


def test_the_table_shows_every_path_of_every_pair() -> None:
    wrong = dataclasses.replace(path("stream"), wrong=2)
    text = "\n".join(table([judge(pair(BROKEN, CMA, wrong), Demand())]))
    assert "4 KiB" in text and "32 KiB" in text
    assert "cannot be used: the socket" in text and "WRONG BYTES in 2 blocks" in text
    assert "*cma      cma        memcpy       0.50 (5.40)      0.95 (5.40)" in text
    assert text.endswith("fastest first, in 1 of 1 pairs: cma")


def verdicts() -> list[Verdict]:
    pairs = [
        pair(SHARED, CMA, names="00"),
        pair(BROKEN, CMA, names="01"),
        pair(BROKEN, names="10"),
        pair(CMA, names="11"),
    ]
    return [judge(one, Demand(floor=0.55)) for one in pairs]


def found() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(document(verdicts(), WISH, Demand(floor=0.55))))
    return result


def test_the_json_can_be_kept_and_compared_with_itself(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text(json.dumps(found()))
    earlier = load(file)
    assert [pair["chosen"] for pair in earlier["pairs"]] == ["shared", "cma", None, "cma"]
    assert regressions(earlier, found(), 0.2) == []


def test_what_became_worse_is_named_with_what_changed() -> None:
    earlier, now = found(), found()
    first = now["pairs"][0]
    first["paths"][0]["sizes"][1]["ratios"]["memcpy"]["median"] = 0.7  # of 0.9: more than a fifth
    first["paths"][1]["sizes"][1]["ratios"]["memcpy"]["median"] = 0.8  # of 0.95: less
    now["pairs"][1] = copy.deepcopy(now["pairs"][1]) | {"transport": "tcp"}
    now["pairs"][3]["paths"][0]["error"] = "not permitted"
    now["versions"]["kernel"] = "99"
    lines = regressions(earlier, now, 0.2)
    assert lines[0] == "prefill-0 > decode-0: shared with blocks of 32 KiB had 0.90 of memcpy, now 0.70"
    assert lines[1] == "prefill-0 > decode-1: KV went over cma, now over tcp"
    assert lines[2] == "prefill-1 > decode-1: cma worked, now it does not: not permitted"
    assert lines[3].startswith("changed since: kernel ") and "-> 99" in lines[3] and len(lines) == 4


@pytest.mark.parametrize("text", ["", "[]", '{"format": "pdstack kv path/0"}'])
def test_a_file_that_cannot_be_compared_with_says_so(tmp_path: Path, text: str) -> None:
    file = tmp_path / "old.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"old\.json"):
        load(file)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "polyline", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag or tag == "p"


def test_the_page_is_whole_and_needs_nothing_from_outside() -> None:
    hostile = dataclasses.replace(pair(CMA), prefill="<script>alert(1)</script>")
    all_verdicts = [*verdicts(), judge(hostile, Demand())]
    result = json.loads(json.dumps(document(all_verdicts[:4], WISH, Demand(floor=0.55))))
    text = page(result, table(all_verdicts), ["cma <b>worse</b>"])
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    names = [tag for tag, _ in parsed.tags]
    assert not {"script", "link", "img", "iframe", "b"} & set(names)
    assert not any(name in ("src", "href") for _, attributes in parsed.tags for name in attributes)
    assert "http" not in text and "url(" not in text
    assert names.count("polyline") == 2 + 2  # two paths that work, two limits
    assert "no path" in text and "hsl(72 65% 75%)" in text and "3 of 4 pairs do not hold" in text

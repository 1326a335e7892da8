"""The qualification as its user runs it: real processes, real paths, and what it says when something is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdstack.transfer.qualify.__main__ import main, nbytes
from pdstack.transfer.qualify.control import Keys, Wish, _Agent, _path, qualify
from pdstack.transfer.qualify.ends import End, EndFailed
from pdstack.transfer.qualify.places import local, read_places
from pdstack.transfer.qualify.result import Demand, judge
from pdstack.transfer.roles import Role

SMALL = ["--local", "--bytes", "1M", "--sizes", "4K", "64K", "--rounds", "2"]
WISH = Wish(("shared", "cma", "stream"), (4096,), 1 << 20, 2, 20)


def test_every_pair_over_every_own_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    files = ["--json", str(out), "--html", str(html)]
    words = [*SMALL, "--prefill", "2", "--decode", "2", "--backend", "none", "--want", "shared", "cma"]
    assert main([*words, *files]) == 0
    result = json.loads(out.read_text())
    assert [(pair["prefill"], pair["decode"]) for pair in result["pairs"]] == [
        (f"prefill-{p}", f"decode-{d}") for p in range(2) for d in range(2)
    ]
    for pair in result["pairs"]:
        assert [(one["path"], one["error"], one["wrong"]) for one in pair["paths"]] == [
            (path, None, 0) for path in ("shared", "cma", "stream")
        ]
        assert all(len(one["sizes"]) == 2 for one in pair["paths"])
        assert pair["one_host"] and pair["transport"] in ("shared", "cma") and pair["worst_ratio"] > 0
    assert "prefill-1 > decode-1" in capsys.readouterr().out and "<svg" in html.read_text()
    assert main([*SMALL, "--path", "shared", "--compare", str(out), "--regression", "0.999"]) == 0


def test_agents_are_started_by_whatever_command_a_file_names(tmp_path: Path) -> None:
    command = ["env", "PDSTACK_QUALIFY_TEST=1", sys.executable, "-m", "pdstack.transfer.qualify.end"]
    agents = {
        role: [{"name": f"{role}@{n}", "command": command, "host": "127.0.0.1", "shares": f"{role}{n}"} for n in (1, 2)]
        for role in ("prefill", "decode")
    }
    file, out = tmp_path / "agents.json", tmp_path / "out.json"
    file.write_text(json.dumps(agents))
    words = ["--agents", str(file), *SMALL[1:], "--path", "stream", "--want", "stream", "--json", str(out)]
    assert main(words) == 0
    pairs = json.loads(out.read_text())["pairs"]
    assert [(pair["prefill"], pair["decode"]) for pair in pairs] == [
        (f"prefill@{p}", f"decode@{d}") for p in (1, 2) for d in (1, 2)
    ]


_AGENT = {"name": "a", "command": ["true"], "host": "h", "shares": "s"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        {"prefill": [_AGENT]},
        {"prefill": [_AGENT], "decode": []},
        {"prefill": [_AGENT], "decode": [_AGENT]},
        {"prefill": [_AGENT], "decode": [_AGENT | {"name": "b", "command": "true"}]},
        {"prefill": [_AGENT], "decode": [_AGENT | {"name": "b", "command": []}]},
        {"prefill": [_AGENT], "decode": [_AGENT | {"name": 7}]},
    ],
)
def test_a_file_of_agents_that_makes_no_sense_is_refused(tmp_path: Path, content: object) -> None:
    file = tmp_path / "agents.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"agents\.json"):
        read_places(file)


def test_below_the_floor_is_exit_1_with_the_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--path", "shared", "--floor", "1000"]) == 1
    out = capsys.readouterr().out
    assert "FAILED prefill-0 > decode-0: found" in out
    assert "1 of 1 pairs were below the floor and measured again" in out


def test_ucx_on_another_transport_is_exit_1_with_its_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    assert main([*SMALL, "--path", "ucx", "--want", "cma"]) == 1
    out = capsys.readouterr().out
    assert "FAILED prefill-0 > decode-0: found tcp (path ucx) carries KV; wanted cma" in out
    assert "cause: UCX_TLS: decode has UCX_TLS=tcp,self, which leaves out cma" in out


@pytest.mark.parametrize("backend", ["ucx", "nixl"])
def test_a_backend_is_measured_over_cma(backend: str) -> None:
    (pair,) = qualify(
        [local(Role.PREFILL, 0)],
        [local(Role.DECODE, 0)],
        Wish((backend,), (4096, 65536), 1 << 20, 2, 30),
        {**os.environ, "UCX_TLS": "tcp,cma,self", "UCX_NET_DEVICES": "lo"},
    )
    (found,) = pair.paths
    assert (found.error, found.wrong, found.transport, len(found.sizes)) == (None, 0, "cma", 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")
@pytest.mark.parametrize(
    ("kind", "flags", "wanted"), [("pid", ("--pid", "--fork"), "cma"), ("net", ("--net",), "shared")]
)
def test_a_namespace_of_its_own_is_found_as_the_cause(kind: str, flags: tuple[str, ...], wanted: str) -> None:
    here = local(Role.DECODE, 0)
    apart = dataclasses.replace(here, command=("unshare", *flags, *here.command))
    (pair,) = qualify([local(Role.PREFILL, 0)], [apart], dataclasses.replace(WISH, paths=(wanted,)))
    assert pair.one_host and pair.paths[0].error is not None
    (problem,) = judge(pair, Demand(path=wanted, want=(wanted,))).problems
    assert [cause.name for cause in problem.causes] == [f"{wanted} cannot be used", f"{kind} namespace"]


@contextlib.contextmanager
def started() -> Iterator[tuple[_Agent, _Agent]]:
    keys = Keys.new()
    found = tuple(_Agent(local(role, 0), role, 1, keys, WISH, os.environ) for role in (Role.PREFILL, Role.DECODE))
    for agent in found:
        agent.ready()
    yield found[0], found[1]
    for agent in found:
        agent.close()


@pytest.fixture(scope="module")
def agents() -> Iterator[tuple[_Agent, _Agent]]:
    """Two that no test harms."""
    with started() as found:
        yield found


@pytest.fixture
def mortal() -> Iterator[tuple[_Agent, _Agent]]:
    with started() as found:
        yield found


def pid(agent: _Agent) -> int:
    return agent.facts().pid


def test_the_bytes_of_another_pool_are_found_wrong(
    agents: tuple[_Agent, _Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = agents
    monkeypatch.setattr(source, "owner", 2)  # decode now looks for another prefill's bytes than it gets
    found = _path(source, target, "shared", WISH)
    assert found.error is None and found.wrong == 256 and not found.usable


def test_a_prefill_that_died_is_named_and_started_again(mortal: tuple[_Agent, _Agent]) -> None:
    source, target = mortal
    request = {"do": "measure", "path": "cma", "owner": 1, "sizes": (4096,), "rounds": 2}
    request |= {"metadata": source.opened["metadata"]["cma"], "limit": source.opened["limit"]}
    old = pid(source)
    os.kill(old, signal.SIGKILL)
    assert source._end is not None
    while source._end.alive:
        time.sleep(0.01)
    assert "is gone" in target.ready().ask(request, 20)["error"]
    assert _path(source, target, "cma", WISH).usable
    assert pid(source) != old


def test_a_frozen_end_costs_its_time_and_no_more(mortal: tuple[_Agent, _Agent]) -> None:
    source, target = mortal
    old = pid(source), pid(target)
    os.kill(old[1], signal.SIGSTOP)
    quick = Wish(WISH.paths, WISH.sizes, WISH.nbytes, WISH.rounds, 0.5)
    found = _path(source, target, "shared", quick)
    assert found.error == "decode-0 did not answer 'measure' within 0.5 s: ended it"
    assert _path(source, target, "shared", WISH).usable
    assert pid(target) != old[1] and pid(source) == old[0]


def test_a_path_that_prefill_could_not_open_tells_why(
    agents: tuple[_Agent, _Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = agents
    monkeypatch.delitem(source.opened["metadata"], "shared")
    monkeypatch.setitem(source.opened["refused"], "shared", "no memfd here")
    assert _path(source, target, "shared", WISH).error == "prefill-0: no memfd here"


def test_garbage_metadata_is_a_result_and_not_a_crash(
    agents: tuple[_Agent, _Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = agents
    for path in WISH.paths:
        monkeypatch.setitem(source.opened["metadata"], path, b64encode(b"{}").decode())
        assert "cannot be read" in str(_path(source, target, path, WISH).error)
    assert target.ready().alive


def test_a_request_that_makes_no_sense_is_answered(agents: tuple[_Agent, _Agent]) -> None:
    requests: list[dict[str, Any]] = [
        {"do": "nothing"},
        {"do": "measure"},
        {"do": "open", "role": "prefill", "paths": ["pigeon"]},
        {"do": "open", "role": "decode"},
    ]
    end = agents[0].ready()
    for request in requests:
        with pytest.raises(EndFailed, match="prefill-0 could not"):
            end.ask(request, 20)
    assert end.alive


def test_an_end_that_cannot_start_is_named() -> None:
    end = End("prefill-9", ("/bin/false",), os.environ)
    with pytest.raises(EndFailed, match=r"prefill-9 ended with exit code 1 at 'open'"):
        end.ask({"do": "open"}, 10)
    end.close()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--local", "--prefill", "0"],
        ["--local", "--sizes", "12"],
        [*SMALL, "--bytes", "5000"],
        [*SMALL, "--bytes", "x"],
        [*SMALL, "--memory", "gpu", "--path", "shared"],
        [*SMALL, "--path", "staged"],
        ["--local", "--memory", "gpu", "--sizes", "4104"],
    ],
)
def test_a_wrong_command_line_is_exit_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def test_sizes_are_read_as_people_write_them() -> None:
    assert [nbytes(text) for text in ("4096", "32K", "2M", "1G", "4KiB")] == [4096, 32 << 10, 2 << 20, 1 << 30, 4096]

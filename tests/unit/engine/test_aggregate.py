from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
from tests.unit.engine.conftest import MakeEngine
from tests.unit.engine.drive import greedy, prompt, tokens_of

from pdstack.engine import aggregate


def test_answers_come_in_the_order_of_the_requests(make_engine: MakeEngine, tiny: Path, tmp_path: Path) -> None:
    entries = [{"token_ids": prompt(n), "max_tokens": 6, "ignore_eos": True} for n in (50, 3, 20)]
    (tmp_path / "in.json").write_text(json.dumps({"requests": entries}))
    arguments = ["--model", str(tiny), "--requests", str(tmp_path / "in.json"), "--out", str(tmp_path / "out.json")]
    assert aggregate.main([*arguments, "--settings", '{"threads": 1}']) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    engine = make_engine()
    wanted = [asyncio.run(tokens_of(engine, greedy("r", entry["token_ids"], 6))) for entry in entries]
    assert [result["token_ids"] for result in found["results"]] == wanted
    assert {result["finish_reason"] for result in found["results"]} == {"length"}
    assert found["stats"]["used_blocks"] == 0


def test_text_in_one_line_out(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"requests": [{"text": "Hello", "max_tokens": 3}]}'))
    assert aggregate.main(["--model", str(tiny)]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"][0]["token_ids"]) <= 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [({}, "neither token_ids nor text"), ({"token_ids": [1], "tokens": 3}, "unknown keys tokens")],
)
def test_requests_that_make_no_sense(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], entry: dict, message: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"requests": [entry]})))
    assert aggregate.main(["--model", str(tiny)]) == 1
    assert message in capsys.readouterr().err

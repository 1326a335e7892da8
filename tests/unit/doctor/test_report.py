from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.standins import fakehost

from pdstack.doctor import __main__ as standalone
from pdstack.doctor import bundle, checkdocs, checks, report


def row(verdict: str, **changed: Any) -> dict[str, Any]:
    return {
        "number": 3, "id": "driver_version", "title": "driver version", "verdict": verdict, "found": "570",
        "wanted": "580", "fix": "upgrade", "stage": "provisioned", "mended_by": "", **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "expected"), [(["ok", "skip"], 0), (["ok", "warn"], 1), (["warn", "fail", "ok"], 2), ([], 0)]
)
def test_status(verdicts: list[str], expected: int) -> None:
    assert report.report({"a": [row(verdict) for verdict in verdicts]})["status"] == expected


def test_the_table_tells_what_is_wrong_and_counts_the_rest() -> None:
    hosts = {"g1": [row("ok"), row("fail", mended_by="gpu_driver")], "g10": [row("skip", found="one GPU"), row("warn")]}
    assert report.render(hosts) == [
        "FAIL  g1    3  driver version",
        "         found:  570",
        "         wanted: 580",
        "         fix:    upgrade (Ansible role gpu_driver; nox -s deploy)",
        "      g1   1 failed, 1 ok",
        "WARN  g10   3  driver version",
        "         found:  570",
        "         wanted: 580",
        "         fix:    upgrade",
        "      g10  1 warning, 1 skipped",
        "",
        "2 hosts: 1 failed, 1 warning, 1 ok, 1 skipped (`nox -s deploy` mends 1 of the failures). Nothing was changed.",
    ]
    assert "OK    g1    3  driver version: 570" in report.render(hosts, everything=True)
    assert "SKIP  g10   3  driver version: one GPU" in report.render(hosts, everything=True)


def test_a_preflight_is_silent_about_a_good_host() -> None:
    assert report.text([row("ok"), row("warn"), row("skip")], "g1") == ""
    assert report.text([row("fail")], "g1") == (
        "host g1 is not ready. Nothing was changed.\n- driver version (check 3)\n     found:  570\n     wanted: 580\n"
        "     fix:    upgrade"
    )
    assert "driver version" in report.text([row("warn")], "g1", verdicts=["fail", "warn"])


def test_the_written_report_is_printed_with_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "doctor.json"
    content = report.report({"g1": [row("warn")]})
    path.write_text(json.dumps(content))
    assert report.main(["--json", str(path)]) == 1
    assert "WARN  g1" in capsys.readouterr().out
    assert report.main(["--json", str(path), "--print-json"]) == 1
    assert json.loads(capsys.readouterr().out) == content
    assert report.main(["--json", str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize(
    ("what", "status"), [({}, 0), ({"persistence": "Disabled"}, 1), ({"loaded": None}, 2)], ids=["ok", "warn", "fail"]
)
def test_one_file_runs_on_a_host_without_anything_else(tmp_path: Path, what: dict[str, Any], status: int) -> None:
    root = fakehost.make(tmp_path / "host", **what)
    archive = tmp_path / "doctor.pyz"
    assert bundle.main([str(archive)]) == 0
    done = subprocess.run(
        [sys.executable, "-I", str(archive), "--root", str(root)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "1 host: " in done.stdout


def test_a_plan_says_what_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fakehost.make(tmp_path / "host", gpus=2)
    plan = tmp_path / "plan.json"
    plan.write_text('{"host": "g1", "gpu_count": 4, "disk_mib": {"/models": 1}}')
    assert standalone.main(["--root", str(root), "--plan", str(plan), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    failed = {entry["id"]: entry["wanted"] for entry in said["hosts"]["g1"] if entry["verdict"] == "fail"}
    assert failed == {"gpus_on_pci": "4 (gpu_count)", "nvidia_smi": "4 (gpu_count)"}
    assert said["facts"]["disk"] == {"/models": 2 * 1024 * 1024}
    plan.write_text('{"gpus": 4}')
    assert standalone.main(["--root", str(root), "--plan", str(plan)]) == 2
    assert "the plan has no gpus" in capsys.readouterr().err


def test_facts_of_elsewhere_and_one_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fakehost.make(tmp_path / "host", loaded=None)
    assert standalone.main(["--root", str(root), "--json"]) == 2
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(json.loads(capsys.readouterr().out)["facts"]))
    assert standalone.main(["--facts", str(facts), "--stage", "bare", "--all"]) == 0
    assert "nvidia-smi" not in capsys.readouterr().out
    assert standalone.main(["--facts", str(tmp_path / "none")]) == 2


def test_a_machine_without_gpus_is_no_failure(tmp_path: Path) -> None:
    root = fakehost.make(tmp_path / "host", gpus=0, driver=None, toolkit=None)
    assert standalone.main(["--root", str(root)]) == 0


def test_status_of_results_and_of_rows_agree() -> None:
    result = checks.unreachable("g1", "no route")
    assert checks.worst([result]) == report.status([result.as_dict()]) == 2


def test_the_page_of_the_checks_is_fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checkdocs.main(["--check"]) == 0
    assert all(entry.function.__doc__ for entry in checks.CHECKS)
    assert checkdocs.page().count("\n| ") == 51 + 1
    stale = tmp_path / "checks.md"
    stale.write_text(checkdocs.page().replace("fail", "warn"))
    monkeypatch.setattr(checkdocs, "PAGE", stale)
    assert checkdocs.main(["--check"]) == 1

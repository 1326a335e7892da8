from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pdstack.deploy import summary

DEPLOYMENT: dict[str, Any] = {
    "model": {"name": "tiny"},
    "topology": {"frontends": [{"url": "http://127.0.0.1:8000"}]},
}
VERIFY: dict[str, Any] = {
    "services": [
        {
            "service": "etcd",
            "host": "localhost",
            "version": "3.4.23",
            "health": "healthy",
            "endpoint": "http://127.0.0.1:2379",
        },
        {"service": "decode-0", "host": "a-long-host", "version": "0.7.0.post1", "health": "healthy", "endpoint": None},
    ],
    "kv": {"backend": "ucx", "transports": ["cma"], "gb_per_s": 4.0, "memcpy_gb_per_s": 8.0},
    "equality": {"prompts": 20, "shortest": 1, "longest": 1500, "tokens": 320, "reference_cached": False},
}


def test_columns_line_up_and_have_no_trailing_blanks() -> None:
    lines = summary.service_table(VERIFY["services"])
    assert lines[0].split() == list(summary.HEADINGS)
    assert lines[1].index("localhost") == lines[2].index("a-long-host") == lines[0].index("host")
    assert lines[2].endswith("-")
    assert all(line == line.rstrip() for line in lines)


def test_the_kv_line_names_backend_transport_speed_and_share() -> None:
    assert summary.kv_line(VERIFY["kv"]) == (
        "KV path: backend ucx, transport cma, 4.00 GB/s = 50 % of memcpy (8.00 GB/s)"
    )


def test_what_moved_while_prompts_were_computed_is_no_speed_of_the_path() -> None:
    kv = {**VERIFY["kv"], "path": "auto", "transports": ["shared"], "tried": ["stream"]}
    assert summary.kv_line(kv) == (
        "KV in service: path auto, backend ucx, transport shared (tried beside it: stream), 4.00 GB/s while the "
        "engines computed"
    )


def measured(pairs: int) -> dict[str, Any]:
    found = [
        {
            "prefill": f"prefill-{number}", "decode": "decode-0", "chosen": "ucx", "transport": "cma",
            "limit": "memcpy", "worst_ratio": 0.9 - number / 100, "worst_gbps": 9.0 - number,
        }
        for number in range(pairs)
    ]  # fmt: skip
    return {"date": "2026-11-24", "demand": {"path": "auto"}, "pairs": found}


def test_each_pair_is_shown_with_path_transport_speed_and_share() -> None:
    lines = summary.path_lines(measured(2))
    assert lines[0] == "KV path auto, measured before the workers started (2026-11-24), 2 pairs:"
    assert lines[1].split("  ")[0] == "pair"
    assert lines[2].split() == ["prefill-0", ">", "decode-0", "ucx", "cma", "9.00", "90", "%", "of", "a", "memcpy"]
    assert len(lines) == 4


def test_of_many_pairs_the_worst_is_shown() -> None:
    lines = summary.path_lines(measured(9))
    assert lines[0].endswith("the worst of 9 pairs:") and len(lines) == 3
    assert "prefill-8 > decode-0" in lines[2]


def test_without_a_measurement_nothing_is_said_of_it(tmp_path: Path) -> None:
    assert summary.path_lines({}) == [] and summary.load_path(tmp_path) == {}


def test_the_kept_measurement_is_part_of_the_summary(tmp_path: Path) -> None:
    (tmp_path / "deployment.json").write_text(json.dumps(DEPLOYMENT))
    (tmp_path / "kv_path.json").write_text(json.dumps(measured(1)))
    assert "(2026-11-24), 1 pair:" in summary.load(tmp_path / "deployment.json")


def test_an_unmeasured_speed_is_left_out_and_not_made_up() -> None:
    assert summary.kv_line({"backend": "nixl"}) == "KV path: backend nixl, transport none seen"


def test_the_curl_line_is_a_shell_command_with_a_valid_body() -> None:
    line = summary.curl_line("http://127.0.0.1:8000", "tiny")
    body = json.loads(line.split("-d '")[1].removesuffix("'"))
    assert body["model"] == "tiny"
    assert body["stream"] is True


def test_the_whole_reads_table_path_answers_and_command() -> None:
    text = summary.render(DEPLOYMENT, VERIFY)
    order = [text.index(part) for part in ("service", "etcd", "KV path", "20 prompts", "curl -N")]
    assert order == sorted(order)


@pytest.mark.parametrize(("age", "shown"), [(10, True), (-10, False)])
def test_results_older_than_the_deployment_are_not_shown(tmp_path: Path, age: int, shown: bool) -> None:
    deployment, verify = tmp_path / "deployment.json", tmp_path / "verify.json"
    deployment.write_text(json.dumps(DEPLOYMENT))
    verify.write_text(json.dumps(VERIFY))
    os.utime(deployment, (1000, 1000))
    os.utime(verify, (1000 + age, 1000 + age))
    assert ("KV path" in summary.load(deployment)) is shown
    assert "curl -N" in summary.load(deployment)


def test_the_gpu_engine_is_shown_with_what_its_container_told_and_the_roles_counted() -> None:
    found = {
        "services": VERIFY["services"],
        "runtime": {"dynamo": "0.7.0.post1", "tensorrt_llm": "1.2.0rc3", "ucx": "1.19.0", "nixl_cu13": "0.7.1"},
        "kv": {"backend": "nixl", "fabric": "ib", "transports": ["rc_mlx5"]},
        "separation": {"requests": 9, "shortest": 24, "longest": 8191, "prefill": 9, "decode": 10},
    }
    text = summary.render(DEPLOYMENT, found)
    assert "Engine: TensorRT-LLM 1.2.0rc3 (NIXL 0.7.1, UCX 1.19.0)\n" in text
    assert "KV path: backend nixl, transport rc_mlx5 (fabric ib)\n" in text
    assert "9 prompts of 24 to 8191 tokens; prefill counted 9 requests, decode 10\n" in text
    assert "not compared" not in text

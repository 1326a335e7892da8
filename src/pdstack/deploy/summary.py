"""What a person reads at the end of a run: the services, the KV path and the line to try.

All figures come from `verify.json`, which the verification wrote from its own measurements; nothing is filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HEADINGS = ("service", "host", "version", "health", "endpoint")
PATH_HEADINGS = ("pair", "path", "transport", "GB/s", "of the limit")
# More pairs than this, and only the worst is shown.
FEW_PAIRS = 6


def columns(rows: Iterable[Sequence[str]], gap: str = "  ") -> list[str]:
    """Return the rows as lines of equal columns, without trailing blanks; all rows have the same length."""
    table = [tuple(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def service_table(services: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the table of services, headings first; a missing value shows as `-`."""
    rows = [tuple(str(service.get(heading) or "-") for heading in HEADINGS) for service in services]
    return columns([HEADINGS, *rows])


def kv_line(kv: Mapping[str, Any]) -> str:
    """Return the KV path in one line: backend, transport, speed and its share of a memcpy of the same run.

    Agents with paths ship a prompt while it is computed: how fast that goes says more of the engines than of the path,
    which was measured before (:func:`path_lines`), so it has no share there.
    """
    transports = ", ".join(kv.get("transports") or ()) or "none seen"
    speed, limit = kv.get("gb_per_s"), kv.get("memcpy_gb_per_s")
    if kv.get("path"):
        tried = f" (tried beside it: {', '.join(kv['tried'])})" if kv.get("tried") else ""
        beside = f", {speed:.2f} GB/s while the engines computed" if speed is not None else ""
        return (
            f"KV in service: path {kv['path']}, backend {kv.get('backend', '-')}, transport {transports}{tried}{beside}"
        )
    line = f"KV path: backend {kv.get('backend', '-')}, transport {transports}"
    if speed is not None:
        line += f", {speed:.2f} GB/s"
    elif kv.get("fabric"):
        line += f" (fabric {kv['fabric']})"
    if speed is not None and limit:
        line += f" = {100 * speed / limit:.0f} % of memcpy ({limit:.2f} GB/s)"
    return line


def path_lines(measured: Mapping[str, Any]) -> list[str]:
    """Return what the step kv_path found: each pair, or the worst of many; none if it has not measured."""
    pairs = [pair for pair in measured.get("pairs", ()) if pair.get("chosen")]
    if not pairs:
        return []
    shown = pairs if len(pairs) <= FEW_PAIRS else [min(pairs, key=lambda pair: float(pair["worst_ratio"]))]
    limits = {"memcpy": "a memcpy", "socket": "a plain socket"}
    rows = [
        (
            f"{pair['prefill']} > {pair['decode']}", pair["chosen"], pair["transport"], f"{pair['worst_gbps']:.2f}",
            f"{100 * pair['worst_ratio']:.0f} % of {limits[pair['limit']]}",
        )
        for pair in shown
    ]  # fmt: skip
    count = f"{len(pairs)} pair{'s' if len(pairs) != 1 else ''}"
    what = count if len(shown) == len(pairs) else f"the worst of {count}"
    head = f"KV path {measured['demand']['path']}, measured before the workers started ({measured['date']}), {what}:"
    return [head, *columns([PATH_HEADINGS, *rows])]


def load_path(directory: Path) -> dict[str, Any]:
    """Return what the step kv_path has kept in a deployment's state directory; empty if it has not measured."""
    file = directory / "kv_path.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def engine_line(found: Mapping[str, str]) -> str:
    """Return the GPU engine in one line, from the versions that its container told."""
    nixl = next((version for name, version in found.items() if name.startswith("nixl")), "-")
    return f"Engine: TensorRT-LLM {found.get('tensorrt_llm', '-')} (NIXL {nixl}, UCX {found.get('ucx', '-')})"


def separation_line(found: Mapping[str, Any]) -> str:
    """Return how many requests both roles counted, of how many that were asked."""
    return (
        f"Separation: {found['requests']} prompts of {found['shortest']} to {found['longest']} tokens; prefill counted "
        f"{found['prefill']} requests, decode {found['decode']}"
    )


def checks_line(verify: Mapping[str, Any]) -> str:
    """Return what was proved, in one line."""
    if separation := verify.get("separation"):
        return separation_line(separation)
    equal = verify.get("equality") or {}
    if not equal:
        return "Answers: not compared in this run"
    how = "from the cache of an earlier run with the same content" if equal.get("reference_cached") else "computed now"
    return (
        f"Answers: {equal['prompts']} prompts of {equal['shortest']} to {equal['longest']} tokens, {equal['tokens']} "
        f"tokens equal to the aggregated run ({how})"
    )


def curl_line(url: str, model: str) -> str:
    """Return the shell command that asks the model something and streams the answer."""
    body = {
        "model": model,
        "stream": True,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    }
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def render(deployment: Mapping[str, Any], verify: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> str:
    """Return the summary as text without a final newline.

    `verify` may be empty, then only the curl line is shown; `measured` is what the step kv_path has kept.
    """
    lines: list[str] = []
    if verify.get("services"):
        lines += [*service_table(verify["services"]), ""]
    if verify.get("runtime"):
        lines += [engine_line(verify["runtime"])]
    if paths := path_lines(measured or {}):
        lines += [*paths, ""]
    if verify.get("kv"):
        lines += [kv_line(verify["kv"])]
    if verify:
        lines += [checks_line(verify)]
    frontends = deployment["topology"]["frontends"]
    if frontends:
        lines += ["Try it:", "  " + curl_line(frontends[0]["url"], deployment["model"]["name"])]
    return "\n".join(lines)


def load(deployment_file: Path) -> str:
    """Return the summary of the deployment described by a file; FileNotFoundError when there is none.

    `verify.json` beside it is used if it is younger than the deployment: an older one speaks of another deployment.
    """
    deployment = json.loads(deployment_file.read_text())
    results = deployment_file.with_name("verify.json")
    fresh = results.is_file() and results.stat().st_mtime_ns >= deployment_file.stat().st_mtime_ns
    verify = json.loads(results.read_text()) if fresh else {}
    return render(deployment, verify, load_path(deployment_file.parent))

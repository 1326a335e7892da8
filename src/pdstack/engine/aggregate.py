"""Run requests undivided in one engine: the reference that disaggregated answers must equal, token for token.

    python -m pdstack.engine.aggregate --model DIR [--requests FILE] [--settings JSON] [--out FILE]

Input: {"requests": [{"token_ids": [...], "max_tokens": 16, "ignore_eos": true, ...}]}, other keys being those of
SamplingParams; or {"text": "..."} instead of token_ids, which needs the tokenizers package. Greedy by default.
Without --requests it reads stdin, without --out it writes one line to stdout:
{"results": [{"token_ids": [...], "finish_reason": "length"}], "stats": {...}}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pdstack.engine.config import EngineConfig, EngineError, Request, SamplingParams
from pdstack.engine.core import Engine

__all__ = ["main", "run"]


def _request(index: int, entry: Mapping[str, Any], model: Path) -> Request:
    options = dict(entry)
    tokens, text = options.pop("token_ids", None), options.pop("text", None)
    if tokens is None:
        if not isinstance(text, str):
            raise EngineError(f"request {index}: found neither token_ids nor text")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise EngineError(f"request {index}: text needs the tokenizers package; give token_ids instead") from None
        tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    unknown = sorted(set(options) - {f.name for f in fields(SamplingParams)})
    if unknown:
        raise EngineError(f"request {index}: unknown keys {', '.join(unknown)}")
    return Request(str(index), tokens, SamplingParams(**options))


async def run(engine: Engine, requests: list[Request]) -> list[dict[str, Any]]:
    """Answer all requests, as many at once as the engine has slots; results in the order of the requests."""
    slots = asyncio.Semaphore(engine.config.max_batch)

    async def one(request: Request) -> dict[str, Any]:
        async with slots:
            tokens: list[int] = []
            reason = None
            async for step in engine.generate(request):
                tokens += step.token_ids
                reason = step.finish_reason
        return {"token_ids": tokens, "finish_reason": reason}

    return list(await asyncio.gather(*(one(request) for request in requests)))


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when all requests were answered."""
    parser = argparse.ArgumentParser(
        prog="python -m pdstack.engine.aggregate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=Path, help="JSON file; default stdin")
    parser.add_argument("--settings", default="{}", help="engine settings as a JSON object")
    parser.add_argument("--out", type=Path, help="JSON file; default stdout")
    chosen = parser.parse_args(arguments)
    try:
        text = chosen.requests.read_text() if chosen.requests else sys.stdin.read()
        settings = EngineConfig.from_dict(json.loads(chosen.settings))
        requests = [_request(at, entry, chosen.model) for at, entry in enumerate(json.loads(text)["requests"])]
        engine = Engine.load(chosen.model, settings)
        engine.start()
        began = time.monotonic()
        results = asyncio.run(run(engine, requests))
        stats = {"seconds": round(time.monotonic() - began, 3), **asdict(engine.stats())}
        engine.stop()
    except (EngineError, ValueError, KeyError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    answer = json.dumps({"results": results, "stats": stats}) + "\n"
    if chosen.out:
        chosen.out.write_text(answer)
    else:
        sys.stdout.write(answer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

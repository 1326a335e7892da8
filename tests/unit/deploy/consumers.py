"""The real readers of what is rendered for engine trtllm: the argument parsers of ai-dynamo, in their own processes.

`python3 -m dynamo.trtllm` imports TensorRT-LLM; the lab's stand-ins of it are what it finds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SITE = ROOT / "tests/standins/lab_runtime/site"
WORKER = """
import json
from dynamo.trtllm.utils.trtllm_utils import cmd_line_args
print(json.dumps({key: getattr(value, "value", value) for key, value in vars(cmd_line_args()).items()}))
"""
FRONTEND = """
import json
from dynamo.frontend.main import parse_args
print(json.dumps({key: value for key, value in vars(parse_args()).items()}, default=str))
"""
ENGINE = """
import sys, yaml
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
print(TorchLlmArgs(model="/m", **yaml.safe_load(sys.stdin)).model_dump_json())
"""


def _run(script: str, words: Sequence[str] = (), text: str = "") -> Any:
    """Return what a reader makes of its words or its input; ValueError with its own last line when it refuses."""
    environment = {**os.environ, "PYTHONPATH": f"{SITE}:{ROOT / 'src'}"}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], input=text, env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    if done.returncode != 0:
        raise ValueError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def words_after(command: Sequence[str], module: str) -> list[str]:
    """Return the options of `python3 -m MODULE` in a command."""
    command = list(command)
    return command[command.index(module) + 1 :]


def worker_options(command: Sequence[str]) -> Any:
    """Read a worker's command with the real parser of dynamo.trtllm."""
    return _run(WORKER, words_after(command, "dynamo.trtllm"))


def frontend_options(command: Sequence[str]) -> Any:
    """Read a frontend's command with the real parser of dynamo.frontend."""
    return _run(FRONTEND, words_after(command, "dynamo.frontend"))


def engine_arguments(text: str) -> Any:
    """Read an engine's YAML with the stand-in of TensorRT-LLM's strict models."""
    return _run(ENGINE, text=text)

"""Filters of the role `trtllm_image`. A shim: the logic and its tests are in src/pdstack/deploy/runtime_image.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import runtime_image  # needs the path above
from pdstack.deploy.problem import Problem


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the package's errors into the filter error that Ansible prints without a traceback."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise AnsibleFilterError(str(error)) from error

    return wrapped


def text(check: Callable[..., Iterable[Problem]]) -> Callable[..., str]:
    """Turn a check into the text of what it finds, empty when all is well."""
    return lambda *args, **kwargs: runtime_image.render(list(check(*args, **kwargs)))


def digest(inspected: str) -> str:
    return runtime_image.content_digest(json.loads(inspected or "[]"))


def output(result: dict[str, Any]) -> str:
    return str(result.get("stdout", "")) if result.get("rc") == 0 else ""


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_runtime_plan": told(runtime_image.plan),
            "pdstack_runtime_reference": told(runtime_image.reference),
            "pdstack_runtime_checksum": told(runtime_image.archive_checksum),
            "pdstack_runtime_digest": told(digest),
            "pdstack_runtime_output": output,
            "pdstack_runtime_setting_problems": text(runtime_image.setting_problems),
            "pdstack_runtime_host_problems": text(runtime_image.host_problems),
            "pdstack_runtime_tree_problems": text(runtime_image.tree_problems),
            "pdstack_runtime_image_problems": text(runtime_image.image_problems),
        }

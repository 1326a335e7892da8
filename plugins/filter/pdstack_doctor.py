"""Filters of the doctor and of the roles' preflights. A shim: the logic and its tests are in src/pdstack/doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.doctor import checks, fleet, plan, report  # needs the path above


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the package's errors into the filter error that Ansible prints without a traceback."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, KeyError) as error:
            raise AnsibleFilterError(f"doctor: {error}") from error

    return wrapped


def evaluate(
    facts: Mapping[str, Any], wanted: Mapping[str, Any], stages: Sequence[str] = (), ids: Sequence[str] = ()
) -> list[dict[str, Any]]:
    return [result.as_dict() for result in checks.evaluate(facts, wanted, stages=stages, ids=ids)]


def table(hosts: Mapping[str, Any], *, everything: bool = False) -> str:
    return "\n".join(["Host by host:", *report.render(hosts, everything=everything)])


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_doctor_plan": told(plan.build),
            "pdstack_doctor": told(evaluate),
            "pdstack_doctor_text": report.text,
            "pdstack_doctor_commands": told(fleet.commands),
            "pdstack_doctor_report": told(fleet.report),
            "pdstack_doctor_json": lambda content: json.dumps(content, indent=2) + "\n",
            "pdstack_doctor_table": table,
        }

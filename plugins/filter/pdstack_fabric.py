"""Filters of fabrics. A shim: the logic and its tests are in src/pdstack/deploy/fabrics.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import fabrics, hosttools, ucx_check  # needs the path above
from pdstack.deploy.problem import Problem


def _environment(profile: dict[str, Any], variables: Any, engine: str, backend: str, port: int | None = None) -> Any:
    return fabrics.environment(profile, variables, engine=engine, backend=backend, port=port)


def _text(found: list[Problem]) -> str:
    return "\n".join(
        f"{item.what}.\n   found:  {item.found}\n   wanted: {item.wanted}\n   fix:    {item.fix}" for item in found
    )


def _problems(profile: dict[str, Any], name: str, variables: Any, engine: str, host: str) -> str:
    return _text(fabrics.problems(name, profile, variables, engine=engine, host=host))


def _ucx(said: dict[str, str], profile: dict[str, Any], **known: Any) -> str:
    return _text(ucx_check.ucx(profile, said, **known))


def _said(results: list[dict[str, Any]], loop_var: str) -> dict[str, str]:
    """Registered results of a loop over {name, ...} as name -> all that the command printed."""
    return {item[loop_var]["name"]: f"{item['stdout']}\n{item['stderr']}" for item in results}


def _nixl(said: dict[str, Any], **known: Any) -> str:
    return _text(ucx_check.nixl(said, **known))


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_fabric_environment": _environment,
            "pdstack_fabric_container": fabrics.container,
            "pdstack_fabric_promised": fabrics.promised,
            "pdstack_fabric_problems": _problems,
            "pdstack_said": _said,
            "pdstack_ucx_problems": _ucx,
            "pdstack_nixl_problems": _nixl,
            "pdstack_hosttools_name": hosttools.name,
        }

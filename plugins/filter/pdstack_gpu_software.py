"""Filters of the roles that install software for GPU hosts. A shim: the logic is in src/pdstack/deploy/packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy.packages import engine, gdrcopy, rdma, repository, toolkit  # needs the path above


def plain(value: Any) -> Any:
    """Turn what a template may pass on into dicts, lists and text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the package's errors into the filter error that Ansible prints without a traceback."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return plain(function(*args, **kwargs))
        except ValueError as error:
            raise AnsibleFilterError(str(error)) from error

    return wrapped


def problem_text(found: Iterable[dict[str, str]], host: str) -> str:
    lines = [f"{host} is not ready. Nothing was changed."]
    for problem in found:
        lines += [f"- {problem['what']}"]
        lines += [f"     {key + ':':7} {problem[key]}" for key in ("found", "wanted", "fix")]
    return "\n".join(lines) if len(lines) > 1 else ""


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_apt_candidate": engine.candidate,
            "pdstack_cdi_stale": told(toolkit.cdi_stale),
            "pdstack_engine_expected": lambda facts, **known: engine.expected(repository.system(facts), **known),
            "pdstack_engine_flag_conflicts": told(engine.flag_conflicts),
            "pdstack_engine_plan": told(lambda facts, **known: engine.plan(repository.system(facts), **known)),
            "pdstack_gdrcopy_plan": told(lambda facts, version: gdrcopy.plan(repository.system(facts), version)),
            "pdstack_gdrcopy_problems": told(lambda version, **known: gdrcopy.problems(version=version, **known)),
            "pdstack_gdr_path": told(rdma.gdr_path),
            "pdstack_gpu_mode": told(lambda request, docker, since: toolkit.gpu_mode(request, docker, since)),
            "pdstack_peermem_action": told(rdma.peermem_action),
            "pdstack_problem_text": problem_text,
            "pdstack_rdma_modules": told(rdma.modules),
            "pdstack_rdma_plan": told(
                lambda facts, stack, repositories: rdma.plan(repository.system(facts), stack, repositories)
            ),
            "pdstack_rdma_problems": told(lambda path, **known: rdma.problems(path=path, **known)),
            "pdstack_rdma_reboot": told(rdma.reboot_reason),
            "pdstack_toolkit_plan": told(
                lambda facts, version, repositories: toolkit.plan(repository.system(facts), version, repositories)
            ),
            "pdstack_toolkit_security": told(toolkit.security),
            "pdstack_toolkit_settings": told(toolkit.daemon_settings),
            "pdstack_toolkit_sources": told(toolkit.sources),
            "pdstack_version_at_least": lambda found, wanted: engine.upstream(found) >= engine.upstream(wanted),
        }

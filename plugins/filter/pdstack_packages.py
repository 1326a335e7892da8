"""Filters of the roles `gpu_driver` and `host_tuning`. A shim: the logic and its tests are in src/pdstack/deploy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import topology, tuning  # needs the path above
from pdstack.deploy.packages import driver


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


def plan(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> driver.Plan:
    return driver.plan(driver.system(facts), nvswitches=len(facts["pci"]["nvswitches"]), **settings)


def ports(deployment: Any, host: str) -> list[int]:
    return [use["port"] for use in topology.port_uses(deployment) if use["host"] == host]


def shortfall_text(found: Iterable[Mapping[str, str]], host: str) -> str:
    lines = [f"{host}: its driver does not work yet."]
    for problem in found:
        lines += [f"- {problem['what']}"]
        lines += [f"     {key + ':':7} {problem[key]}" for key in ("found", "wanted", "fix")]
    return "\n".join(lines)


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_driver_keyring_wanted": told(driver.keyring_wanted),
            "pdstack_driver_leftovers": told(driver.leftovers),
            "pdstack_driver_modprobe_fix": driver.modprobe_fix,
            "pdstack_driver_persistenced": lambda passwd: driver.persistenced_dropin(driver.persistenced_user(passwd)),
            "pdstack_driver_plan": told(plan),
            "pdstack_driver_reboot_reason": told(driver.reboot_reason),
            "pdstack_driver_refusals": told(driver.refusals),
            "pdstack_driver_shortfall_text": shortfall_text,
            "pdstack_driver_shortfalls": told(driver.shortfalls),
            "pdstack_driver_stream_steps": told(driver.stream_steps),
            "pdstack_tuning_apt_guard": lambda _: tuning.apt_guard(),
            "pdstack_tuning_dnf_excludes": lambda _: tuning.dnf_excludes(),
            "pdstack_tuning_limits": told(tuning.limits_dropin),
            "pdstack_tuning_pending": told(tuning.pending),
            "pdstack_tuning_ports": told(ports),
            "pdstack_tuning_reserved": told(tuning.reserved_ports),
            "pdstack_tuning_sysctl": told(tuning.sysctl_file),
            "pdstack_tuning_values": lambda results: tuning.values(results, "__host_tuning__item"),
        }

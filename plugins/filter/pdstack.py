"""Filters over the inventory. A shim: the logic and its tests are in src/pdstack/deploy."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import (
    coordination,
    kv_path,
    modelid,
    obstacles,
    report,
    services,
    summary,
    topology,
    validate,
)  # needs the path above

ROOT = Path(__file__).resolve().parents[2]


def _members(groups: Mapping[str, Sequence[str]], hostvars: Any) -> dict[str, Any]:
    wanted = dict.fromkeys(host for group in validate.HOST_GROUPS for host in groups.get(group, ()))
    return {host: hostvars[host] for host in wanted}


def project_path(relative: str) -> str:
    return str((ROOT / relative).resolve())


def build(groups: Mapping[str, Sequence[str]], hostvars: Any, settings: Mapping[str, Any]) -> Any:
    return topology.build(groups, _members(groups, hostvars), settings)


def problems(groups: Mapping[str, Sequence[str]], hostvars: Any, settings: Mapping[str, Any]) -> str:
    found = validate.problems(groups, _members(groups, hostvars), settings)
    return validate.render(found) if found else ""


def notes(groups: Mapping[str, Sequence[str]], hostvars: Any, settings: Mapping[str, Any]) -> list[str]:
    return validate.notes(groups, _members(groups, hostvars), settings)


def obstacles_text(survey: Any, deployment: Any, host: str, **known: Any) -> str:
    return obstacles.render(obstacles.find(survey, deployment, host, **known), host)


def controller_serves(groups: Mapping[str, Sequence[str]], hostvars: Any) -> bool:
    return any(variables.get("ansible_connection") == "local" for variables in _members(groups, hostvars).values())


def connections(hosts: Sequence[str], hostvars: Any) -> dict[str, dict[str, str]]:
    keys = ("connection", "host", "user", "port", "ssh_private_key_file")
    found = {}
    for host in hosts:
        known = {f"ansible_{key}": hostvars[host].get(f"ansible_{key}") for key in keys}
        found[host] = {key: str(value) for key, value in known.items() if value is not None}
    return found


def status(deployment: Any, hostvars: Any) -> list[str]:
    hosts = dict.fromkeys(entry["host"] for entry in report.entries(deployment))
    inspected = {host: (hostvars[host].get("pdstack_r_containers") or {}).get("stdout") for host in hosts}
    return report.status(deployment, inspected)


def coordination_image(groups: Mapping[str, Sequence[str]], hostvars: Any, settings: Mapping[str, Any]) -> str:
    members = [host for group in ("etcd", "nats") for host in groups.get(group, ())]
    return coordination.image_choice(
        settings["coordination_image"],
        engine=settings["engine"],
        releases=[str((hostvars[host].get("ansible_facts") or {}).get("distribution_release")) for host in members],
        pinned=settings["versions"]["images"]["base"]["suite"],
    )


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_project_path": project_path,
            "pdstack_topology": build,
            "pdstack_problems": problems,
            "pdstack_notes": notes,
            "pdstack_controller_serves": controller_serves,
            "pdstack_obstacles": obstacles_text,
            "pdstack_connections": connections,
            "pdstack_containers": services.names,
            "pdstack_removal_order": services.removal_order,
            "pdstack_status": status,
            "pdstack_model_id": modelid.model_id,
            "pdstack_coordination_image": coordination_image,
            "pdstack_etcd_service": coordination.etcd,
            "pdstack_nats_config": coordination.nats_config,
            "pdstack_nats_service": coordination.nats,
            "pdstack_frontend_service": services.frontend,
            "pdstack_worker_config": services.worker_config,
            "pdstack_worker_service": services.worker,
            "pdstack_stale_services": services.stale,
            "pdstack_kv_path_end": kv_path.end,
            "pdstack_kv_path_name": kv_path.end_name,
            "pdstack_kv_path_asker": kv_path.asker,
            "pdstack_kv_path_command": kv_path.command,
            "pdstack_kv_path_compared": kv_path.compared,
            "pdstack_kv_path_fingerprint": kv_path.fingerprint,
            "pdstack_kv_path_orders": kv_path.orders,
            "pdstack_kv_path_lines": summary.path_lines,
        }

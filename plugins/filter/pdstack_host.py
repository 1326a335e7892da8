"""Filters of the roles `container_engine` and `images`. A shim: the logic and its tests are in src/pdstack/deploy."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import baseimage, daemon_json, hostcheck, image_tag


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the package's errors into the filter error that Ansible prints without a traceback."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise AnsibleFilterError(str(error)) from error

    return wrapped


def text(content: str) -> str:
    return base64.b64decode(content).decode(errors="replace")


def slurped(results: list[Mapping[str, Any]]) -> dict[str, str]:
    return baseimage.from_slurp(results, text)


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_apt_options": baseimage.apt_options,
            "pdstack_apt_proxy": baseimage.proxy_environment,
            "pdstack_base_plan": told(baseimage.plan),
            "pdstack_daemon_json": told(daemon_json.update),
            "pdstack_host_problems": told(hostcheck.problems),
            "pdstack_image_reference": told(image_tag.reference),
            "pdstack_image_references": told(image_tag.references),
            "pdstack_images_needed": image_tag.needed,
            "pdstack_slurped": slurped,
        }

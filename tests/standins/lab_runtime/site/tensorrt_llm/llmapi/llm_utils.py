"""Merging of the engine's YAML into the arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tensorrt_llm.llmapi.llm_args import NESTED


def update_llm_args_with_extra_options(llm_args: dict[str, Any], extra_llm_api_options: str) -> dict[str, Any]:
    """Return the arguments with those of a YAML file over them; sections become objects, and so are checked here."""
    found = yaml.safe_load(Path(extra_llm_api_options).read_text()) or {}
    for name, kind in NESTED.items():
        if isinstance(found.get(name), dict):
            found[name] = kind(**found[name])
    return {**llm_args, **found}

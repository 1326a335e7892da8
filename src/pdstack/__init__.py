"""Prefill/decode disaggregated serving on plain hosts."""

from __future__ import annotations

__version__ = "0.1.0"

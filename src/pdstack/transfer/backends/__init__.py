"""Backends that move KV bytes: `ucx` (UCX itself) and `nixl` (NIXL's READ through its UCX plugin)."""

from __future__ import annotations

from pdstack.transfer.backends.base import BACKENDS, Exporter, Importer, NoExporter, Peer, open_exporter, open_importer

__all__ = ["BACKENDS", "Exporter", "Importer", "NoExporter", "Peer", "open_exporter", "open_importer"]

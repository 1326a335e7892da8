"""Whether a host has the disk and memory that a step needs: found, wanted, fix."""

from __future__ import annotations

MIB = 1024 * 1024


def free_disk(df_output: str) -> dict[str, int]:
    """Return mount point -> free MiB, from `df --block-size=1 --output=target,avail` (first line is a heading)."""
    found = {}
    for line in df_output.splitlines()[1:]:
        target, avail = line.rsplit(None, 1)
        found[target.strip()] = int(avail) // MIB
    return found


def problems(df_output: str, memory_mb: int, *, min_disk_mb: int, min_memory_mb: int, purpose: str) -> list[str]:
    """Return a sentence for each thing the host has too little of; empty when there is enough."""
    found = [
        f"disk for {purpose}: found {free} MiB free on the file system {target}, wanted {min_disk_mb} MiB; "
        "free some space, or mount a larger file system there"
        for target, free in sorted(free_disk(df_output).items())
        if free < min_disk_mb
    ]
    if memory_mb < min_memory_mb:
        found.append(
            f"memory for {purpose}: found {memory_mb} MiB, wanted {min_memory_mb} MiB; give the host more, or run "
            "fewer workers on it"
        )
    return found

"""What a GPU host is tuned to: sysctl values, ports that no outgoing connection may take, packages left alone.

Files are always written; whether the kernel takes a value is another matter (a container may not set kernel.* or vm.*).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

# What unattended-upgrades must not touch: a library that is newer than the loaded module stops every new container
# until the host boots. Regular expressions over package names.
GUARDED = (
    "^nvidia-", "^libnvidia-", "^libcuda", "^cuda-", "^linux-modules-nvidia-", "^linux-(image|headers|generic)",
    "^docker", "^containerd", "^runc$", "^datacenter-gpu-manager", "^doca-", "^mlnx-", "^gdrdrv",
)  # fmt: skip
# The same as file name patterns, for dnf.
EXCLUDED = (
    "*nvidia*",
    "cuda*",
    "nvlsm",
    "*nvsdm*",
    "kernel*",
    "docker*",
    "moby-engine",
    "containerd*",
    "doca-*",
    "mlnx-*",
)
# A listener that stands outside of this range cannot be taken by an outgoing connection.
DEFAULT_LOCAL_RANGE = "32768\t60999"


def apt_guard(patterns: Sequence[str] = GUARDED) -> str:
    """Return the file for apt.conf.d that keeps unattended-upgrades off what a GPU host runs on."""
    lines = "".join(f'    "{pattern}";\n' for pattern in patterns)
    return (
        "// Written by pdstack: these change when the deployment does, with the host drained.\n"
        f"Unattended-Upgrade::Package-Blacklist {{\n{lines}}};\n"
    )


def ranges(ports: Iterable[int]) -> str:
    """Return ports as the kernel writes them: sorted, neighbours joined (9100-9103,9200)."""
    found: list[list[int]] = []
    for port in sorted(set(ports)):
        if found and port == found[-1][1] + 1:
            found[-1][1] = port
        else:
            found.append([port, port])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def parse_ranges(text: str) -> set[int]:
    """Return the ports of the kernel's text; ValueError for anything else."""
    ports: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        ports |= set(range(int(first), int(last or first) + 1))
    return ports


def reserved_ports(planned: Iterable[int], local_range: str, present: str = "") -> str:
    """Return net.ipv4.ip_local_reserved_ports: what is there, and the planned ports inside of `local_range`.

    `planned` are the ports that the deployment listens on, `local_range` is net.ipv4.ip_local_port_range, `present`
    what is reserved now (by others, or by us).
    """
    first, last = (int(word) for word in (local_range or DEFAULT_LOCAL_RANGE).split())
    return ranges(parse_ranges(present) | {port for port in planned if first <= port <= last})


def sysctl_file(values: Mapping[str, object]) -> str:
    """Return the text of the file for sysctl.d; an empty value is left out."""
    lines = [f"{name} = {value}" for name, value in sorted(values.items()) if str(value) != ""]
    return "# Written by pdstack.\n" + "".join(line + "\n" for line in lines)


def same(wanted: object, found: str) -> bool:
    """Say whether a sysctl has the value, whatever separates its numbers."""
    return str(wanted).split() == found.split()


def pending(wanted: Mapping[str, object], found: Mapping[str, str | None]) -> dict[str, str]:
    """Return what has to be set: those of `wanted` that the kernel has (`found` is not None) with another value."""
    return {
        name: str(value)
        for name, value in sorted(wanted.items())
        if str(value) != "" and found.get(name) is not None and not same(value, str(found[name]))
    }


def limits_dropin(nofile: int) -> str:
    """Return the drop-in that lets containers lock memory (RDMA registration) and open files."""
    return (
        "# Written by pdstack.\n[Service]\nLimitMEMLOCK=infinity\nLimitSTACK=infinity\n"
        f"LimitNOFILE={nofile}\n"
    )  # fmt: skip


def dnf_excludes(patterns: Sequence[str] = EXCLUDED) -> str:
    """Return the value of `excludepkgs` that keeps dnf-automatic off what a GPU host runs on."""
    return " ".join(patterns)


def values(results: Iterable[Mapping[str, object]], key: str) -> dict[str, str | None]:
    """Return sysctl -> value out of the results of `cat`, whose items are under `key`; None where there is no file."""
    return {str(one[key]): str(one["stdout"]).strip() if one["rc"] == 0 else None for one in results}

"""Read which shared libraries an ELF file asks for (its DT_NEEDED entries).

Only 64-bit little-endian files are understood, which is all that an x86_64 or aarch64 wheel holds.
Format: the System V ABI, chapters "ELF header", "Program header" and "Dynamic section".
"""

from __future__ import annotations

import struct
from pathlib import Path

_PT_LOAD = 1
_PT_DYNAMIC = 2
_DT_NEEDED = 1
_DT_STRTAB = 5


def is_elf(path: Path) -> bool:
    """Say whether the file starts with the ELF magic number."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def needed(path: Path) -> list[str]:
    """Return the names in DT_NEEDED, in file order; an empty list for a static file.

    Raises ValueError if the file is not a 64-bit little-endian ELF file.
    """
    data = path.read_bytes()
    if data[:4] != b"\x7fELF" or data[4] != 2 or data[5] != 1:
        raise ValueError(f"{path}: wanted a 64-bit little-endian ELF file, found {data[:6]!r}")
    header_offset = struct.unpack_from("<Q", data, 32)[0]
    header_size, header_count = struct.unpack_from("<HH", data, 54)
    loads: list[tuple[int, int, int]] = []
    dynamic: tuple[int, int] | None = None
    for index in range(header_count):
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, header_offset + index * header_size)
        if kind == _PT_LOAD:
            loads.append((address, offset, size))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, size)
    if dynamic is None:
        return []
    entries = [struct.unpack_from("<qQ", data, dynamic[0] + at) for at in range(0, dynamic[1], 16)]
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    if strings is None:
        return []
    table = next(offset + strings - address for address, offset, size in loads if address <= strings < address + size)
    names = []
    for tag, value in entries:
        if tag == _DT_NEEDED:
            start = table + value
            names.append(data[start : data.index(b"\0", start)].decode())
    return names

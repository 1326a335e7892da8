"""A shared library made of nothing: some functions that all answer the same number.

UCX's CUDA module is loaded only where libcuda.so.1 and libnvidia-ml.so.1 are, and then asks the driver for its devices.
With these in their places (answering "no device") UCX lists the module's variables on a machine without a GPU.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence
from pathlib import Path

PAGE = 0x1000
# ELF machine number and the code of `return N` (N in bytes 1 to 4, or in bits 5 to 20 of the first word).
X86_64, AARCH64 = 62, 183


def code(machine: int, answer: int) -> bytes:
    if machine == X86_64:
        return b"\xb8" + struct.pack("<I", answer) + b"\xc3"
    return struct.pack("<II", 0x52800000 | (answer << 5), 0xD65F03C0)


def library(soname: str, functions: Sequence[str], answer: int) -> bytes:
    """Return an ELF shared object in which each of `functions` returns `answer` (0 to 65535)."""
    machine = AARCH64 if platform.machine() == "aarch64" else X86_64
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (soname, *functions))
    text = code(machine, answer)
    header, programs = 64, 2 * 56
    at_text = header + programs
    at_symbols = at_text + len(text) + (-(at_text + len(text)) % 8)
    symbols = bytes(24)
    offset = 1 + len(soname) + 1
    for name in functions:
        # Global function in section 1, which nobody looks up.
        symbols += struct.pack("<IBBHQQ", offset, 0x12, 0, 1, at_text, len(text))
        offset += len(name) + 1
    at_hash = at_symbols + len(symbols)
    count = len(functions) + 1
    # One bucket with all symbols in a chain.
    hashes = struct.pack("<III", 1, count, 1 if functions else 0)
    hashes += struct.pack(f"<{count}I", *(number + 1 if 0 < number < count - 1 else 0 for number in range(count)))
    at_names = at_hash + len(hashes)
    at_dynamic = at_names + len(names) + (-(at_names + len(names)) % 8)
    entries = [(14, 1), (4, at_hash), (5, at_names), (6, at_symbols), (10, len(names)), (11, 24), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", tag, value) for tag, value in entries)
    size = at_dynamic + len(dynamic)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, header, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, 0, 0, 0, size, size, PAGE)
    pointer = struct.pack("<IIQQQQQQ", 2, 6, at_dynamic, at_dynamic, at_dynamic, len(dynamic), len(dynamic), 8)
    body = bytearray(size)
    for at, part in ((0, head + load + pointer), (at_text, text), (at_symbols, symbols), (at_hash, hashes),
                     (at_names, names), (at_dynamic, dynamic)):  # fmt: skip
        body[at : at + len(part)] = part
    return bytes(body)


def wanted_symbols(module: Path, prefixes: Sequence[str]) -> list[str]:
    """Return the names in a library that begin like the functions of another one; too many do no harm."""
    found = set()
    for word in module.read_bytes().split(b"\0"):
        if 4 < len(word) < 60 and word.isascii():
            name = word.decode()
            if name.startswith(tuple(prefixes)) and name.replace("_", "").isalnum():
                found.add(name)
    return sorted(found)

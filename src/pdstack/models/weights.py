"""Read and write safetensors files without copying: weights stay memory-mapped, so workers of a host share them.

The format is a little-endian u64 header length, a JSON header and the raw tensors
(https://huggingface.co/docs/safetensors, "Format"). The safetensors package can not hand out mapped numpy arrays over a
whole file nor fix the order of tensors, and order matters here: neighbours can be multiplied as one matrix.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Tensor", "WeightsError", "open_weights", "write_safetensors"]

_ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 100_000_000


class WeightsError(ValueError):
    """A model directory's weights can not be used; the text says which file, what was found and wanted."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor in a mapped file. `dtype` is the name in the file (F32, F16, BF16)."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    raw: npt.NDArray[np.uint8]

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32 of `shape`: a view of the mapped file for F32, else a private copy."""
        if self.dtype == "F32":
            return self.raw.view(np.float32).reshape(self.shape)
        if self.dtype == "F16":
            return self.raw.view(np.float16).astype(np.float32).reshape(self.shape)
        # bfloat16 is the upper half of a float32.
        return (self.raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(self.shape)


def _open_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_WILLNEED)
    if len(mapped) < 8 or (length := struct.unpack("<Q", mapped[:8])[0]) > min(_MAX_HEADER, len(mapped) - 8):
        raise WeightsError(f"{path}: not a safetensors file, or cut short; fetch it again")
    try:
        header: dict[str, Any] = json.loads(mapped[8 : 8 + length])
    except ValueError as error:
        raise WeightsError(f"{path}: the safetensors header is no JSON ({error}); fetch it again") from None
    data = np.frombuffer(mapped, dtype=np.uint8, offset=8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in _ITEM_SIZE:
            raise WeightsError(f"{path}: tensor {name} is {dtype}, wanted F32, F16 or BF16 (no quantised weights)")
        wanted = int(np.prod(shape)) * _ITEM_SIZE[dtype]
        if end - start != wanted or end > data.size:
            raise WeightsError(f"{path}: tensor {name} takes {end - start} bytes, wanted {wanted}; fetch it again")
        yield name, Tensor(path.name, dtype, shape, data[start:end])


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: model.safetensors, or those that the index names."""
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise WeightsError(f"{index}: found no {', '.join(missing)} beside it; fetch the missing files")
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    raise WeightsError(f"{directory}: found neither model.safetensors nor model.safetensors.index.json")


def open_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory by name, mapped and not yet read. Raises WeightsError."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(directory):
        for name, tensor in _open_file(path):
            if name in tensors:
                raise WeightsError(f"{directory}: tensor {name} is in {tensors[name].file} and in {path.name}")
            tensors[name] = tensor
    return tensors


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[int, ...]], values: Iterable[npt.NDArray[np.float32]]
) -> None:
    """Write float32 tensors in the given order, each 64-byte aligned in the file. `values` follow `tensors`.

    Same input, same bytes. Only one tensor is in memory at a time if `values` is a generator.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = int(np.prod(shape)) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for (name, shape), value in zip(tensors.items(), values, strict=True):
            if value.shape != shape:
                raise WeightsError(f"{path}: tensor {name} has shape {value.shape}, wanted {shape}")
            file.write(np.ascontiguousarray(value, dtype="<f4").data)

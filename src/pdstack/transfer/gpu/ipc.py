"""A GPU pool that another process of the host can map: CUDA's IPC handle, and why it cannot be opened if it cannot.

This speaks to the driver's library alone (libcuda, by ctypes), not to torch: the memory may come from any allocator
that uses cudaMalloc, and TensorRT-LLM's pools do.

*What the role is worth here.* A CUDA IPC mapping is always readable **and writable**; the driver knows no read-only
one. That decode only reads prefill's pool is a property of our code (the kernels write to `target` alone), not one
that the kernel enforces, unlike a sealed memfd. Give a handle only to a peer that has proved the cluster key.

*Containers.* Mapping works from one PID namespace to another (driver 580, measured), but not if both processes have the
same number there, as the first process of two containers has: CUDA then says INVALID_CONTEXT, as for a process's own
memory. That is found before it is tried.

*Lifetimes.* The exporter must keep the pool until every mapping is closed, or it is gone itself: memory freed and
given to something else while a peer still maps it is undefined behaviour in CUDA's own words. A pool that lives as
long as its process has no such moment.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdstack.transfer.errors import BackendUnavailable, ProtocolError, ReadFailed
from pdstack.transfer.gpu.driver import check, device, driver, use

VERSION = 1
# The code of errors that say why a pool cannot be mapped here, however often it is tried.
NOT_PERMITTED = "not_permitted"
_HANDLE_BYTES = 64
# CUresult and CUpointer_attribute of cuda.h.
_INVALID_CONTEXT = 201
_LAZY_PEER_ACCESS = 1
_POINTER_DEVICE_ORDINAL = 9


class _Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 16)]


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_BYTES)]


@dataclass(frozen=True)
class Place:
    """Where a process runs, as far as CUDA IPC depends on it."""

    boot: str
    pid_namespace: str
    pid: int
    gpu: str
    mig: bool


@dataclass(frozen=True)
class Export:
    """What decode needs to map a pool: all of it is JSON. `handle` is of the whole allocation, the pool at `offset`."""

    handle: str
    offset: int
    nbytes: int
    place: Place

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Export:
        """Read it from a peer. Raises :class:`ProtocolError` if it is not what :meth:`to_json` wrote."""
        try:
            fields = json.loads(text)
            if fields.pop("version") != VERSION:
                raise ValueError("another version")
            place = Place(**fields.pop("place"))
            export = cls(**fields, place=place)
            kinds = ((export.handle, str), (export.offset, int), (export.nbytes, int), (place.boot, str),
                     (place.pid_namespace, str), (place.pid, int), (place.gpu, str), (place.mig, bool))  # fmt: skip
            if any(type(value) is not kind for value, kind in kinds):
                raise ValueError("a field of another type")
            if len(bytes.fromhex(export.handle)) != _HANDLE_BYTES or export.offset < 0 or export.nbytes < 1:
                raise ValueError("a handle, offset or size that cannot be")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ProtocolError(
                f"a peer's CUDA IPC export cannot be read ({error}): both workers must run the same pdstack"
            ) from error
        return export


_ANOTHER_HOST = "the pool is on another host: CUDA IPC is for one host; use the path staged (gather, send, scatter)"


def boot() -> str:
    """This host's boot id (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def obstacle(theirs: Place, ours: Place, visible: list[str]) -> str:
    """Return why a pool of `theirs` cannot be mapped in `ours`, with the fix; nothing if nothing speaks against it.

    `visible` are the GPUs of this process.
    """
    if theirs.boot != ours.boot:
        return _ANOTHER_HOST
    if theirs.mig or ours.mig:
        return "a GPU is in MIG mode: CUDA IPC does not go between MIG instances; use whole GPUs or the path staged"
    if theirs.pid == ours.pid:
        if theirs.pid_namespace == ours.pid_namespace:
            return "the pool is this process's own: use its address, CUDA refuses to map a process's memory twice"
        return (
            f"both workers are process {ours.pid}, each in a PID namespace of its own, and the driver tells processes "
            "apart by that number alone; run both containers with --pid=host, or one with --pid=container:OTHER"
        )
    if theirs.gpu not in visible:
        return (
            f"the pool is on GPU {theirs.gpu}, which this process cannot see (it sees {', '.join(visible) or 'none'}): "
            "give both containers all GPUs (--gpus all) and choose with CUDA_VISIBLE_DEVICES order"
        )
    return ""


def _uuids(library: Any, ordinal: int) -> tuple[str, str]:
    """Return the GPU's UUID and that of the instance; they differ under MIG."""
    found = []
    for call in ("cuDeviceGetUuid", "cuDeviceGetUuid_v2"):
        uuid = _Uuid()
        code = getattr(library, call)(ctypes.byref(uuid), device(library, ordinal))
        check(library, code, call, "the driver must be 470 or newer")
        found.append(bytes(uuid).hex())
    return found[0], found[1]


def gpus() -> list[str]:
    """Return the UUIDs, in hex, of the GPUs that this process sees, in CUDA's order."""
    library = driver()
    count = ctypes.c_int()
    check(library, library.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount", "look at nvidia-smi")
    return [_uuids(library, ordinal)[1] for ordinal in range(count.value)]


def place(ordinal: int) -> Place:
    """Return where this process runs, with its GPU number `ordinal`."""
    whole, instance = _uuids(driver(), ordinal)
    return Place(
        boot=boot(),
        pid_namespace=str(Path("/proc/self/ns/pid").readlink()),
        pid=os.getpid(), gpu=instance, mig=whole != instance,
    )  # fmt: skip


def export(address: int, nbytes: int) -> Export:
    """Describe a pool of this process, `nbytes` of device memory at `address`, for :class:`Mapping` in another one.

    Raises :class:`BackendUnavailable` if the memory has no IPC handle.
    """
    library = driver()
    ordinal = ctypes.c_int()
    pointer = ctypes.c_uint64(address)
    code = library.cuPointerGetAttribute(ctypes.byref(ordinal), _POINTER_DEVICE_ORDINAL, pointer)
    check(
        library,
        code,
        "cuPointerGetAttribute",
        f"{address:#x} is no GPU memory of this process: pass a CUDA pool's address",
    )
    use(library, ordinal.value)
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    code = library.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), pointer)
    check(library, code, "cuMemGetAddressRange", f"{address:#x} is no GPU memory of this process")
    offset = address - base.value
    if offset + nbytes > size.value:
        raise BackendUnavailable(
            f"the pool has {nbytes} bytes, but its allocation ends {size.value - offset} bytes after its start: it is "
            "made of several allocations; allocate it as one (no expandable segments)"
        )
    handle = _Handle()
    code = library.cuIpcGetMemHandle(ctypes.byref(handle), base)
    fix = (
        "this memory cannot be shared: allocate the pool with cudaMalloc, not as managed or virtual memory "
        "(PYTORCH_CUDA_ALLOC_CONF without expandable_segments), and not on a MIG instance"
    )
    check(library, code, "cuIpcGetMemHandle", fix)
    return Export(bytes(handle).hex(), offset, nbytes, place(ordinal.value))


class Mapping:
    """A peer's pool in this process: `address` and `nbytes`, until :meth:`close`.

    `ordinal` is the GPU of this process that will read it. Raises :class:`BackendUnavailable` with the reason if it
    cannot be mapped; nothing else is tried instead.
    """

    def __init__(self, exported: Export, ordinal: int = 0) -> None:
        if exported.place.boot != boot():  # known even where there is no driver to ask
            raise BackendUnavailable(f"prefill's GPU pool cannot be mapped: {_ANOTHER_HOST}", code=NOT_PERMITTED)
        self._library = driver()
        ours, visible = place(ordinal), gpus()
        if reason := obstacle(exported.place, ours, visible):
            raise BackendUnavailable(f"prefill's GPU pool cannot be mapped: {reason}", code=NOT_PERMITTED)
        self._reach(visible.index(exported.place.gpu), ordinal)
        self._open(exported, ordinal)

    def _reach(self, theirs: int, ours: int) -> None:
        if theirs == ours:
            return
        can = ctypes.c_int()
        library = self._library
        code = library.cuDeviceCanAccessPeer(ctypes.byref(can), device(library, ours), device(library, theirs))
        check(library, code, "cuDeviceCanAccessPeer", "look at nvidia-smi topo -p2p r")
        if not can.value:
            raise BackendUnavailable(
                f"GPU {ours} cannot access GPU {theirs} of this host (neither NVLink nor PCIe peer access): see "
                "nvidia-smi topo -p2p r; turn off the IOMMU/ACS for PCIe, or use the path staged",
                code=NOT_PERMITTED,
            )

    def _open(self, exported: Export, ordinal: int) -> None:
        library = self._library
        use(library, ordinal)
        self._ordinal = ordinal
        self._base = ctypes.c_uint64()
        handle = _Handle.from_buffer_copy(bytes.fromhex(exported.handle))
        code = library.cuIpcOpenMemHandle_v2(ctypes.byref(self._base), handle, _LAZY_PEER_ACCESS)
        fix = "the exporting process must live and still hold the pool; in containers give both --pid=host --ipc=host"
        if code == _INVALID_CONTEXT:
            fix = (
                "the driver takes the handle for this process's own: a PID namespace is between the two, use --pid=host"
            )
        check(library, code, "cuIpcOpenMemHandle", fix)
        size = ctypes.c_size_t()
        code = library.cuMemGetAddressRange_v2(None, ctypes.byref(size), self._base)
        if code or exported.offset + exported.nbytes > size.value:
            self.close()
            raise BackendUnavailable(
                f"the peer says its pool is {exported.nbytes} bytes at {exported.offset}, its allocation has "
                f"{size.value}: the export is not of this allocation"
            )
        self.address = self._base.value + exported.offset
        self.nbytes = exported.nbytes

    def close(self) -> None:
        """Unmap. All reads must be over: synchronise the stream first. Safe to call twice."""
        if self._base.value:
            use(self._library, self._ordinal)
            code = self._library.cuIpcCloseMemHandle(self._base)
            self._base = ctypes.c_uint64()
            check(self._library, code, "cuIpcCloseMemHandle", "an earlier kernel failed; see its error", ReadFailed)

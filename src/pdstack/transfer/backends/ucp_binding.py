"""The part of libucp that a one-sided READ needs, as ctypes declarations and a few small owning classes.

Bound by hand because no Python package exposes UCX's remote memory access: `ucxx` offers tag, stream and active
messages only. The declarations follow `ucp/api/ucp.h` of UCX 1.19.0; UCX keeps this ABI across 1.x (fields are
appended and every structure starts with a mask that says which fields the caller filled), and :func:`load` refuses
another major version.

Every object here must be used by one thread at a time; :mod:`pdstack.transfer.backends.ucx` sees to that.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int,
    c_int8,
    c_size_t,
    c_uint,
    c_uint32,
    c_uint64,
    c_ulong,
    c_void_p,
)
from pathlib import Path

from pdstack.transfer.errors import BackendUnavailable, ReadFailed

# ucs_status_t is a packed enum: one byte, and the rest of the register is undefined.
_Status = c_int8

UCS_OK = 0
UCS_INPROGRESS = 1
UCS_ERR_BUSY = -15
_UCS_ERR_LAST = -100

_FEATURE_RMA = 1 << 1
_FEATURE_WAKEUP = 1 << 4

_PARAM_FEATURES = 1 << 0
_PARAM_ESTIMATED_EPS = 1 << 6
_PARAM_NAME = 1 << 8

_WORKER_THREAD_MODE = 1 << 0
_WORKER_FLAGS = 1 << 5
_WORKER_FLAG_IGNORE_REQUEST_LEAK = 1 << 0
_THREAD_SERIALIZED = 1

_EP_REMOTE_ADDRESS = 1 << 0
_EP_ERR_MODE = 1 << 1
_EP_ERR_HANDLER = 1 << 2
ERR_MODE_NONE = 0
ERR_MODE_PEER = 1

_MAP_ADDRESS = 1 << 0
_MAP_LENGTH = 1 << 1
_MAP_PROT = 1 << 3
_MAP_MEMORY_TYPE = 1 << 4
PROT_LOCAL_READ = 1 << 0
PROT_LOCAL_WRITE = 1 << 1
PROT_REMOTE_READ = 1 << 8
_MEMORY_HOST = 0

_OP_FIELD_FLAGS = 1 << 4
_CLOSE_FORCE = 1 << 0
_OP_FIELD_MEMORY_TYPE = 1 << 6
_OP_FIELD_MEMH = 1 << 8


class _Params(Structure):
    _fields_ = (
        ("field_mask", c_uint64),
        ("features", c_uint64),
        ("request_size", c_size_t),
        ("request_init", c_void_p),
        ("request_cleanup", c_void_p),
        ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int),
        ("estimated_num_eps", c_size_t),
        ("estimated_num_ppn", c_size_t),
        ("name", c_char_p),
    )


class _WorkerParams(Structure):
    _fields_ = (
        ("field_mask", c_uint64),
        ("thread_mode", c_int),
        ("cpu_mask", c_ulong * 16),
        ("events", c_uint),
        ("user_data", c_void_p),
        ("event_fd", c_int),
        ("flags", c_uint64),
        ("name", c_char_p),
        ("am_alignment", c_size_t),
        ("client_id", c_uint64),
    )


class _SockAddr(Structure):
    _fields_ = (("addr", c_void_p), ("addrlen", c_uint32))


RemoteKey = c_void_p
_ErrorCallback = CFUNCTYPE(None, c_void_p, c_void_p, _Status)


class _ErrorHandler(Structure):
    _fields_ = (("cb", _ErrorCallback), ("arg", c_void_p))


def _endpoint_failed(_arg: int | None, _endpoint: int | None, _status: int) -> None:
    """Nothing to do, the reads fail by themselves; but without a handler UCX takes a dead peer for fatal and aborts."""


_endpoint_failed_callback = _ErrorCallback(_endpoint_failed)


class _EndpointParams(Structure):
    _fields_ = (
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("err_mode", c_int),
        ("err_handler", _ErrorHandler),
        ("user_data", c_void_p),
        ("flags", c_uint),
        ("sockaddr", _SockAddr),
        ("conn_request", c_void_p),
        ("name", c_char_p),
        ("local_sockaddr", _SockAddr),
    )


class _MapParams(Structure):
    _fields_ = (
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("length", c_size_t),
        ("flags", c_uint),
        ("prot", c_uint),
        ("memory_type", c_int),
        ("exported_memh_buffer", c_void_p),
    )


class _RequestParam(Structure):
    # The last three fields exist since UCX 1.22; older libraries read the mask and never look at them.
    _fields_ = (
        ("op_attr_mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("cb", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("recv_info", c_void_p),
        ("memh", c_void_p),
        ("remote_datatype", c_uint64),
        ("remote", c_void_p),
        ("remote_count", c_size_t),
    )


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ucp_get_version": (None, (POINTER(c_uint), POINTER(c_uint), POINTER(c_uint))),
    "ucp_init_version": (_Status, (c_uint, c_uint, POINTER(_Params), c_void_p, POINTER(c_void_p))),
    "ucp_cleanup": (None, (c_void_p,)),
    "ucp_worker_create": (_Status, (c_void_p, POINTER(_WorkerParams), POINTER(c_void_p))),
    "ucp_worker_destroy": (None, (c_void_p,)),
    "ucp_worker_get_address": (_Status, (c_void_p, POINTER(c_void_p), POINTER(c_size_t))),
    "ucp_worker_release_address": (None, (c_void_p, c_void_p)),
    "ucp_worker_progress": (c_uint, (c_void_p,)),
    "ucp_worker_get_efd": (_Status, (c_void_p, POINTER(c_int))),
    "ucp_worker_arm": (_Status, (c_void_p,)),
    "ucp_ep_create": (_Status, (c_void_p, POINTER(_EndpointParams), POINTER(c_void_p))),
    "ucp_ep_close_nbx": (c_void_p, (c_void_p, POINTER(_RequestParam))),
    "ucp_ep_rkey_unpack": (_Status, (c_void_p, c_char_p, POINTER(c_void_p))),
    "ucp_rkey_pack": (_Status, (c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_size_t))),
    "ucp_rkey_buffer_release": (None, (c_void_p,)),
    "ucp_rkey_destroy": (None, (c_void_p,)),
    "ucp_mem_map": (_Status, (c_void_p, POINTER(_MapParams), POINTER(c_void_p))),
    "ucp_mem_unmap": (_Status, (c_void_p, c_void_p)),
    "ucp_get_nbx": (c_void_p, (c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, POINTER(_RequestParam))),
    "ucp_request_check_status": (_Status, (c_void_p,)),
    "ucp_request_free": (None, (c_void_p,)),
}


def _wheel_library() -> Path | None:
    """libucp.so.0 of the libucx wheel, found without importing it (its loader would load libraries we do not need)."""
    spec = importlib.util.find_spec("libucx")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(location) / "lib" / "libucp.so.0"
        if candidate.is_file():
            return candidate
    return None


class Library:
    """libucp with its functions declared, and the version it reports."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lib = ctypes.CDLL(path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        major, minor, release = c_uint(), c_uint(), c_uint()
        self.lib.ucp_get_version(byref(major), byref(minor), byref(release))
        self.version = (major.value, minor.value, release.value)
        status_text = ctypes.CDLL(str(Path(path).with_name("libucs.so.0")) if "/" in path else "libucs.so.0")
        self._status_string = status_text.ucs_status_string
        self._status_string.restype, self._status_string.argtypes = c_char_p, (_Status,)

    def status_text(self, status: int) -> str:
        """UCX's words for a status code, e.g. ``Connection reset by remote peer``."""
        return str(self._status_string(status).decode(errors="replace"))

    def check(self, status: int, what: str) -> None:
        """Raise :class:`ReadFailed` unless `status` is UCS_OK."""
        if status != UCS_OK:
            raise ReadFailed(f"UCX could not {what}: {self.status_text(status)} (status {status})")


_loaded: Library | None = None


def load() -> Library:
    """Load libucp once per process: ``PDSTACK_LIBUCP`` if set, else the libucx wheel, else the system's library.

    UCX reads its environment while it loads, so set UCX_* before the first call.
    Raises :class:`BackendUnavailable` if there is none, or if its major version is not 1.
    """
    global _loaded
    if _loaded is None:
        wheel = _wheel_library()
        path = os.environ.get("PDSTACK_LIBUCP") or (str(wheel) if wheel else ctypes.util.find_library("ucp"))
        if not path:
            raise BackendUnavailable(
                "kv_transfer_backend 'ucx' needs libucp: looked for PDSTACK_LIBUCP, the Python package libucx-cu12 "
                "and the system's libucp.so.0, found none. Install libucx-cu12."
            )
        # Keeps CMA among the transports of endpoints that report the death of their peer; see backends/ucx.py.
        # Only where CMA can be chosen at all: UCX warns about settings that it does not use.
        if not {"all", "cma", "sm", "shm"}.isdisjoint(os.environ.get("UCX_TLS", "all").split(",")):
            os.environ.setdefault("UCX_CMA_MEMORY_INVALIDATE", "y")
        try:
            library = Library(path)
        except (OSError, AttributeError) as error:
            raise BackendUnavailable(f"kv_transfer_backend 'ucx' cannot use {path}: {error}") from error
        if library.version[0] != 1:
            raise BackendUnavailable(
                f"kv_transfer_backend 'ucx' is bound to the UCX 1.x interface, {path} is version {library.version}"
            )
        _loaded = library
    return _loaded


class Context:
    """A UCP context with the RMA and wakeup features."""

    def __init__(self, library: Library, name: str) -> None:
        self.library = library
        params = _Params(
            field_mask=_PARAM_FEATURES | _PARAM_NAME | _PARAM_ESTIMATED_EPS,
            features=_FEATURE_RMA | _FEATURE_WAKEUP,
            name=name.encode(),
            estimated_num_eps=1,
        )
        handle = c_void_p()
        status = library.lib.ucp_init_version(1, 17, byref(params), None, byref(handle))
        library.check(status, "create a context (is UCX_TLS or UCX_NET_DEVICES set to something this host lacks?)")
        self.handle = handle

    def close(self) -> None:
        """Release it; safe to call twice."""
        if self.handle:
            self.library.lib.ucp_cleanup(self.handle)
            self.handle = c_void_p()


class Memory:
    """A registered region. Keep the buffer alive for as long as this object."""

    def __init__(self, context: Context, address: int, length: int, prot: int) -> None:
        self._context = context
        params = _MapParams(
            field_mask=_MAP_ADDRESS | _MAP_LENGTH | _MAP_PROT | _MAP_MEMORY_TYPE,
            address=address,
            length=length,
            prot=prot,
            memory_type=_MEMORY_HOST,
        )
        handle = c_void_p()
        status = context.library.lib.ucp_mem_map(context.handle, byref(params), byref(handle))
        context.library.check(status, f"register {length} bytes of the KV pool")
        self.handle = handle

    def pack_rkey(self) -> bytes:
        """The remote key: whoever has it and the worker address can read the region."""
        buffer, size = c_void_p(), c_size_t()
        library = self._context.library
        library.check(
            library.lib.ucp_rkey_pack(self._context.handle, self.handle, byref(buffer), byref(size)),
            "pack the remote key of the KV pool",
        )
        try:
            return ctypes.string_at(buffer, size.value)
        finally:
            library.lib.ucp_rkey_buffer_release(buffer)

    def close(self) -> None:
        """Release it; safe to call twice."""
        if self.handle:
            self._context.library.lib.ucp_mem_unmap(self._context.handle, self.handle)
            self.handle = c_void_p()


class Worker:
    """A UCP worker: its own sockets, endpoints and request table. Destroying it ends every read in flight for good."""

    def __init__(self, context: Context) -> None:
        self._library = context.library
        params = _WorkerParams(
            field_mask=_WORKER_THREAD_MODE | _WORKER_FLAGS,
            thread_mode=_THREAD_SERIALIZED,
            flags=_WORKER_FLAG_IGNORE_REQUEST_LEAK,
        )
        handle = c_void_p()
        library = context.library
        library.check(library.lib.ucp_worker_create(context.handle, byref(params), byref(handle)), "create a worker")
        self.handle = handle
        efd = c_int()
        library.check(library.lib.ucp_worker_get_efd(handle, byref(efd)), "get a worker's event descriptor")
        self.efd = efd.value

    def address(self) -> bytes:
        """The address a peer needs to connect; opaque."""
        buffer, size = c_void_p(), c_size_t()
        lib = self._library.lib
        self._library.check(
            lib.ucp_worker_get_address(self.handle, byref(buffer), byref(size)), "get a worker's address"
        )
        try:
            return ctypes.string_at(buffer, size.value)
        finally:
            lib.ucp_worker_release_address(self.handle, buffer)

    def progress(self) -> int:
        """Handle what is ready; 0 means nothing was."""
        return int(self._library.lib.ucp_worker_progress(self.handle))

    def arm(self) -> bool:
        """Ask for the next event on `efd`; False means there is work already, so progress again first."""
        status = self._library.lib.ucp_worker_arm(self.handle)
        if status == UCS_ERR_BUSY:
            return False
        self._library.check(status, "arm a worker")
        return True

    def close(self) -> None:
        """Release it; safe to call twice."""
        if self.handle:
            self._library.lib.ucp_worker_destroy(self.handle)
            self.handle = c_void_p()


class Endpoint:
    """A connection from `worker` to the worker behind `address`. It ends with its worker, if not closed before."""

    def __init__(self, worker: Worker, library: Library, address: bytes, error_mode: int) -> None:
        self._library = library
        self._address = ctypes.create_string_buffer(address, len(address))
        params = _EndpointParams(
            field_mask=_EP_REMOTE_ADDRESS | _EP_ERR_MODE | _EP_ERR_HANDLER,
            address=ctypes.addressof(self._address),
            err_mode=error_mode,
            err_handler=_ErrorHandler(_endpoint_failed_callback, None),
        )
        handle = c_void_p()
        library.check(library.lib.ucp_ep_create(worker.handle, byref(params), byref(handle)), "connect to the peer")
        self.handle = handle

    def unpack_rkey(self, packed: bytes) -> c_void_p:
        """Make a peer's packed remote key usable on this endpoint."""
        handle = c_void_p()
        self._library.check(
            self._library.lib.ucp_ep_rkey_unpack(self.handle, packed, byref(handle)), "unpack the peer's remote key"
        )
        return handle

    def forget(self, rkey: c_void_p) -> None:
        """Free a remote key; no read may be started with it afterwards."""
        self._library.lib.ucp_rkey_destroy(rkey)

    def get(self, local: int, length: int, remote: int, rkey: c_void_p, memory: Memory) -> int | None:
        """Start one READ of `length` bytes; None if it is complete already, else a request.

        Raises :class:`ReadFailed` if UCX refuses it.
        """
        param = _RequestParam(
            op_attr_mask=_OP_FIELD_MEMH | _OP_FIELD_MEMORY_TYPE, memory_type=_MEMORY_HOST, memh=memory.handle
        )
        return self._request(
            self._library.lib.ucp_get_nbx(self.handle, local, length, remote, rkey, byref(param)), "start a read"
        )

    def close(self) -> int | None:
        """Begin to close without asking the peer: reads in flight are cancelled. None if done, else a request."""
        param = _RequestParam(op_attr_mask=_OP_FIELD_FLAGS, flags=_CLOSE_FORCE)
        return self._request(self._library.lib.ucp_ep_close_nbx(self.handle, byref(param)), "close an endpoint")

    def _request(self, pointer: int | None, what: str) -> int | None:
        if pointer is None:
            return None
        # A pointer in the last 100 addresses is a status, not a request.
        status = int(pointer) - (1 << 64)
        if _UCS_ERR_LAST <= status < 0:
            self._library.check(status, what)
        return int(pointer)

    def status(self, request: int) -> int:
        """UCS_INPROGRESS while `request` runs."""
        return int(self._library.lib.ucp_request_check_status(request))

    def finish(self, request: int) -> None:
        """Free a request that is not in progress any more. Raises :class:`ReadFailed` if it failed."""
        status = self.status(request)
        self._library.lib.ucp_request_free(request)
        self._library.check(status, "complete a read")

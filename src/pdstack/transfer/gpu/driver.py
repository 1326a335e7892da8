"""NVIDIA's driver library (libcuda, by ctypes): loaded when it is first used, its errors with their names and a fix."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from pdstack.transfer.errors import BackendUnavailable


@cache
def driver() -> Any:
    """The library, initialised. Raises :class:`BackendUnavailable` if this machine or container has none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailable(
            f"GPU memory needs NVIDIA's driver: {error}; install it, or start the container with --gpus all"
        ) from error
    check(
        library,
        library.cuInit(0),
        "cuInit",
        "look at nvidia-smi: is the driver loaded and a GPU given to this container?",
    )
    return library


def check(library: Any, code: int, call: str, fix: str, kind: type[Exception] = BackendUnavailable) -> None:
    """Raise `kind` if a call gave an error `code`."""
    if code:
        name = ctypes.c_char_p()
        library.cuGetErrorName(code, ctypes.byref(name))
        raise kind(f"{call} gave {(name.value or b'an unknown error').decode()} ({code}): {fix}")


def device(library: Any, ordinal: int) -> int:
    """The driver's number of this process's GPU `ordinal`."""
    number = ctypes.c_int()
    code = library.cuDeviceGet(ctypes.byref(number), ordinal)
    check(library, code, "cuDeviceGet", f"this process has no GPU {ordinal}")
    return number.value


def use(library: Any, ordinal: int) -> None:
    """Make the GPU's primary context, which torch and cudart use, current in this thread."""
    context = ctypes.c_void_p()
    code = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device(library, ordinal))
    check(library, code, "cuDevicePrimaryCtxRetain", "is the GPU in exclusive mode or out of memory?")
    check(library, library.cuCtxSetCurrent(context), "cuCtxSetCurrent", "the GPU fell off the bus? look at nvidia-smi")

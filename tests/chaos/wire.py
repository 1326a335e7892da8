"""A TCP wire between two agents that can be frozen, cut, or turn one bit of what it carries."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress


class Wire:
    """Listens at `port` and carries every connection to the port `there`."""

    def __init__(self, there: int) -> None:
        self.there = there
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._flow = threading.Event()
        self._flow.set()
        self._flip_after = -1
        self.flipped = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.there), 5)
            except OSError as error:
                print(f"the wire could not connect: {error}", flush=True)
                near.close()
                continue
            with self._lock:
                self._sockets += [near, far]
            threading.Thread(target=self._carry, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, True), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, down: bool) -> None:
        try:
            source.settimeout(None)
            while data := source.recv(1 << 16):
                self._flow.wait()
                target.sendall(self._turned(data) if down else data)
        except OSError as error:
            print("wire", down, error, flush=True)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _turned(self, data: bytes) -> bytes:
        with self._lock:
            if not 0 <= self._flip_after < len(data):
                self._flip_after = max(-1, self._flip_after - len(data))
                return data
            turned = bytearray(data)
            turned[self._flip_after] ^= 4
            self._flip_after, self.flipped = -1, True
            return bytes(turned)

    def flip(self, after: int) -> None:
        """Turn one bit of what prefill sends, `after` bytes from now."""
        with self._lock:
            self._flip_after, self.flipped = after, False

    def freeze(self, seconds: float) -> None:
        """Carry nothing for so long."""
        self._flow.clear()
        time.sleep(seconds)  # the length of the partition
        self._flow.set()

    def cut(self) -> None:
        """End all connections; new ones are carried."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for end in sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._flow.set()
        self._listener.close()
        self.cut()

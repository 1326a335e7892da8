"""Tell with an exit code whether something answers: the health check of the containers.

    python3 -S -E -m pdstack.probe http URL [--timeout S]    0 if the status is 200
    python3 -S -E -m pdstack.probe tcp HOST:PORT [--timeout S]   0 if the connection is accepted

Only sockets are imported: this starts every few seconds in every container, and an HTTP library would cost more than
the check. `-S -E` saves the site module; `-m` then finds the package through the working directory. A file on its own
works as well: `python3 -S -E probe.py ...`.
"""

from __future__ import annotations

import socket
import sys

DEFAULT_TIMEOUT_S = 4.0


def split_address(address: str, default_port: int | None = None) -> tuple[str, int]:
    """Split HOST:PORT or [HOST]:PORT. Raises ValueError if there is no port and no default."""
    host, colon, port = address.rpartition(":")
    if not colon or "]" in port:
        if default_port is None:
            raise ValueError(f"wanted HOST:PORT, found {address!r}")
        host, port = address, str(default_port)
    if not port.isdigit():
        raise ValueError(f"wanted a port number after the last colon, found {address!r}")
    return host.strip("[]"), int(port)


def tcp(address: str, timeout_s: float) -> None:
    """Connect and close. Raises OSError if nobody listens."""
    socket.create_connection(split_address(address), timeout_s).close()


def http(url: str, timeout_s: float) -> None:
    """GET `url` (plain http only). Raises OSError with status and first line of the body if it is not 200."""
    scheme, _, rest = url.partition("://")
    if scheme != "http":
        raise ValueError(f"wanted an http:// URL, found {url!r}")
    authority, _, path = rest.partition("/")
    host, port = split_address(authority, 80)
    with socket.create_connection((host, port), timeout_s) as connection:
        connection.sendall(f"GET /{path} HTTP/1.0\r\nHost: {authority}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while len(answer) < 65536:
            data = connection.recv(65536)
            if not data:
                break
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or words[1] != b"200":
        found = head.split(b"\r\n", 1)[0].decode(errors="replace") or "an empty answer"
        raise OSError(f"wanted status 200, found {found}: {body[:300].decode(errors='replace').strip()}")


def main(arguments: list[str]) -> int:
    """Run the check that the command line names; 0 good, 1 bad, 2 wrong usage."""
    timeout_s = DEFAULT_TIMEOUT_S
    words = list(arguments)
    try:
        if "--timeout" in words:
            at = words.index("--timeout")
            timeout_s = float(words[at + 1])
            del words[at : at + 2]
        kind, target = words
        check = {"http": http, "tcp": tcp}[kind]
    except (ValueError, IndexError, KeyError):
        sys.stderr.write("usage: probe {http URL | tcp HOST:PORT} [--timeout SECONDS]\n")
        return 2
    try:
        check(target, timeout_s)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{kind} {target}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

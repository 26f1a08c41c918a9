"""Ports that nothing listens on."""

from __future__ import annotations

import random
import socket

# Below the range from which the kernel draws ports for outgoing connections, so that none of those takes one meanwhile.
FIRST, LAST = 20000, 32000


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Distinct ports to listen on. Drawn at random: another launcher that looks at this moment finds others."""
    found: list[int] = []
    for port in random.sample(range(FIRST, LAST), LAST - FIRST):
        if len(found) == count:
            return found
        if is_free(port, host):
            found.append(port)
    raise OSError(f"fewer than {count} free ports between {FIRST} and {LAST} on {host}")


def is_free(port: int, host: str) -> bool:
    """Whether this process may listen there. Raises OSError when `host` is no address of this machine."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except (PermissionError, OSError):
            return False
        return True

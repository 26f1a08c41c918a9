"""Where others reach this engine."""

from __future__ import annotations

import ipaddress
import logging
import socket
from urllib.parse import urlsplit

log = logging.getLogger("engine")


def reachable_url(scheme: str, host: str, port: int, proxy_url: str | None) -> str:
    """Where others reach a server on (host, port): a wildcard host becomes this machine's address towards the proxy."""
    if host in ("", "0.0.0.0", "::"):
        host = _address_towards(proxy_url)
    return f"{scheme}://{f'[{host}]' if _is_ipv6(host) else host}:{port}"


def _address_towards(proxy_url: str | None) -> str:
    """This machine's address on the route to the proxy; without one, on the default route. No packet is sent."""
    targets = [(urlsplit(proxy_url).hostname or "", 9)] if proxy_url else []
    for host, port in [*targets, ("192.0.2.1", 9)]:  # the second is reserved for documentation: it only picks a route
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as error:
            log.warning("no route to %s (%s); set --advertise-url if the proxy cannot reach this engine", host, error)
    return "127.0.0.1"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:  # a name
        return False

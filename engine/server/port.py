"""The engine's port, held from the start: whoever cannot have it must not load a model first. Imports little, for the
same reason."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path


class CannotListen(Exception):
    """The port or the certificate cannot be used; the message is one line for the user."""


def bind(host: str, port: int) -> socket.socket:
    """Holds the port from now on. Raises CannotListen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for TIME_WAIT to pass
        held.bind(address)
    except OSError as error:
        raise refused(f"{host} port {port}", error) from None
    return held


def tls_context(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    """None without a certificate. Raises CannotListen when it cannot be read."""
    if certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise CannotListen(f"--ssl-certfile {certfile}: {error}") from None
    return context


def refused(where: str, error: OSError) -> CannotListen:
    reason = (error.strerror or str(error)).lower()
    return CannotListen(f"cannot listen on {where}: {reason}; choose another with --host and --port")

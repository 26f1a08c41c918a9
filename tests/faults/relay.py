"""A TCP relay that can be cut: what a broken network does to a connection between two engines."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

PIECE_BYTES = 1 << 16


class Relay:
    """Passes connections on to (host, port) and counts what comes back. Serves again after a cut."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.passed_bytes = 0  # from the target
        self._cut_after: int | None = None
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="relay", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut_after(self, num_bytes: int) -> None:
        """Cuts, once, when so many bytes more have come back: in the middle of whatever they belong to."""
        self._cut_after = self.passed_bytes + num_bytes

    def cut(self) -> None:
        """Every connection, at once."""
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink, source is far), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                if counted and self._cut_after is not None and self.passed_bytes + len(piece) > self._cut_after:
                    sink.sendall(piece[: self._cut_after - self.passed_bytes])
                    self._cut_after = None
                    break
                self.passed_bytes += len(piece) if counted else 0
                sink.sendall(piece)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()

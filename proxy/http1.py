"""Reading HTTP/1.1 replies: the head, and where the body ends.

Pure: bytes in, bytes out, no sockets. The body is never taken apart for a client that speaks HTTP/1.1; only the lines
that give the chunks' sizes are looked at, to find the end.

What `feed` lets pass ends at the end of a chunk, so that at any moment the client has whole chunks and a broken answer
can still be closed with an event of ours. Only a chunk that is longer than `hold_bytes` is let through in parts.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Protocol

MAX_HEAD_BYTES = 64 << 10
HOLD_BYTES = 64 << 10
_CRLF = b"\r\n"
_TOO_LONG = "a chunk is longer than it says"
_MAX_SIZE_LINE = 256  # hex digits and chunk extensions
_MAX_TRAILER_BYTES = 16 << 10
_SIZE_LINE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\0\r\n]*)")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n]*))?")

_OF_LENGTH = (b"content-length", b"transfer-encoding")
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)


class BadReply(ValueError):
    """The other side does not speak HTTP/1.1 as it should; its connection is of no more use."""


class Framing(Protocol):
    """Where one body ends. `done` turns true at its last byte; `surplus` says that bytes came after it."""

    done: bool
    surplus: bool

    def feed(self, data: bytes) -> bytes:
        """What may be passed on now, still framed. Raises BadReply."""

    def payload(self, passed: bytes) -> bytes:
        """The body's own bytes in what `feed` let pass. Call it for all of that, in order, or for none."""

    def ends(self) -> bool:
        """The connection has closed: is the body whole?"""

    @property
    def broken_off(self) -> bool:
        """Whether what was passed on ends inside a chunk, so that nothing of ours can follow it."""


@dataclass(slots=True)
class Chunked:
    hold_bytes: int = HOLD_BYTES
    done: bool = False
    surplus: bool = False
    _held: bytes = b""  # the beginning of a chunk
    _inside: int = 0  # bytes still to come of a chunk that is let through in parts
    _unread: int = 0  # the same for `payload`, which lags behind

    def feed(self, data: bytes) -> bytes:
        if self._held:
            data = self._held + data
            self._held = b""
        size = len(data)
        position = self._inside
        if position > size:
            self._inside -= size
            return self._opened(data)
        if not _CRLF.endswith(data[max(0, position - 2) : position]):
            raise BadReply(_TOO_LONG)
        self._inside = 0
        find = data.find
        while position < size:
            line_end = find(b"\r\n", position, position + _MAX_SIZE_LINE)
            if line_end < 0:
                return self._hold(data, position, _MAX_SIZE_LINE)
            length = chunk_length(data[position:line_end])
            if length == 0:
                return self._last(data, position, line_end)
            following = line_end + length + 4  # two CRLFs
            if following > size:
                return self._part(data, position, following)
            if not data.startswith(_CRLF, following - 2):
                raise BadReply(_TOO_LONG)
            position = following
        return data

    def _hold(self, data: bytes, position: int, limit: int) -> bytes:
        if len(data) - position > limit:
            raise BadReply("a chunk's size line or the trailer does not end")
        self._held = data[position:]
        return data[:position]

    def _part(self, data: bytes, position: int, following: int) -> bytes:
        if following - position <= self.hold_bytes:
            self._held = data[position:]
            return data[:position]
        self._inside = following - len(data)
        return self._opened(data)

    def _opened(self, data: bytes) -> bytes:
        """`data` ends inside a chunk."""
        if self._inside == 1 and not data.endswith(b"\r"):
            raise BadReply(_TOO_LONG)
        return data

    def _last(self, data: bytes, position: int, line_end: int) -> bytes:
        end = data.find(b"\r\n\r\n", line_end)  # an empty trailer: the size line's CRLF and one more
        if end < 0:
            return self._hold(data, position, _MAX_TRAILER_BYTES)
        self.done = True
        self.surplus = end + 4 < len(data)
        return data[: end + 4] if self.surplus else data

    def payload(self, passed: bytes) -> bytes:
        parts, position = [], 0
        while position < len(passed):
            if self._unread == 0:
                line_end = passed.index(b"\r\n", position)
                length = chunk_length(passed[position:line_end])
                if length == 0:
                    break
                position, self._unread = line_end + 2, length + 2
            piece = passed[position : position + self._unread]
            parts.append(piece[: max(0, self._unread - 2)])  # the chunk's closing CRLF is not of the body
            position += len(piece)
            self._unread -= len(piece)
        return b"".join(parts)

    def ends(self) -> bool:
        return self.done

    @property
    def broken_off(self) -> bool:
        return self._inside > 0


@dataclass(slots=True)
class Sized:
    """Content-Length: `remaining` bytes to come."""

    remaining: int
    done: bool = False
    surplus: bool = False

    def __post_init__(self) -> None:
        self.done = self.remaining == 0

    def feed(self, data: bytes) -> bytes:
        passed = data[: self.remaining]
        self.surplus = len(data) > self.remaining
        self.remaining -= len(passed)
        self.done = self.remaining == 0
        return passed

    def payload(self, passed: bytes) -> bytes:
        return passed

    def ends(self) -> bool:
        return self.done

    @property
    def broken_off(self) -> bool:
        return not self.done


@dataclass(slots=True)
class UntilClose:
    """A body without a length: all that comes."""

    done: bool = False
    surplus: bool = False

    def feed(self, data: bytes) -> bytes:
        return data

    def payload(self, passed: bytes) -> bytes:
        return passed

    def ends(self) -> bool:
        self.done = True
        return True

    @property
    def broken_off(self) -> bool:
        return False


@dataclass(slots=True)
class ReplyHead:
    """A reply's status and headers. `passed_headers` are the raw lines, CRLF included, that go on to the client."""

    status: int
    reason: bytes
    headers: dict[bytes, bytes]  # names in lower case; of repeated ones the last
    passed_headers: bytes
    framing: Framing
    keep_alive: bool

    @property
    def event_stream(self) -> bool:
        return self.headers.get(b"content-type", b"").startswith(b"text/event-stream")


@functools.lru_cache(maxsize=4096)
def chunk_length(line: bytes) -> int:
    """Bytes in the chunk that this size line begins. Raises BadReply."""
    match = _SIZE_LINE.fullmatch(line)
    if match is None:
        raise BadReply("a chunk's size is not a hexadecimal number")
    return int(match[1], 16)


def parse_head(raw: bytes) -> ReplyHead:
    """`raw` is the status line and headers, without the empty line. Raises BadReply."""
    lines = raw.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise BadReply("the reply does not begin with an HTTP/1 status line")
    headers, passed = _headers(lines[1:])
    status = int(match[2])
    connection = headers.get(b"connection", b"").lower()
    keep_alive = b"close" not in connection and (match[1] == b"1" or b"keep-alive" in connection)
    framing = _framing(status, headers)
    return ReplyHead(
        status, match[3] or b"", headers, passed, framing, keep_alive and not isinstance(framing, UntilClose)
    )


def _headers(lines: list[bytes]) -> tuple[dict[bytes, bytes], bytes]:
    headers: dict[bytes, bytes] = {}
    passed = bytearray()
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            raise BadReply("a header line is malformed")
        name, value = match[1].lower(), match[2].rstrip()
        if name in _OF_LENGTH and headers.get(name, value) != value:
            raise BadReply("two different lengths of the body")
        headers[name] = value
        if name not in HOP_BY_HOP and name != b"content-length":
            passed += line + b"\r\n"
    return headers, bytes(passed)


def _framing(status: int, headers: dict[bytes, bytes]) -> Framing:
    encoding, length = headers.get(b"transfer-encoding"), headers.get(b"content-length")
    if status in (204, 304) or status < 200:
        return Sized(0)
    if encoding is not None:
        if encoding.lower() != b"chunked" or length is not None:
            raise BadReply("the body's length is ambiguous")
        return Chunked()
    if length is None:
        return UntilClose()
    if not length.isdigit() or len(length) > 15:
        raise BadReply("the content length is not a number")
    return Sized(int(length))

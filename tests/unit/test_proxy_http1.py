"""Where a reply ends, whatever the pieces it comes in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.http1 import BadReply, Chunked, Sized, UntilClose, parse_head

BODIES = st.lists(st.binary(min_size=1, max_size=40), max_size=8)
TRAILERS = st.sampled_from([b"", b"X-Sum: 1\r\n", b"A: b\r\nC: d\r\n"])
EXTENSIONS = st.sampled_from([b"", b";name=value", b" ;x"])


def encode(parts: list[bytes], extension: bytes = b"", trailer: bytes = b"") -> bytes:
    chunks = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return chunks + b"0\r\n" + trailer + b"\r\n"


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if end > start]


@given(BODIES, EXTENSIONS, TRAILERS, st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from([0, 7, 65536]))
def test_chunked_bodies_pass_unchanged_and_end_at_their_end(
    parts: list[bytes], extension: bytes, trailer: bytes, cuts: list[int], hold_bytes: int
) -> None:
    data, framing, passed, payload = encode(parts, extension, trailer), Chunked(hold_bytes), b"", b""
    for piece in pieces(data, cuts):
        assert not framing.done
        out = framing.feed(piece)
        passed += out
        payload += framing.payload(out)
    assert (framing.done, framing.surplus, passed, payload) == (True, False, data, b"".join(parts))


@given(BODIES, st.lists(st.integers(0, 10_000), max_size=12), st.integers(1, 30))
def test_a_body_cut_anywhere_has_passed_only_whole_chunks(parts: list[bytes], cuts: list[int], missing: int) -> None:
    data, framing, passed = encode(parts), Chunked(), b""
    for piece in pieces(data[: max(0, len(data) - missing)], cuts):
        passed += framing.feed(piece)
    assert not framing.done
    assert not framing.ends()
    assert not framing.broken_off
    boundaries = [len(encode(parts[:count])) - len(b"0\r\n\r\n") for count in range(len(parts) + 1)]
    assert len(passed) in boundaries


def test_a_long_chunk_passes_in_parts_and_says_so() -> None:
    framing = Chunked(hold_bytes=10)
    assert framing.feed(b"20\r\n" + b"x" * 12) == b"20\r\n" + b"x" * 12
    assert framing.broken_off
    assert framing.feed(b"x" * 20 + b"\r\n0\r\n\r\n") == b"x" * 20 + b"\r\n0\r\n\r\n"
    assert framing.done


def test_bytes_after_the_end_are_kept_back_and_told() -> None:
    framing = Chunked()
    assert framing.feed(b"1\r\na\r\n0\r\n\r\nHTTP/1.1 200") == b"1\r\na\r\n0\r\n\r\n"
    assert framing.surplus
    sized = Sized(2)
    assert sized.feed(b"abc") == b"ab"
    assert sized.surplus


@pytest.mark.parametrize("line", [b"-5", b"+5", b"0x10", b"1_0", b"", b"zz", b"5 5", b"f" * 16, b"5\n"])
def test_a_chunk_size_that_is_no_hexadecimal_number_is_refused(line: bytes) -> None:
    with pytest.raises(BadReply):
        Chunked().feed(line + b"\r\nhello\r\n")


@pytest.mark.parametrize("hold_bytes", [0, 65536])
@pytest.mark.parametrize("data", [b"5\r\nhelloXX0\r\n\r\n", b"5\r\nhello\n\n0\r\n\r\n", b"5\r\nhelloX\n0\r\n\r\n"])
def test_a_chunk_longer_than_it_says_is_refused(data: bytes, hold_bytes: int) -> None:
    for cut in range(1, len(data)):
        framing = Chunked(hold_bytes)
        with pytest.raises(BadReply):
            list(map(framing.feed, pieces(data, [cut])))


def test_endless_size_lines_and_trailers_are_refused() -> None:
    with pytest.raises(BadReply):
        Chunked().feed(b"5;" + b"x" * 1000)
    with pytest.raises(BadReply):
        Chunked().feed(b"0\r\n" + b"x: y\r\n" * 5000)


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode()


def test_hop_by_hop_headers_stay_and_others_pass_as_they_stand() -> None:
    reply = parse_head(
        head("HTTP/1.1 200 OK", "X-A: 1", "Connection: keep-alive", "Keep-Alive: x", "Content-Length: 3", "x-b:2")
    )
    assert reply.passed_headers == b"X-A: 1\r\nx-b:2\r\n"
    assert (reply.status, reply.reason, reply.keep_alive, reply.framing) == (200, b"OK", True, Sized(3))


@pytest.mark.parametrize(
    ("lines", "framing", "keep_alive"),
    [
        (["HTTP/1.1 200 OK", "Transfer-Encoding: chunked"], Chunked, True),
        (["HTTP/1.1 200 OK"], UntilClose, False),
        (["HTTP/1.1 204 No Content"], Sized, True),
        (["HTTP/1.0 200 OK", "Content-Length: 1"], Sized, False),
        (["HTTP/1.0 200 OK", "Content-Length: 1", "Connection: Keep-Alive"], Sized, True),
        (["HTTP/1.1 200", "Content-Length: 1", "Connection: close"], Sized, False),
    ],
)
def test_framing_and_keep_alive_follow_the_head(lines: list[str], framing: type, keep_alive: bool) -> None:
    reply = parse_head(head(*lines))
    assert isinstance(reply.framing, framing)
    assert reply.keep_alive is keep_alive


@pytest.mark.parametrize(
    "lines",
    [
        ["HTTP/2 200 OK"],
        ["HTTP/1.1 20 OK"],
        ["hello"],
        ["HTTP/1.1 200 OK", "no colon"],
        ["HTTP/1.1 200 OK", "na me: x"],
        ["HTTP/1.1 200 OK", "X: a\nY: b"],
        ["HTTP/1.1 200 OK", "X: a", "\tY: folded"],
        ["HTTP/1.1 200 OK", "X: a\0b"],
        ["HTTP/1.1 200 OK", "Content-Length: 1", "Transfer-Encoding: chunked"],
        ["HTTP/1.1 200 OK", "Content-Length: 1", "Content-Length: 2"],
        ["HTTP/1.1 200 OK", "Content-Length: -1"],
        ["HTTP/1.1 200 OK", "Transfer-Encoding: gzip"],
        ["HTTP/1.1 200 OK", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked"],
    ],
)
def test_ambiguous_and_malformed_heads_are_refused(lines: list[str]) -> None:
    with pytest.raises(BadReply):
        parse_head(head(*lines))

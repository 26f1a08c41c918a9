"""How two engines prove to each other, over a fresh socket, that they hold the secret of their link.

    reader ── Hello: who, to whom, over what, nonce ──▶ owner
    reader ◀──────────────────────────────── nonce ──── owner     said to anybody, so it tells nothing
    reader ── HMAC(secret, "reader", hello, nonce) ───▶ owner
    reader ◀─── HMAC(secret, "owner", hello, nonce) ─── owner     or the connection closes

Both nonces are in both proofs, so nothing that was said once can be said again. A stranger has been read at most
`MAX_HELLO_BYTES` + 34 bytes.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Mapping

import msgspec

from kvtransfer.stream import receive_exactly

VERSION = 1
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_ID_BYTES = 200
MAX_HELLO_BYTES = 512


class HandshakeError(Exception):
    """The other side is not who it should be, or does not speak as it should."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    version: int
    transport: str
    reader: str
    owner: str
    nonce: bytes


def check_id(peer_id: str) -> None:
    """Raises ValueError for an id that a hello could not carry."""
    if not 0 < len(peer_id.encode()) <= MAX_ID_BYTES:
        raise ValueError(f"an engine id has 1 to {MAX_ID_BYTES} bytes, this one {len(peer_id.encode())}")


async def introduce(sock: socket.socket, transport: str, reader: str, owner: str, secret: bytes) -> bytes:
    """The reader's side, up to its proof. Returns the proof that the owner must answer with."""
    loop = asyncio.get_running_loop()
    hello = msgspec.msgpack.encode(Hello(VERSION, transport, reader, owner, secrets.token_bytes(NONCE_BYTES)))
    await loop.sock_sendall(sock, len(hello).to_bytes(2, "big") + hello)
    nonce = await receive_exactly(sock, NONCE_BYTES)
    await loop.sock_sendall(sock, _proof(secret, b"reader", hello, nonce))
    return _proof(secret, b"owner", hello, nonce)


async def examine(sock: socket.socket, transport: str, admitted: Mapping[str, bytes]) -> tuple[str, bytes]:
    """The owner's side, up to its own proof. Returns the reader's id and the proof to answer with. Raises
    HandshakeError."""
    length = int.from_bytes(await receive_exactly(sock, 2), "big")
    if length > MAX_HELLO_BYTES:
        raise HandshakeError(f"a hello of {length} bytes")
    encoded = await receive_exactly(sock, length)
    hello = _parse(encoded, transport)
    nonce = secrets.token_bytes(NONCE_BYTES)
    await asyncio.get_running_loop().sock_sendall(sock, nonce)
    claimed = await receive_exactly(sock, PROOF_BYTES)
    secret = admitted.get(hello.reader)
    # A stranger's proof is computed too, so that it cannot be told by the time whether an id is known.
    expected = _proof(secret or secrets.token_bytes(NONCE_BYTES), b"reader", encoded, nonce)
    if not hmac.compare_digest(claimed, expected) or secret is None:
        raise HandshakeError(f"{hello.reader!r} did not prove that it was admitted")
    return hello.reader, _proof(secret, b"owner", encoded, nonce)


def verify_owner(claimed: bytes, expected: bytes) -> None:
    """Raises HandshakeError when the owner's proof is wrong."""
    if not hmac.compare_digest(claimed, expected):
        raise HandshakeError("the owner did not prove that it holds this link's secret")


def _parse(encoded: bytes, transport: str) -> Hello:
    try:
        hello = msgspec.msgpack.decode(encoded, type=Hello)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise HandshakeError(f"no hello: {error}") from None
    if hello.version != VERSION or hello.transport != transport or len(hello.nonce) != NONCE_BYTES:
        raise HandshakeError(f"a hello for {hello.transport!r} version {hello.version}")
    return hello


def _proof(secret: bytes, side: bytes, hello: bytes, nonce: bytes) -> bytes:
    """The nonce has a fixed length, so the parts cannot be shifted against each other."""
    return hmac.digest(secret, side + nonce + hello, "sha256")

"""Clients that never finish what they began to say."""

from __future__ import annotations

import contextlib
import socket

import pytest

pytestmark = pytest.mark.cluster

HEAD_S = 90.0  # for a server to give up on a head that never ends; most of it passes in tests before this one


def test_heads_that_never_end_are_given_up_on(slow_clients: list[socket.socket]) -> None:
    for client in slow_clients:
        client.settimeout(HEAD_S)
        with contextlib.suppress(ConnectionError):
            while client.recv(4096):  # TimeoutError: it would wait for ever
                pass

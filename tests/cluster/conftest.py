"""Real clusters for tests: one shared by the session, or one of a test's own; their logs beside each failure."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.cluster.local_cluster import LocalCluster

StartCluster = Callable[..., LocalCluster]
LOG_CHARACTERS = 6000
CONNECT_S = 20.0


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One prefill and one decode engine, started once."""
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The shared cluster, whole again before each test and found whole after it."""
    if shared_cluster.has_losses():
        shared_cluster.revive()
    yield shared_cluster
    shared_cluster.assert_whole()


@pytest.fixture
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartCluster]:
    """Starts a cluster of the test's own: the arguments of LocalCluster but the first."""
    with ExitStack() as stack:

        def start(**arguments: Any) -> LocalCluster:
            return stack.enter_context(LocalCluster(tmp_path_factory.mktemp("cluster"), **arguments))

        yield start


@pytest.fixture(scope="session")
def slow_clients(shared_cluster: LocalCluster) -> Iterator[list[socket.socket]]:
    """A connection to each process whose request head never ends."""
    with ExitStack() as stack:
        clients = []
        for name in ("proxy", *shared_cluster.engines):
            parts = urlsplit(shared_cluster.url(name))
            address = (parts.hostname or "", parts.port or 0)
            clients.append(stack.enter_context(socket.create_connection(address, CONNECT_S)))
            clients[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        yield clients


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for cluster in _clusters(item):
            report.sections += [(f"log of {name}", text[-LOG_CHARACTERS:]) for name, text in cluster.logs().items()]
    return report


def _clusters(item: pytest.Function) -> list[LocalCluster]:
    """Each cluster that the test was given, once."""
    values = getattr(item, "funcargs", {}).values()
    return list({id(value): value for value in values if isinstance(value, LocalCluster)}.values())

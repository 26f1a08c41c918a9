"""The node table: what puts a node out and lets it in, what a registration changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import msgspec
import pytest

from engine.api.distserve import EngineRole, Status
from engine.api.errors import InvalidRequest, NotFound, Unavailable
from proxy.exchange import Loss, UpstreamFailed
from proxy.nodes import Node, NodeTable

URL = "http://127.0.0.1:1"


@dataclass(eq=False)
class Clock:
    """Stands for the node's connections, of which the table asks the time alone."""

    seconds: float = 1000.0

    def now(self) -> float:
        return self.seconds

    def fail_unstarted(self, reason: str) -> None:
        pass


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> NodeTable:
    return NodeTable("power_of_two", lambda url: cast(Any, clock))


def status(*models: str, incarnation: str | None = None, role: EngineRole = EngineRole.HYBRID) -> Status:
    return Status(role=role, models=list(models), incarnation=msgspec.UNSET if incarnation is None else incarnation)


@pytest.fixture
def node(table: NodeTable) -> Node:
    return table.add(URL, status("m", incarnation="1"))


def failure(loss: Loss) -> UpstreamFailed:
    return UpstreamFailed(loss, "told")


@pytest.mark.parametrize("code", [200, 400, 404, 422, 429, 503])
def test_what_says_nothing_against_a_node_leaves_it_in(node: Node, code: int) -> None:
    for _ in range(10):
        node.answered(code)
    assert (node.up, node.fault_counts) == (True, {})


def test_three_faults_in_a_row_put_it_out(node: Node) -> None:
    for code in (500, 502, 400, 500, 500):  # the 400 is an answer, and begins anew
        node.answered(code)
        assert node.up
    node.failed(failure(Loss.TIMEOUT))
    assert not node.up


@pytest.mark.parametrize("loss", [Loss.REFUSED, Loss.UNREACHABLE])
def test_one_unanswered_connection_puts_it_out(node: Node, loss: Loss) -> None:
    node.failed(failure(loss))
    assert not node.up


def test_429_and_503_neither_help_nor_hurt(node: Node) -> None:
    for code in (500, 429, 500, 503, 500):
        node.answered(code)
    assert not node.up


def test_the_oftener_a_node_fails_the_longer_it_stays_out(table: NodeTable, node: Node, clock: Clock) -> None:
    stays = []
    for _ in range(5):
        for _ in range(3):
            node.answered(500)
        began = clock.seconds
        while not node.up:
            clock.seconds += 0.05
            table.let_in(node)
        stays.append(round(clock.seconds - began, 1))
    assert stays == pytest.approx([0.25, 0.5, 1.0, 2.0, 2.0], abs=0.06)


def test_a_refused_node_is_in_as_soon_as_it_answers(table: NodeTable, node: Node) -> None:
    node.failed(failure(Loss.REFUSED))
    table.let_in(node)
    assert node.up


def test_old_latencies_are_forgotten(node: Node, clock: Clock) -> None:
    node.served(0.5)
    node.served(1.5)
    assert node.recent_latency == 1.0
    clock.seconds += 31
    assert node.recent_latency is None
    assert node.status().latency == [0.5, 1.5]


def test_a_heartbeat_keeps_the_node_and_its_counts(table: NodeTable, node: Node) -> None:
    changes: list[None] = []
    table.on_change = lambda: changes.append(None)
    table.reserve([node])
    assert table.add(URL, status("m", incarnation="1")) is node
    assert (node.unfinished, changes) == (1, [])
    table.add(URL, status("m", "n", incarnation="1"))
    assert (table.models, len(changes)) == (["m", "n"], 1)


@pytest.mark.parametrize("incarnation", ["2", None])
def test_another_incarnation_is_another_node(table: NodeTable, node: Node, incarnation: str | None) -> None:
    node.put_out("dead")
    other = table.add(URL, status("m", incarnation=incarnation))
    assert other is not node
    assert other.up
    assert table.all() == [other]


def test_a_model_is_found_by_name_or_by_being_the_only_one(table: NodeTable) -> None:
    with pytest.raises(Unavailable):
        table.serving("m")
    one = table.add(URL, status("m"))
    assert table.serving("m") == table.serving(None) == [one]
    with pytest.raises(NotFound):
        table.serving("other")
    table.add(URL + "1", status("n"))
    with pytest.raises(InvalidRequest):
        table.serving(None)


def test_choice_and_count_are_one_step(table: NodeTable, node: Node) -> None:
    other = table.add(URL + "1", status("m"))
    for _ in range(100):
        table.reserve([node, other])
    assert node.unfinished + other.unfinished == 100
    assert abs(node.unfinished - other.unfinished) <= 1  # each choice saw all those before it


def test_a_removed_node_stays_removed_whatever_its_last_requests_find(table: NodeTable, node: Node) -> None:
    table.remove(URL)
    node.failed(failure(Loss.REFUSED))
    assert node.out_because == "removed"

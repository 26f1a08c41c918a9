"""The cluster's routes: engines come and go, links are warmed up, forgotten KV is collected.

Bodies and replies are LMDeploy's, byte for byte: its tools and ours can be used on either proxy.
"""

from __future__ import annotations

from collections import Counter

import msgspec
from aiohttp import web

from engine.api.decoding import decode_json
from engine.api.distserve import HEARTBEAT_HEADER, Status, WarmupResponse
from engine.api.distserve import Node as Registration
from engine.api.errors import TandemError, Unavailable
from proxy.exchange import Loss, UpstreamFailed
from proxy.nodes import Node
from proxy.service import SERVICE, Service

ASK_DEADLINE_S = 5.0


class EngineRefused(TandemError):
    """An engine would not do what it was asked to."""

    status = 502
    label = "engine_refused"


class _Model(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    """GET /v1/models of an engine."""

    data: list[_Model]


async def add(request: web.Request) -> web.Response:
    """Also the heartbeat: the same registration again changes nothing."""
    service, registration = request.app[SERVICE], decode_json(await request.read(), Registration)
    status = registration.status or Status()
    if not status.models:
        status = msgspec.structs.replace(status, models=await _ask_models(service, registration.url))
    service.nodes.add(registration.url, status)
    reply = _reply("Added successfully")
    reply.headers[HEARTBEAT_HEADER] = "1"
    return reply


async def _ask_models(service: Service, url: str) -> list[str]:
    """Raises Unavailable when nobody there can say."""
    upstream = service.upstream(url)
    try:
        answer = await upstream.call("GET", "/v1/models", timeout_s=ASK_DEADLINE_S)
        if answer.status != 200:
            raise Unavailable(f"{url}/v1/models answered {answer.status}, so its models are unknown")
        return [model.id for model in msgspec.json.decode(answer.body, type=_Models).data]
    except UpstreamFailed as error:
        raise Unavailable(f"Its models are unknown: {error.message}") from None
    except msgspec.DecodeError:
        raise Unavailable(f"{url}/v1/models did not answer with a list of models") from None
    finally:
        upstream.close()


async def remove(request: web.Request) -> web.Response:
    registration = decode_json(await request.read(), Registration)
    request.app[SERVICE].nodes.remove(registration.url)
    return _reply("Deleted successfully")


async def terminate(request: web.Request) -> web.Response:
    service, registration = request.app[SERVICE], decode_json(await request.read(), Registration)
    await _terminate(service, service.nodes.get(registration.url))
    return _reply("Terminated successfully")


async def terminate_all(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    failures = []
    for node in service.nodes.all():
        try:
            await _terminate(service, node)
        except TandemError as error:
            failures.append(error.message)
    if failures:
        raise EngineRefused("; ".join(failures))
    return _reply("All nodes terminated successfully")


async def _terminate(service: Service, node: Node) -> None:
    """Ends the engine and forgets it; one that is gone already is only forgotten."""
    try:
        answer = await node.upstream.call("GET", "/terminate", timeout_s=ASK_DEADLINE_S)
        if answer.status == 405:
            answer = await node.upstream.call("POST", "/terminate", timeout_s=ASK_DEADLINE_S)
    except UpstreamFailed as error:
        if error.loss not in (Loss.REFUSED, Loss.RESET):
            raise
    else:
        if answer.status != 200:
            said = answer.body[:200].decode(errors="replace")
            raise EngineRefused(f"{node.url} will not terminate: {answer.status} {said}")
    if node in service.nodes.all():  # it may have said goodbye itself
        service.nodes.remove(node.url)


async def status(request: web.Request) -> web.Response:
    return _reply(request.app[SERVICE].nodes.status())


async def overview(request: web.Request) -> web.Response:
    """What the status page shows: more than LMDeploy's status, and ours to change."""
    service = request.app[SERVICE]
    return _reply(
        {
            "in_flight": service.admission.under_way,
            "queued": service.admission.queued,
            "requests": sum(service.metrics.requests.values()),
            "handoffs": service.metrics.handoffs,
            "nodes": [_node_view(node) for node in service.nodes.all()],
            "links": [
                {
                    "prefill": link.pair.prefill,
                    "decode": link.pair.decode,
                    "state": link.state,
                    "order": "concurrent" if link.concurrent else "sequential",
                    "reason": link.reason,
                    "connect_ms": round(link.connect_seconds * 1e3, 1),
                }
                for link in service.links.all()
            ],
        }
    )


def _node_view(node: Node) -> dict[str, object]:
    return {
        "url": node.url,
        "role": node.role.name.lower(),
        "models": node.models,
        "up": node.up,
        "out_because": node.out_because,
        "incarnation": node.incarnation,
        "unfinished": node.unfinished,
        "requests": node.requests,
        "latency_s": node.recent_latency,
        "faults": node.fault_counts,
    }


async def warm_up(request: web.Request) -> web.Response:
    await request.app[SERVICE].links.warm_up()
    return _reply(WarmupResponse())


async def collect(request: web.Request) -> web.Response:
    left = await request.app[SERVICE].leases.collect()
    if left:
        raise Unavailable(f"{left} sessions could not be freed: their engines do not answer")
    return _reply(WarmupResponse())


async def health(request: web.Request) -> web.Response:
    """200 while the proxy lives; the body says what it could serve."""
    service = request.app[SERVICE]
    pools: dict[str, Counter[str]] = {role: Counter(up=0, total=0) for role in ("hybrid", "prefill", "decode")}
    for node in service.nodes.all():
        pools[node.role.name.lower()].update(up=int(node.up), total=1)
    links = dict.fromkeys(("connecting", "connected", "failed"), 0) | service.links.counts()
    return _reply({"status": "ok", "models": service.nodes.models, "pools": pools, "links": links})


async def metrics(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    service.metrics.in_flight, service.metrics.queued = service.admission.under_way, service.admission.queued
    text = service.metrics.text(service.nodes.all(), service.links.counts())
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _reply(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")

"""The cluster's wire, byte for byte: registrations and their replies, and what engines are asked at a handshake."""

from __future__ import annotations

import asyncio
import json

import pytest
from proxy_process import ProxyProcess
from scripted_engine import CONFIG, Asked, ScriptedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS, BODY = "/v1/completions", {"model": "m", "prompt": "Hi"}


async def text(proxy: ProxyProcess, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    async with proxy.session.request(method, proxy.url + path, data=body) as reply:
        return reply.status, await reply.text()


# nodes


async def test_replies_are_lmdeploys_to_the_byte(proxy: ProxyProcess) -> None:
    async with ScriptedEngine() as engine:
        add = b'{"url":"%b","status":{"role":2,"models":["m"],"unfinished":0,"latency":[],"speed":null}}'
        url = engine.url.encode()
        assert await text(proxy, "POST", "/nodes/add", add % url) == (200, '"Added successfully"')
        known = '":{"role":2,"models":["m"],"unfinished":0,"latency":[],"speed":null}}'
        assert await text(proxy, "GET", "/nodes/status") == (200, '{"' + engine.url + known)
        node = b'{"url":"%b"}' % url
        assert await text(proxy, "POST", "/nodes/remove", node) == (200, '"Deleted successfully"')
        assert await text(proxy, "GET", "/nodes/status") == (200, "{}")
        await proxy.add(engine)
        assert await text(proxy, "POST", "/nodes/terminate", node) == (200, '"Terminated successfully"')
        await proxy.add(engine)
        assert await text(proxy, "GET", "/nodes/terminate_all") == (200, '"All nodes terminated successfully"')
        assert len(engine.requests("/terminate")) == 2
        assert await text(proxy, "POST", "/distserve/connection_warmup") == (200, '{"SUCCESS":true}')
        assert await text(proxy, "POST", "/distserve/gc") == (200, '{"SUCCESS":true}')


async def test_status_counts_and_keeps_the_last_fifteen_latencies(proxy: ProxyProcess) -> None:
    async with ScriptedEngine() as engine:
        await proxy.post("/nodes/add", {"url": engine.url, "status": {"models": ["m"], "speed": 12}})
        for _ in range(17):
            await proxy.post(COMPLETIONS, BODY)
        status = (await proxy.get("/nodes/status"))[1][engine.url]
        assert (status["role"], status["speed"], status["unfinished"], len(status["latency"])) == (1, 12, 0, 15)
        assert all(0 < seconds < 2 for seconds in status["latency"])


async def test_a_node_that_says_nothing_of_itself_is_asked(proxy: ProxyProcess) -> None:
    async with ScriptedEngine() as engine:
        assert await proxy.post("/nodes/add", {"url": engine.url}) == (200, "Added successfully")
        assert (await proxy.get("/nodes/status"))[1][engine.url]["models"] == ["m"]
    status, reply = await proxy.post("/nodes/add", {"url": "http://127.0.0.1:1"})
    assert (status, reply["type"], reply["code"]) == (503, "server_error", 503)


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/nodes/add", b"{", 400, "invalid_request_error"),
        ("/nodes/add", b"{}", 400, "invalid_request_error"),
        ("/nodes/add", b'{"url":"x"}', 400, "invalid_request_error"),
        ("/nodes/add", b'{"url":"http://a b"}', 400, "invalid_request_error"),
        ("/nodes/add", b'{"url":"http://h:1\\r\\nX: y","status":{"models":["m"]}}', 400, "invalid_request_error"),
        ("/nodes/add", b'{"url":"http://h:99999","status":{"models":["m"]}}', 400, "invalid_request_error"),
        ("/nodes/add", b'{"url":"file:///etc/passwd","status":{"models":["m"]}}', 400, "invalid_request_error"),
        ("/nodes/add", b'{"url":"http://h:1","status":{"role":9}}', 400, "invalid_request_error"),
        ("/nodes/remove", b'{"url":"http://nobody:1"}', 404, "not_found_error"),
        ("/nodes/terminate", b'{"url":"http://nobody:1"}', 404, "not_found_error"),
        ("/nodes/nonsense", b"{}", 404, "not_found_error"),
        ("/nodes/status", b"{}", 405, "invalid_request_error"),
    ],
)
async def test_errors_are_flat(proxy: ProxyProcess, path: str, body: bytes, status: int, kind: str) -> None:
    got, reply = await proxy.post(path, body)
    assert got == status
    expected = {"message": reply["message"], "type": kind, "code": status, "param": None, "object": "error"}
    assert reply == expected
    assert (await proxy.get("/nodes/status"))[1] == {}


async def test_an_engine_that_will_not_terminate_stays(proxy: ProxyProcess) -> None:
    async def refusing(asked: Asked) -> None:
        asked.reply(403, {"message": "not allowed here"})

    async with ScriptedEngine() as engine:
        engine.scripts["/terminate"] = refusing
        await proxy.add(engine)
        for method, path in (("POST", "/nodes/terminate"), ("GET", "/nodes/terminate_all")):
            status, reply = await text(proxy, method, path, json.dumps({"url": engine.url}).encode())
            assert (status, "not allowed here" in reply) == (502, True)
        assert engine.url in (await proxy.get("/nodes/status"))[1]


# links


async def test_the_handshake_is_lmdeploys(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("p", ours=False) as prefill, ScriptedEngine("d") as decode:  # both ways of engine_info
        await proxy.pair(prefill, decode)
        for engine, peer in ((prefill, decode), (decode, prefill)):
            asked = [asked for asked in engine.asked if asked.path.startswith("/distserve/")]
            assert [(one.method, one.path) for one in asked] == [
                ("GET", "/distserve/engine_info"),
                ("POST", "/distserve/p2p_initialize"),
                ("POST", "/distserve/p2p_connect"),
            ]
            assert asked[1].json == {
                "local_engine_id": engine.url,
                "local_engine_config": CONFIG,
                "remote_engine_id": peer.url,
                "remote_engine_config": CONFIG,
                "protocol": 2,
                "rank": None,
                "tcp_config": None,
                "rdma_config": {"with_gdr": True, "link_type": 2},
                "nvlink_config": None,
            }
            info = {"tandem": 1, "name": "d"} if peer is decode else {"mr": "somebody else's"}
            assert asked[2].json == {
                "protocol": 2,
                "remote_engine_id": peer.url,
                "remote_engine_endpoint_info": {"zmq_address": f"tcp://{peer.name}:1"},
                "remote_kvtransfer_endpoint_info": [{"protocol": 2, "endpoint_info": json.dumps(info)}],
            }


async def test_pairs_are_linked_before_any_request(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        await proxy.add(prefill, "prefill", "1")
        await proxy.add(decode, "decode", "1")
        await prefill.when_asked("/distserve/p2p_connect")
        await decode.when_asked("/distserve/p2p_connect")


async def test_many_early_requests_share_one_handshake(proxy: ProxyProcess) -> None:
    linking = asyncio.Event()

    async def slow(asked: Asked) -> None:
        await linking.wait()
        asked.reply(200, json.dumps(CONFIG))

    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        prefill.scripts["/distserve/engine_info"] = slow
        await proxy.add(prefill, "prefill", "1")
        await proxy.add(decode, "decode", "1")
        asking = [asyncio.create_task(proxy.post(COMPLETIONS, BODY)) for _ in range(20)]
        await prefill.when_asked("/distserve/engine_info")
        linking.set()
        assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 20
        assert len(prefill.requests("/distserve/p2p_initialize")) == 1
        assert all("x-tandem-handoff" in asked.headers for asked in decode.requests(COMPLETIONS))


async def test_a_heartbeat_changes_nothing(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        await proxy.pair(prefill, decode)
        for _ in range(5):
            await proxy.pair(prefill, decode)
        assert len(prefill.requests("/distserve/p2p_initialize")) == 1


@pytest.mark.parametrize("incarnation", ["p-2", None])
async def test_a_restarted_engine_is_linked_anew_after_a_teardown(proxy: ProxyProcess, incarnation: str | None) -> None:
    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        await proxy.pair(prefill, decode)
        await proxy.add(prefill, "prefill", incarnation)
        await decode.when_asked("/distserve/p2p_connect", times=2)
        paths = [asked.path.removeprefix("/distserve/") for asked in decode.asked if "distserve" in asked.path]
        once = ["engine_info", "p2p_initialize", "p2p_connect"]
        assert paths == [*once, "p2p_drop_connect", *once]
        drop = decode.requests("/distserve/p2p_drop_connect")[0].json
        assert drop == {"engine_id": decode.url, "remote_engine_id": prefill.url}


async def test_a_removed_engine_is_dropped_on_both_sides(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        await proxy.pair(prefill, decode)
        await proxy.post("/nodes/remove", {"url": prefill.url})
        for engine, peer in ((prefill, decode), (decode, prefill)):
            dropped = (await engine.when_asked("/distserve/p2p_drop_connect")).json
            assert dropped == {"engine_id": engine.url, "remote_engine_id": peer.url}


async def test_a_failed_handshake_is_tried_again_by_itself(proxy: ProxyProcess) -> None:
    async def failing_once(asked: Asked) -> None:
        if len(prefill.requests("/distserve/p2p_initialize")) == 1:
            asked.reply(500, {"message": "not yet"})
        else:
            await prefill._distserve_p2p_initialize(asked)

    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        prefill.scripts["/distserve/p2p_initialize"] = failing_once
        await proxy.add(prefill, "prefill", "1")
        await proxy.add(decode, "decode", "1")
        await decode.when_asked("/distserve/p2p_connect")
        assert await proxy.post("/distserve/connection_warmup", {}) == (200, {"SUCCESS": True})


# what people look at


async def test_health_tells_what_could_be_served(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        await proxy.pair(prefill, decode)
        status, reply = await proxy.get("/health")
        assert (status, reply["status"], reply["models"]) == (200, "ok", ["m"])
        assert reply["pools"]["prefill"] == reply["pools"]["decode"] == {"up": 1, "total": 1}
        assert reply["links"] == {"connecting": 0, "connected": 1, "failed": 0}


async def test_pages_need_nothing_from_elsewhere(proxy: ProxyProcess) -> None:
    for path in ("/", "/docs"):
        status, page = await text(proxy, "GET", path)
        assert status == 200
        assert "http://" not in page
        assert "https://" not in page
        assert "src=" not in page


async def test_every_route_is_described(proxy: ProxyProcess) -> None:
    _, api = await proxy.get("/openapi.json")
    assert api["paths"]["/nodes/add"]["post"]["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Node"
    }
    assert {"/v1/chat/completions", "/nodes/status", "/distserve/gc", "/metrics"} <= api["paths"].keys()

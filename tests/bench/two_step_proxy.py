"""The smallest proxy for vLLM's pair, by its KV-transfer parameters: the prompt to one server, the answer by the other.

vLLM's own example does the same. The prompt goes to the prefill server for one token, marked to be continued elsewhere;
what that server says of its KV goes with the request to the decode server, whose stream is passed on as it comes.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

from aiohttp import ClientConnectorError, ClientSession, ClientTimeout, TCPConnector, web

TIMEOUT_S = 600.0
READ_BYTES = 1 << 16
SESSION = web.AppKey("session", ClientSession)
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Proxy:
    def __init__(self, prefill: str, decode: str) -> None:
        self.prefill, self.decode = prefill, decode

    async def complete(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._complete(request)
        except ClientConnectorError as error:
            return web.Response(status=503, text=str(error))

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        session, body = request.app[SESSION], await request.json()
        asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": REMOTE_DECODE}
        asked.pop("stream_options", None)
        async with session.post(f"{self.prefill}/v1/completions", json=asked) as reply:
            if reply.status != 200:
                return web.Response(status=reply.status, body=await reply.read())
            given = (await reply.json())["kv_transfer_params"]
        async with session.post(f"{self.decode}/v1/completions", json={**body, "kv_transfer_params": given}) as reply:
            response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.content_type})
            await response.prepare(request)
            async for part in reply.content.iter_any():
                await response.write(part)
            await response.write_eof()
            return response

    async def models(self, request: web.Request) -> web.Response:
        async with request.app[SESSION].get(f"{self.decode}/v1/models") as reply:
            return web.Response(status=reply.status, body=await reply.read(), content_type="application/json")


async def with_session(app: web.Application) -> AsyncIterator[None]:
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=TIMEOUT_S)) as session:
        app[SESSION] = session
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    args = parser.parse_args()
    proxy, app = Proxy(args.prefill, args.decode), web.Application()
    app.cleanup_ctx.append(with_session)
    app.add_routes([web.post("/v1/completions", proxy.complete), web.get("/v1/models", proxy.models)])
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()

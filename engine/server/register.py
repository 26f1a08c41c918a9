"""Keeps this engine known to its proxy, for as long as it serves.

The heartbeat *is* the registration: the same idempotent POST /nodes/add every few seconds. A proxy that was restarted,
or that has dropped us, learns of us again with the next one; nothing has to be noticed first.

LMDeploy's proxy takes a repeated /nodes/add for another engine, and drops the links and the counts of the one it had. A
proxy that does not say that it takes heartbeats is therefore asked for its list, and told again only when we are not on
it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

import aiohttp

from engine.api.distserve import HEARTBEAT_HEADER

log = logging.getLogger("engine.register")

FIRST_RETRY_S = 0.1
ATTEMPT_DEADLINE_S = 5.0
LEAVE_DEADLINE_S = 2.0

NodeStatus = dict[str, object]  # role, models, speed …: what /nodes/add calls `status`


class Registration:
    """`async with` it while listening: registered soon after entry, heartbeats inside, deregistered on exit.

    `status` is asked anew for every heartbeat. An unreachable proxy is retried for ever; each change of fortune is one
    log line.
    """

    def __init__(
        self, proxy_url: str, url: str, status: Callable[[], NodeStatus], key: str | None, heartbeat_seconds: float
    ) -> None:
        self._proxy_url = proxy_url
        self._url = url
        self._status = status
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._heartbeat_seconds = heartbeat_seconds
        self._said = ""
        self._takes_heartbeats = True
        self.registered = asyncio.Event()  # set while the last heartbeat was accepted

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(ATTEMPT_DEADLINE_S))
        self._task = asyncio.create_task(self._keep_registered(), name="heartbeat")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.fall_silent()
        try:
            await self._leave()  # always: the proxy may have taken us in a heartbeat whose answer we did not wait for
        finally:
            await self._session.close()

    async def fall_silent(self) -> None:
        """No more heartbeats: a draining engine must not be taken for one that is back."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _keep_registered(self) -> None:
        delay_s = min(FIRST_RETRY_S, self._heartbeat_seconds)
        while True:
            await self._beat()
            settled = self.registered.is_set()
            delay_s = self._heartbeat_seconds if settled else min(delay_s * 2, self._heartbeat_seconds)
            await asyncio.sleep(delay_s)

    async def _beat(self) -> None:
        if not self._takes_heartbeats and await self._is_listed():
            return
        refusal = await self._post("/nodes/add", {"url": self._url, "status": self._status()})
        if refusal is None:
            self.registered.set()
            self._say(logging.INFO, f"registered with the proxy {self._proxy_url} as {self._url}")
        else:
            self.registered.clear()
            self._say(
                logging.WARNING, f"the proxy {self._proxy_url} {refusal}; trying again until it takes this engine"
            )

    async def _is_listed(self) -> bool:
        """Whether the proxy knows us; a proxy that does not say is told again, and what goes wrong is seen then."""
        try:
            async with self._session.get(self._proxy_url + "/nodes/status") as reply:
                nodes = await reply.json()
                return reply.status == 200 and self._url in nodes
        except (TimeoutError, aiohttp.ClientError, ValueError, TypeError):
            return False

    async def _leave(self) -> None:
        self.registered.clear()
        try:
            async with asyncio.timeout(LEAVE_DEADLINE_S):
                refusal = await self._post("/nodes/remove", {"url": self._url})
        except TimeoutError:
            refusal = f"did not answer within {LEAVE_DEADLINE_S:g} s"
        log.info("left the proxy %s%s", self._proxy_url, f", which {refusal}" if refusal else "")

    async def _post(self, path: str, body: dict[str, object]) -> str | None:
        """None when the proxy agreed, else what it did instead."""
        try:
            async with self._session.post(self._proxy_url + path, json=body) as reply:
                text = (await reply.content.read(200)).decode(errors="replace")
                self._takes_heartbeats = HEARTBEAT_HEADER in reply.headers
                return None if reply.status == 200 else f"refused this engine with {reply.status}: {text}"
        except TimeoutError:
            return f"did not answer within {ATTEMPT_DEADLINE_S:g} s"
        except aiohttp.ClientConnectorError as error:
            return f"cannot be reached ({error.strerror})"
        except aiohttp.ClientError as error:
            return f"broke the connection ({error})"

    def _say(self, level: int, line: str) -> None:
        """Once for each change, not once for each heartbeat."""
        if line != self._said:
            log.log(level, line)
            self._said = line

"""Keeps this engine known to its proxy, for as long as it serves.

The heartbeat *is* the registration: the same idempotent POST /nodes/add every few seconds. A proxy that was restarted,
or that has dropped us, learns of us again with the next one; nothing has to be noticed first.

LMDeploy's proxy takes a repeated /nodes/add for another engine, and drops the links and the counts of the one it had. A
proxy that does not say that it takes heartbeats is therefore asked for its list, and told again only when we are not on
it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import aiohttp

from engine.api.distserve import HEARTBEAT_HEADER

log = logging.getLogger("engine.register")

FIRST_RETRY_S = 0.25
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


def reachable_url(scheme: str, host: str, port: int, proxy_url: str | None) -> str:
    """Where others reach a server on (host, port): a wildcard host becomes this machine's address towards the proxy."""
    if host in ("", "0.0.0.0", "::"):
        host = _address_towards(proxy_url)
    return f"{scheme}://{f'[{host}]' if _is_ipv6(host) else host}:{port}"


def _address_towards(proxy_url: str | None) -> str:
    """This machine's address on the route to the proxy; without one, on the default route. No packet is sent."""
    targets = [(urlsplit(proxy_url).hostname or "", 9)] if proxy_url else []
    for host, port in [*targets, ("192.0.2.1", 9)]:  # the second is reserved for documentation: it only picks a route
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as error:
            log.warning("no route to %s (%s); set --advertise-url if the proxy cannot reach this engine", host, error)
    return "127.0.0.1"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:  # a name
        return False

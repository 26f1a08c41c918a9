"""A request's body, bounded in size and in time."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from engine.api.errors import BodyTimeout, InvalidRequest, TooLarge
from engine.server.service import SERVICE

BODY_DEADLINE_S: Final = 60.0


async def read_body(request: web.Request) -> bytes:
    """Whatever its content type says.

    Raises TooLarge (before reading, where the length is announced), BodyTimeout, or InvalidRequest for a bad encoding.
    """
    limit = int(request.app[SERVICE].settings.max_body_bytes)
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            return await _read_up_to(request, limit)
    except TimeoutError as error:
        raise BodyTimeout(f"The body did not arrive within {BODY_DEADLINE_S:g} s") from error
    except web.RequestPayloadError as error:
        raise InvalidRequest("The body cannot be decoded as its Content-Encoding or Transfer-Encoding says") from error


async def _read_up_to(request: web.Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.content.iter_any():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is longer than {limit} bytes, the most this server takes")

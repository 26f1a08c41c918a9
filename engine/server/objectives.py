"""When a client wants its tokens: two headers that the scheduler heeds as far as it can."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aiohttp import web

from engine.api.errors import InvalidRequest
from engine.config import EngineSettings

TTFT_HEADER = "X-SLO-TTFT-MS"
TPOT_HEADER = "X-SLO-TPOT-MS"


@dataclass(frozen=True, slots=True)
class Objectives:
    """Milliseconds; None: whenever it comes."""

    ttft_ms: float | None = None  # until the first token
    tpot_ms: float | None = None  # between any two


def objectives_of(request: web.Request, settings: EngineSettings) -> Objectives:
    """The request's own, else the engine's. Raises InvalidRequest for a header that is no positive number."""
    return Objectives(
        _milliseconds(request, TTFT_HEADER, settings.slo_ttft_ms),
        _milliseconds(request, TPOT_HEADER, settings.slo_tpot_ms),
    )


def _milliseconds(request: web.Request, header: str, default: float | None) -> float | None:
    text = request.headers.get(header)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InvalidRequest(f"{header} is {text[:40]!r}, expected a positive number of milliseconds", param=header)
    return value

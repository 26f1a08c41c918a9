"""What a request wants of its tokens' times: its own word, else the engine's."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from engine.api.errors import InvalidRequest
from engine.config import EngineSettings
from engine.server.objectives import Objectives, objectives_of

NONE = EngineSettings(model="smollm2")
BOTH = EngineSettings(model="smollm2", slo_ttft_ms=200, slo_tpot_ms=40)


def wanted(settings: EngineSettings, **headers: str) -> Objectives:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return objectives_of(make_mocked_request("POST", "/v1/completions", headers=named), settings)


def test_nothing_is_wanted_where_nobody_says() -> None:
    assert wanted(NONE) == Objectives(None, None)


def test_the_engines_wishes_hold_where_a_request_has_none() -> None:
    assert wanted(BOTH) == Objectives(200, 40)
    assert wanted(BOTH, X_SLO_TPOT_MS="15.5") == Objectives(200, 15.5)


@pytest.mark.parametrize("text", ["0", "-3", "soon", "nan", "inf"])
def test_what_is_no_time_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match="X-SLO-TTFT-MS"):
        wanted(BOTH, X_SLO_TTFT_MS=text)

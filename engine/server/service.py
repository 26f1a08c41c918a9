"""What every handler works with, and the keys under which aiohttp keeps it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from importlib import metadata

from aiohttp import web

from engine.api.errors import NotFound
from engine.client import CoreClient
from engine.config import EngineSettings
from engine.observe.metrics import EngineMetrics
from engine.text.tokenizer import Tokenizer


def version() -> str:
    try:
        return metadata.version("tandem")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0+checkout"


@dataclass(frozen=True, slots=True)
class Service:
    """One engine, as its API process sees it."""

    settings: EngineSettings
    client: CoreClient
    tokenizer: Tokenizer
    metrics: EngineMetrics
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    @property
    def model_name(self) -> str:
        return self.settings.model_name

    def check_model(self, name: str | None) -> None:
        """No name means ours. Raises NotFound."""
        if name is not None and name != self.model_name:
            raise NotFound(
                f"There is no model {name[:200]!r} here; this engine serves {self.model_name!r}",
                param="model",
                code="model_not_found",
            )


def fingerprint(client: CoreClient) -> str:
    """Changes when anything does that may change sampled tokens."""
    model = client.model
    identity = f"{version()} {model.name} {model.num_parameters} {model.dtype} {model.quantization} {model.device}"
    return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]


REQUEST_ID_HEADER = "X-Request-Id"

SERVICE = web.AppKey("service", Service)
REQUEST_ID = web.RequestKey("request_id", str)
STREAM = web.RequestKey("stream", web.StreamResponse)  # there once an answer's head has been sent


def adopt_request_id(request: web.Request, given: str | None) -> None:
    """A body may name its request too; the header, being outside, wins."""
    if given is not None and REQUEST_ID_HEADER not in request.headers:
        request[REQUEST_ID] = given

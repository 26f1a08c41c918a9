"""Every setting of the proxy, in the order `proxy --help` shows them.

LMDeploy's and vLLM's flag names are accepted beside ours, so that a start script written for them keeps working.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, SecretStr, field_validator, model_validator

from engine.api.settings import Settings, setting

RoutingStrategy = Literal["power_of_two", "random", "min_expected_latency", "min_observed_latency"]


class ProxySettings(Settings):
    """Frozen. From flags, TANDEM_PROXY_* and `--config`; see `engine.api.settings`."""

    env_prefix = "TANDEM_PROXY_"

    # Network
    host: str = setting("127.0.0.1", "address to listen on", group="Network", aliases=("server_name",), unit="address")
    port: int = setting(8000, "port to listen on", group="Network", aliases=("server_port",), ge=0, le=65535)
    ssl_certfile: Path | None = setting(None, "serve HTTPS with this certificate (PEM)", group="Network")
    ssl_keyfile: Path | None = setting(None, "its private key (PEM)", group="Network")

    # Keys
    api_key: tuple[SecretStr, ...] = setting(
        (), "a key that opens the user routes; none: open to all", group="Keys", aliases=("api_keys",)
    )
    cluster_key: SecretStr | None = setting(
        None,
        "opens /nodes and /distserve, and is what engines are shown; none: open to all [env TANDEM_CLUSTER_KEY]",
        group="Keys",
        env="TANDEM_CLUSTER_KEY",
    )

    # Serving
    routing_strategy: RoutingStrategy = setting("power_of_two", "how a node is picked within its pool", group="Serving")
    serving_strategy: Literal["auto", "Hybrid", "DistServe"] = setting(
        "auto",
        "Hybrid: a request stays on one engine; otherwise a prefill and a decode engine share it where there are both",
        group="Serving",
    )
    handoff: Literal["auto", "concurrent", "sequential"] = setting(
        "auto",
        "sequential: prefill whole, then decode (LMDeploy's order); concurrent: both at once; "
        "auto: concurrent wherever both engines can",
        group="Serving",
    )
    migration_protocol: Literal["TCP", "RDMA", "NVLINK"] = setting(
        "RDMA", "asked of engines; a preference for engines of ours, which use the best both offer", group="Serving"
    )
    link_type: Literal["IB", "RoCE"] = setting("RoCE", "of RDMA", group="Serving")
    disable_gdr: bool = setting(False, "ask engines to do RDMA without GPU-direct", group="Serving")
    dummy_prefill: bool = setting(False, "for measuring: decode engines do without any prefill engine", group="Serving")
    disable_cache_status: bool = setting(False, "accepted for LMDeploy's sake; nothing is cached", group="Serving")

    # Limits
    max_inflight: int = setting(1024, "requests under way at once", group="Limits", ge=1)
    max_queue: int = setting(256, "requests waiting beyond those; past them 429", group="Limits", ge=0)
    queue_timeout: float = setting(30.0, "longest wait in that queue", group="Limits", unit="seconds", gt=0)
    max_body_bytes: ByteSize = setting("16MiB", "longest request body; past it 413", group="Limits")
    max_header_bytes: ByteSize = setting("16KiB", "longest request line or header", group="Limits")
    body_timeout: float = setting(30.0, "for a client to send its body", group="Limits", unit="seconds", gt=0)

    # Engines
    connect_timeout: float = setting(2.0, "to connect to an engine", group="Engines", unit="seconds", gt=0)
    request_timeout: float = setting(600.0, "to an answer's first byte", group="Engines", unit="seconds", gt=0)
    idle_timeout: float = setting(120.0, "between two bytes of an answer", group="Engines", unit="seconds", gt=0)
    link_timeout: float = setting(15.0, "to connect a prefill-decode pair", group="Engines", unit="seconds", gt=0)
    probe_interval: float = setting(1.0, "between health probes of a node", group="Engines", unit="seconds", gt=0)
    probe_timeout: float = setting(
        1.5, "for a health probe; two misses put a node out", group="Engines", unit="seconds", gt=0
    )
    node_ttl: float = setting(
        60.0,
        "a node that heartbeats, and has been out and silent for so long, is forgotten",
        group="Engines",
        unit="seconds",
        gt=0,
    )
    max_idle_connections: int = setting(256, "kept open to each node", group="Engines", ge=0)
    max_connections: int = setting(2048, "to each node at once; past them 429", group="Engines", ge=1)

    # General
    drain_timeout: float = setting(
        30.0, "for requests under way to end after SIGTERM", group="General", unit="seconds", ge=0
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least level logged", group="General")

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, level: object) -> object:
        return level.lower() if isinstance(level, str) else level  # LMDeploy's users write INFO

    @model_validator(mode="after")
    def _certificate_with_key(self) -> ProxySettings:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("--ssl-certfile and --ssl-keyfile go together")
        return self

    @property
    def cluster_key_text(self) -> str | None:
        return self.cluster_key.get_secret_value() if self.cluster_key else None

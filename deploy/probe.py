"""What the launcher asks a running cluster over HTTP. Every question has a deadline."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

QUESTION_S = 5.0
# Longer than what a decode engine computes itself by default, so that the first completion tries the hand-off too.
PROMPT = (
    "Every country chooses one city for its government, and children learn the names of these cities at school. "
    "The capital of Italy is Rome, with its old stones and fountains. The capital of Spain is Madrid, high on a dry "
    "plain. The capital of Japan is Tokyo, the largest of them all. The capital of Egypt is Cairo, beside the river "
    "Nile. The capital of Norway is Oslo, at the end of a long fjord. The capital of France is"
)


class NotReady(Exception):
    """The cluster did not answer as a ready one does; the message says how."""


def ask(url: str, body: dict[str, Any] | None = None, key: str | None = None, deadline_s: float = QUESTION_S) -> bytes:
    """The body of a 200: GET, or POST of `body` as JSON. Raises NotReady for anything else."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=deadline_s) as reply:
            content: bytes = reply.read()
            return content
    except urllib.error.HTTPError as error:
        raise NotReady(f"{url} answered {error.code}: {error.read(300).decode(errors='replace')}") from None
    except (OSError, http.client.HTTPException) as error:  # urllib.error.URLError is an OSError
        raise NotReady(f"{url}: {error}") from None


def nodes(proxy_url: str, key: str | None) -> dict[str, dict[str, Any]]:
    """Engine URL → its status, of the engines that the proxy knows."""
    known: dict[str, dict[str, Any]] = json.loads(ask(f"{proxy_url}/nodes/status", key=key))
    return known


def complete(proxy_url: str, model: str, key: str | None, deadline_s: float) -> str:
    """The text of a few greedy tokens through the proxy."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    reply = json.loads(ask(f"{proxy_url}/v1/completions", body, key, deadline_s))
    text: str = reply["choices"][0]["text"]
    return text


def counters(engine_url: str, key: str | None = None) -> dict[str, float]:
    """Metric name → its value in `/metrics`, summed over its labels."""
    return totals(ask(f"{engine_url}/metrics", key=key).decode().splitlines())


def totals(lines: Iterable[str]) -> dict[str, float]:
    """Prometheus text, without labels."""
    sums: dict[str, float] = {}
    for line in lines:
        if line and not line.startswith("#"):
            series, value = line.rsplit(" ", 1)
            name = series.split("{", 1)[0]
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums

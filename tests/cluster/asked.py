"""A request under way in a thread of its own, which can be watched, hung up on, and held to one true outcome."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from tests.cluster.local_cluster import MODEL

DEADLINE_S = 60.0


@dataclass(slots=True)
class Outcome:
    """What came, in the order in which it came. `status` None: not even a status line."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: dict[str, Any] | None = None  # the body of an error, or the event that a stream ended with
    done: bool = False  # the body is whole
    broken: str | None = None  # how the connection ended, if not as HTTP ends

    def read(self, body: dict[str, Any]) -> None:
        """A whole answer, or one event of a stream."""
        assert self.finish_reason is None or not body.get("choices"), "something followed the finish reason"
        assert self.error is None, "something followed an error"
        self.error = body.get("error") or (body if body.get("object") == "error" else None)
        for choice in body.get("choices", []):
            self.token_ids += choice.get("token_ids") or []
            self.finish_reason = choice["finish_reason"]

    @property
    def failed(self) -> bool:
        """It says truly that it failed: no finish reason, an error, a status of one unless the stream had begun."""
        said = self.error is not None and bool(self.error["message"])
        began = self.status == 200 and bool(self.token_ids)
        return said and self.finish_reason is None and (began or (self.status or 0) >= 400)


class Asked:
    """Sends a greedy completion as soon as it is made; `fields` are added to its body."""

    def __init__(self, url: str, prompt: list[int], *, stream: bool = True, **fields: Any) -> None:
        self.prompt = prompt
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, "return_token_ids": True, "stream": stream}
        self._body = json.dumps(body | {"ignore_eos": True} | fields)
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=DEADLINE_S)
        self._outcome = Outcome()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="asked", daemon=True)
        self._connection.connect()
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()

    def outcome(self, deadline_s: float = DEADLINE_S) -> Outcome:
        """Once it is there; nobody may be left without one."""
        self._thread.join(deadline_s)
        assert not self._thread.is_alive(), f"no outcome within {deadline_s} s; so far: {self._outcome}"
        return self._outcome

    def wait_for_tokens(self, count: int) -> None:
        with self._changed:
            came = self._changed.wait_for(lambda: len(self._outcome.token_ids) >= count, DEADLINE_S)
        assert came, f"{count} tokens did not come: {self._outcome}"

    def hang_up(self) -> None:
        """The client goes away. Idempotent."""
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)

    def _run(self) -> None:
        headers = {"Content-Type": "application/json"}
        try:
            self._connection.request("POST", "/v1/completions", self._body, headers)
            reply = self._connection.getresponse()
            self._outcome.status, self._outcome.headers = reply.status, dict(reply.getheaders())
            if reply.headers.get_content_type() == "text/event-stream":
                self._read_events(reply)
            else:
                self._read(json.loads(reply.read()))
                self._outcome.done = True
        except (OSError, http.client.HTTPException) as error:
            self._outcome.broken = repr(error)
        finally:
            sock = self._connection.sock
            if sock is not None:
                sock.close()

    def _read_events(self, reply: http.client.HTTPResponse) -> None:
        for line in reply:
            if line == b"data: [DONE]\n":
                self._outcome.done = True
            elif line.startswith(b"data: "):
                self._read(json.loads(line[6:]))

    def _read(self, body: dict[str, Any]) -> None:
        with self._changed:
            self._outcome.read(body)
            self._changed.notify_all()


def outcomes(asked: list[Asked], deadline_s: float = DEADLINE_S) -> list[Outcome]:
    """Of all of them, within one deadline."""
    end = time.monotonic() + deadline_s
    return [each.outcome(max(0.1, end - time.monotonic())) for each in asked]

"""Server-sent events as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from engine.api.errors import TandemError, openai_body

CONTENT_TYPE: Final = "text/event-stream"
DONE: Final = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def event(message: Any) -> bytes:
    """One event. JSON has no raw line breaks, so one `data:` line is enough."""
    return b"data: " + _encode(message) + b"\n\n"


def error_event(error: TandemError) -> bytes:
    """What follows the last true event of a stream that failed; neither a finish_reason nor [DONE] comes after it."""
    return event(openai_body(error))

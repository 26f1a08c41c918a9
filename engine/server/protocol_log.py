"""Broken HTTP from strangers is one line in the log, not a stack trace each."""

from __future__ import annotations

import logging
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

PROTOCOL_ERRORS: Final = (HttpProcessingError, web.RequestPayloadError)


class OneLine(logging.Filter):
    """Puts the first line of a protocol error's text in place of its traceback; leaves all other records alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PROTOCOL_ERRORS):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            record.msg, record.args = "%s: %s", (record.getMessage(), " ".join(lines)[:200])
            record.levelno, record.levelname = logging.WARNING, "WARNING"
            record.exc_info = record.exc_text = None
        return True


ONE_LINE: Final = OneLine()


def install() -> None:
    """Idempotent."""
    logging.getLogger("aiohttp.server").addFilter(ONE_LINE)

"""From bytes that a stranger sent to typed values, with errors that say where and what."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from engine.api.errors import InvalidRequest

T = TypeVar("T")


def decode_json(body: bytes | str, kind: type[T]) -> T:
    """`body` as `kind` (a type or a union of types). Raises InvalidRequest naming the JSON path of what is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("The JSON is nested too deeply", code="invalid_json") from error


def invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec says "Expected `int`, got `str` - at `$.n`"; the path becomes `param`."""
    text, _, path = str(error).partition(" - at `")
    param = path.rstrip("`").removeprefix("$").lstrip(".") or None
    return InvalidRequest(f"{param}: {text}" if param else text, param=param, code="invalid_value")

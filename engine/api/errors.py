"""The one tree of errors a client can meet.

Each error carries the HTTP status it becomes and the label metrics count it under. Handlers raise these; one middleware
turns them into OpenAI's shape on user routes and LMDeploy's flat shape on cluster routes.
"""

from __future__ import annotations


class TandemError(Exception):
    """A failure that a client is told about. `message` says what was wrong, what was expected, what to do."""

    status = 500
    type = "server_error"
    label = "internal"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(TandemError):
    """The request itself is wrong: it will fail the same way wherever it is sent."""

    status = 400
    type = "invalid_request_error"
    label = "invalid_request"


class Unauthorized(TandemError):
    """No key, or not one of ours."""

    status = 401
    type = "authentication_error"
    label = "unauthorized"


class Forbidden(TandemError):
    """A good key, but not one that may do this."""

    status = 403
    type = "invalid_request_error"
    label = "forbidden"


class NotFound(TandemError):
    """No such model, route, node or session."""

    status = 404
    type = "not_found_error"
    label = "not_found"


class MethodNotAllowed(TandemError):
    status = 405
    type = "invalid_request_error"
    label = "method_not_allowed"


class BodyTimeout(TandemError):
    """The client began a body and did not finish it in time."""

    status = 408
    type = "invalid_request_error"
    label = "body_timeout"


class Conflict(TandemError):
    """The request is right in itself but stale or forged against what this engine holds."""

    status = 409
    type = "invalid_request_error"
    label = "conflict"


class Declined(TandemError):
    """Prefill's word, to the proxy alone, for a hand-off that decode does not need: nothing failed."""

    status = 410
    type = "invalid_request_error"
    label = "declined"


class TooLarge(TandemError):
    status = 413
    type = "invalid_request_error"
    label = "too_large"


class Overloaded(TandemError):
    """A bounded queue is full. Carries how long to wait, in whole seconds."""

    status = 429
    type = "rate_limit_error"
    label = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after_s = retry_after_s


class Unavailable(TandemError):
    """Nothing here can serve this now: starting, draining, or the engine core has died."""

    status = 503
    type = "server_error"
    label = "unavailable"


class DeadlineExceeded(TandemError):
    status = 504
    type = "server_error"
    label = "deadline"


def openai_body(error: TandemError) -> dict[str, object]:
    """`{"error": {...}}`, what the OpenAI clients parse."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def flat_body(error: TandemError) -> dict[str, object]:
    """LMDeploy's flat shape for /nodes and /distserve; `code` is the HTTP status as an int."""
    kind = "invalid_request_error" if error.type == "rate_limit_error" else error.type
    return {"message": error.message, "type": kind, "code": error.status, "param": None, "object": "error"}


def error_of(status: int, message: str) -> TandemError:
    """The error that another process reported by its HTTP status."""
    if status == Overloaded.status:
        return Overloaded(message)
    kinds: tuple[type[TandemError], ...] = (
        InvalidRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        Conflict,
        Declined,
        TooLarge,
        Unavailable,
        DeadlineExceeded,
    )
    return next((kind for kind in kinds if kind.status == status), TandemError)(message)

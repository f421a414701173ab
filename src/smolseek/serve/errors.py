"""Errors of the interface, in the form of OpenAI's errors."""

from typing import Any

from smolseek.console import printable
from smolseek.generate.engine import NOT_FINITE
from smolseek.generate.request import SAMPLING_FAILED, Finished

FAILED = "the server has failed: its log has the reason"


class ApiError(Exception):
    """An error that a client gets as `{"error": {"message", "type", "param", "code"}}`.

    Args:
        status: HTTP status.
        message: one line that says what is wrong, and a way out.
        param: the field of the body that is wrong.
        code: a short name of the error, for programs.
        retry_after: seconds after which a client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """Return the JSON object that the client gets."""
        error = {
            "message": printable(self.message),
            "type": error_type(self.status),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def error_type(status: int) -> str:
    """Return OpenAI's type of an error with this HTTP status."""
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error"
    )


def shutting_down() -> ApiError:
    """Return the error of a request to a server that is shutting down."""
    return ApiError(503, "the server is shutting down: try again later", code="shutting_down", retry_after=5)


def end_error(end: Finished) -> ApiError | None:
    """Return the error of a text that has ended without an answer; None for a text that is an answer."""
    if end.reason == "cancelled":  # by the end of the server; a client that has gone reads nothing
        return shutting_down()
    if end.reason == "time" and not end.completion_tokens:
        message = "the time of the request was over before its first token: try again later, or set a longer time"
        return ApiError(503, message, code="timeout", retry_after=5)
    if end.reason != "error":
        return None
    # Any other error is one of the request, such as options that forbid every token.
    return ApiError(500 if end.error in (NOT_FINITE, SAMPLING_FAILED, FAILED) else 400, str(end.error))

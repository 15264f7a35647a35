"""The gate's refusals in OpenAI's shape, with the codes that its clients look for."""

from __future__ import annotations

from typing import Any

from crossdock.proto.errors import BudgetSpent, Forbidden, RateLimited, Unauthenticated


def access_error_body(error: Unauthenticated | Forbidden | RateLimited) -> dict[str, Any]:
    """The body of a 401, 403 or 429."""
    message, kind = str(error), "invalid_request_error"
    param = code = None
    if isinstance(error, Unauthenticated):
        if not error.missing:  # litellm tells it from a wrong request by OpenAI's words alone
            message = f"Incorrect API key provided: {message}"
            code = "invalid_api_key"
    elif isinstance(error, Forbidden):
        param = error.param or None
        code = "model_not_found" if param == "model" else "permission_denied"
    elif isinstance(error, BudgetSpent):
        kind = code = "insufficient_quota"
    else:
        kind, code = error.limit, "rate_limit_exceeded"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

"""Which pages of other origins may call the API from a browser."""

from __future__ import annotations

from aiohttp import web

METHODS = "GET, POST, DELETE, OPTIONS"
LIMITS = [
    f"X-RateLimit-{what}-{kind}"
    for kind in ("Requests", "Tokens")
    for what in ("Limit", "Remaining", "Reset")
]
ANSWERED = ", ".join(
    ["X-Request-Id", "Retry-After", "X-Should-Retry", "X-Crossdock-Model", *LIMITS]
)
MAX_AGE_S = 600  # for which a browser remembers the answer


class Cors:
    """Origins as `gateway.http_options.cors` has them: separated by spaces, `*` for any."""

    def __init__(self, origins: str) -> None:
        self._origins = frozenset(origins.split())

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks before it sends."""
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not asks or not self._allowed(request):
            return None
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": METHODS,
                "Access-Control-Allow-Headers": wanted,
                "Access-Control-Max-Age": str(MAX_AGE_S),
            },
        )

    def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Lets the page read the answer."""
        if not self._origins:
            return
        response.headers["Vary"] = "Origin"
        if self._allowed(request):
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = ANSWERED

    def _allowed(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        return origin is not None and ("*" in self._origins or origin in self._origins)

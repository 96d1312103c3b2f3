"""What stands before every request: who may ask, and what a browser is told it may do with the answer."""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names by which a browser on this computer calls a server on it."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FIGURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
"""For drawings, which carry their own styles and are shown as images: no script runs in them."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Middleware that refuses requests which other sites' pages could have sent.

    A page elsewhere can make a browser send requests here. It cannot choose the ``Host`` header, so that a name which
    was bound to this address later (DNS rebinding) is noticed; nor ``Origin``, which browsers add to every POST.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app, self._names = app, frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 421 or 403, or hands the request on and adds the headers."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Content-Security-Policy", _POLICY)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["method"])
        if refusal is None:
            return await self._app(scope, receive, send_guarded)
        status, why = refusal
        return await JSONResponse({"error": why}, status)(scope, receive, send_guarded)

    def _refusal(self, headers: Headers, method: str) -> tuple[int, str] | None:
        """Status and reason, if the request is none of this server's own page."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or host_name(host) not in self._names:
            known = ", ".join(sorted(self._names))
            return 421, f"this server does not go by the name that was asked for; it answers to {known}"
        if method in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "another site's page sent this; only this server's own page may ask"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "another site's page sent this; only this server's own page may ask"
        return None


def host_name(host: str) -> str | None:
    """The name in a ``Host`` header, lower case and without brackets and port; ``None`` if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises where it is no number
    except ValueError:
        return None
    plain = parts.netloc == host and not {"@", "/", "?", "#", "\\"} & set(host)
    return parts.hostname if plain else None

"""The ASGI application: its routes, and what every answer carries.

Invariant: only this machine is served (the Host header must name it, so a page elsewhere that resolves to
127.0.0.1 gets nothing), only GET is understood, and no answer may load, run or send anything elsewhere: the
policy allows scripts and styles from here and neither inline ones nor `eval`. What another site embeds, or
asks for behind a user's back, is refused; links from elsewhere are not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from queries.explorer import compare, documents, feature, overview, passage, sae, sql, vega
from queries.explorer.session import Session
from queries.explorer.web import not_found

HOSTS = ("127.0.0.1", "localhost")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_ROOMS = (overview, sae, feature, documents, passage, compare, sql)
_STATIC = Path(__file__).parent / "static"


def application(session: Session) -> Starlette:
    """The explorer of a session."""
    app = Starlette(
        routes=[
            *(route for room in _ROOMS for route in room.ROUTES),
            Route("/vega.js", _vega, methods=["GET"]),
            Mount("/static", StaticFiles(directory=_STATIC)),
        ],
        exception_handlers={404: _not_found},
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False),
            Middleware(BaseHTTPMiddleware, dispatch=_guarded),
            Middleware(GZipMiddleware, minimum_size=4096, compresslevel=3),
        ],
    )
    app.state.session = session
    return app


async def _not_found(request: Request, error: Exception) -> Response:
    return not_found(request)


async def _guarded(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    site, mode = request.headers.get("sec-fetch-site", ""), request.headers.get("sec-fetch-mode", "")
    if site in ("cross-site", "same-site") and mode != "navigate":
        response: Response = PlainTextResponse("refused: asked for by another site", 403)
    else:
        response = await answer(request)
    response.headers.update(_HEADERS)
    if not request.url.path.startswith(("/static/", "/vega.js")):
        response.headers["Cache-Control"] = "no-store"
    return response


def _vega(request: Request) -> Response:
    return Response(vega.bundle(), media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})

"""The server of one run's page: routes, and what stands before them."""

from collections.abc import Collection
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedjax_llm.serving.asking import Asking
from fedjax_llm.serving.guard import FIGURE_POLICY, LOOPBACK, Guard
from fedjax_llm.serving.pages import RunPage
from fedjax_llm.serving.turns import Turns
from fedjax_llm.serving.voices import Voices

_HERE = Path(__file__).parent
_FILES = {"app.css": "text/css", "app.js": "text/javascript", "icon.svg": "image/svg+xml"}


def create(page: RunPage, voices: Voices, *, names: Collection[str] = LOOPBACK, waiting: int = 3) -> Starlette:
    """The application.

    Args:
      page: of the run.
      voices: its models.
      names: by which browsers may call this server, without ports.
      waiting: how many questions may wait while one is answered.
    """

    async def index(request: Request) -> Response:
        return Response(page.html, media_type="text/html")

    async def figure(request: Request) -> Response:
        svg = page.figures.get(request.path_params["name"])
        if svg is None:
            return JSONResponse({"error": "there is no such figure"}, 404)
        return Response(svg, media_type="image/svg+xml", headers={"Content-Security-Policy": FIGURE_POLICY})

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            return JSONResponse({"error": "there is no such file"}, 404)
        return Response((_HERE / name).read_text("utf-8"), media_type=_FILES[name])

    return Starlette(
        routes=[
            Route("/", index),
            Route("/figures/{name}.svg", figure),
            Route("/files/{name}", file),
            Route("/ask", Asking(voices, Turns(waiting)), methods=["POST"]),
        ],
        middleware=[Middleware(Guard, names=names)],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )


async def _not_found(request: Request, error: Exception) -> Response:
    """No such place."""
    return JSONResponse({"error": "there is nothing here; the page is at /"}, 404)


async def _not_allowed(request: Request, error: Exception) -> Response:
    """The wrong method."""
    return JSONResponse({"error": f"{request.method} is not possible here"}, 405)

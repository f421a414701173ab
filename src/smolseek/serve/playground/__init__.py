"""The playground: the fixed files of the page at `/`, with a Content-Security-Policy that allows nothing else."""

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, Response

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # Scripts and styles are files of this server only. Trusted types forbid every way to read text as HTML.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

FILES = {
    "/" if path.suffix == ".html" else f"/playground/{path.name}": path
    for path in sorted(Path(__file__).parent.iterdir())
    if path.suffix in _MEDIA_TYPES
}
"""The files by the path of their URL. They need no API key, because the page asks for it."""


def playground() -> APIRouter:
    """Return the routes of the page and its files, which are read once."""
    router = APIRouter(include_in_schema=False)
    for url, path in FILES.items():
        router.add_api_route(url, _endpoint(path), methods=["GET"])
    return router


def _endpoint(path: Path) -> Callable[[], Response]:
    content, media_type = path.read_bytes(), _MEDIA_TYPES[path.suffix]
    return lambda: Response(content, media_type=media_type, headers=_HEADERS)

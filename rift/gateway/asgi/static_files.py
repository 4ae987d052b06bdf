"""The pages for people: the playground at `/`, `/docs`, and what they are made of. Static, and without a key:
what they show they ask the API for, with the key that they are given."""

import hashlib
from importlib.resources import files

import msgspec

from rift.gateway.asgi.errors import HTTPError
from rift.gateway.asgi.request import Request

PAGES = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/docs": ("docs.html", b"text/html; charset=utf-8"),
    "/pages/index.js": ("index.js", b"text/javascript; charset=utf-8"),
    "/pages/docs.js": ("docs.js", b"text/javascript; charset=utf-8"),
    "/pages/style.css": ("style.css", b"text/css; charset=utf-8"),
    "/pages/icon.svg": ("icon.svg", b"image/svg+xml"),
}

# A page runs its own files and talks to its own gateway, and nothing else; it makes no HTML of text.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # Asked for again each time, and sent again only if it has changed: an upgrade shows at once.
    (b"cache-control", b"no-cache"),
]


class StaticFile(msgspec.Struct, frozen=True):
    content_type: bytes
    data: bytes
    etag: str


class StaticFiles:
    def __init__(self) -> None:
        folder = files("rift.gateway.asgi") / "static"
        self._pages = {
            path: _page((folder / name).read_bytes(), kind) for path, (name, kind) in PAGES.items()
        }

    def __contains__(self, path: str) -> bool:
        return path in self._pages

    async def answer(self, request: Request) -> None:
        """Raises HTTPError."""
        if request.method not in ("GET", "HEAD"):
            message = f"{request.path} takes GET, not {request.method}"
            raise HTTPError(405, message, code="method_not_allowed", headers=[(b"allow", b"GET")])
        page = self._pages[request.path]
        known = request.header(b"if-none-match") or ""
        is_known = page.etag in [tag.strip().removeprefix("W/") for tag in known.split(",")]
        data = b"" if is_known else page.data
        headers = [(b"etag", page.etag.encode()), *HEADERS]
        if not is_known:
            headers.append((b"content-length", b"%d" % len(data)))
        await request.start(304 if is_known else 200, page.content_type, headers)
        await request.write(b"" if request.method == "HEAD" else data, more=False)


def _page(data: bytes, content_type: bytes) -> StaticFile:
    return StaticFile(content_type, data, f'"{hashlib.sha256(data).hexdigest()[:16]}"')

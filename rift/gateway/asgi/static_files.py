"""The playground at `/`, the API reference at `/docs`, and their files.

They are static and served without a key; the pages call the API with the key that their user enters.
"""

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

# A page loads only its own files, calls only its own gateway, and never turns text into HTML.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # Browsers revalidate each time, so an upgrade shows at once.
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
            message = f"{request.path} supports GET, not {request.method}"
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

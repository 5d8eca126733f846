"""The chat page: static files, joined into one HTML page at start, which loads nothing from other hosts.

- index.html: the elements; style.css: their look.
- markdown.js: rendering of answers. media.js: images and videos with their token counts.
- api.js: streams from the server. storage.js: settings and messages that outlast a reload.
- app.js: the conversation and all events.
"""

import base64
import functools
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent
_SCRIPTS = ("markdown.js", "media.js", "api.js", "storage.js", "app.js")


@functools.cache
def page() -> tuple[str, dict[str, str]]:
    """Returns the page's HTML, and headers that let a browser run the page's own script and no other."""
    style = _read("style.css")
    script = "\n".join(map(_read, _SCRIPTS))
    html = _read("index.html")
    html = html.replace("/* style */", style)
    html = html.replace("/* script */", script)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data: blob:; media-src data: blob:; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    return html, {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"

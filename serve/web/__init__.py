"""The chat page: plain files, put together into one at start, that loads nothing from anywhere else.

- index.html: what there is; style.css: how it looks.
- markdown.js: an answer as elements; media.js: pictures and videos, what they cost; talk.js: the stream; keep.js: what outlasts a
  reload; page.js: all else.
"""

import base64
import functools
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent
_SCRIPTS = ("markdown.js", "media.js", "talk.js", "keep.js", "page.js")


@functools.cache
def page() -> tuple[str, dict[str, str]]:
    """The page, and headers under which a browser runs its own script and no other."""
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

"""What the URLs and paths in a request may open.

Checked: the scheme (data URLs never come here; http, https, file and plain paths do, others are refused), that a local file
really lies under the allowed folder once links are followed, and a download's size, number of redirects and whole time.

Not checked: where an http(s) host is. A client may make the server fetch from any address that the server can reach, its own
network included; do not open this server to strangers where that matters. A local path is resolved before it is opened, so
someone who can swap links inside the allowed folder at that moment can get round it.
"""

import asyncio
import dataclasses
import re
import ssl
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx

from minicpmv46_jax.processing.sources import describe

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")  # two letters or more: "C:" starts a path
FLAG = "--allowed-local-media-path"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a download may cost. `total_s` bounds all of it, `connect_s` and `read_s` each wait for the network."""

    max_bytes: int = 256 * 2**20
    max_redirects: int = 3
    connect_s: float = 5.0
    read_s: float = 15.0
    total_s: float = 60.0


class MediaFetcher:
    """A `processing.Fetch` with the server's rules. May be called from several threads at once.

    Args:
      allowed_folder: local files under it may be read; None for none at all.
      limits: of downloads.
    """

    def __init__(self, allowed_folder: Path | None = None, limits: Limits | None = None):
        self._root = None if allowed_folder is None else allowed_folder.resolve(strict=True)
        self._limits = limits or Limits()
        self._tls = ssl.create_default_context()  # made once: reading the certificates takes longer than a small download

    def __call__(self, url: str) -> bytes | Path:
        """The bytes behind a URL, or the local file that a path names. Raises ValueError that names the source."""
        if not url:
            raise ValueError("the URL is empty")
        match = _SCHEME.match(url)
        scheme = match[1].lower() if match else None
        if scheme in ("http", "https"):
            return asyncio.run(self._download(url))  # a loop of its own, because only asyncio can bound the whole of it
        if scheme == "file":
            return self._local(_file_path(url), url)
        if scheme is not None:
            raise ValueError(f"{describe(url)}: unsupported scheme {scheme!r}; supported are data, http, https and file")
        return self._local(url, url)

    def _local(self, path: str, url: str) -> Path:
        """The real path. What lies outside is refused in the same words whether it exists or not."""
        if self._root is None:
            raise ValueError(f"{describe(url)}: this server reads no local files; {FLAG} would name a folder that it may read")
        try:
            real = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):  # a zero byte, a name too long, links in a circle
            real = None
        if real is None or not real.is_relative_to(self._root):
            raise ValueError(f"{describe(url)}: not under the folder that {FLAG} allows")
        return real

    async def _download(self, url: str) -> bytes:
        limits, name = self._limits, describe(url)
        try:
            async with asyncio.timeout(limits.total_s), self._client() as client, client.stream("GET", url) as response:
                return await _body(response, limits.max_bytes, name)
        except (TimeoutError, httpx.TimeoutException):
            raise ValueError(f"{name}: not complete in time (at most {limits.total_s:g} seconds in all)") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"{name}: {error or type(error).__name__}") from None

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=self._tls,
            timeout=httpx.Timeout(self._limits.read_s, connect=self._limits.connect_s),
            follow_redirects=True,
            max_redirects=self._limits.max_redirects,
            headers={"Accept-Encoding": "identity"},  # pictures are compressed already; and no gzip bombs
        )


def _file_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{describe(url)}: a file URL must not name a host, as in file:///folder/name")
    return url2pathname(parts.path)


async def _body(response: httpx.Response, max_bytes: int, name: str) -> bytes:
    if response.status_code != 200:
        raise ValueError(f"{name}: HTTP status {response.status_code}")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"{name}: more than the {max_bytes} bytes allowed")
    return bytes(body)

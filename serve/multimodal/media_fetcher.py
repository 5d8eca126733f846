"""What the URLs and paths in a request may open.

Checked: the scheme (data URLs never come here; http, https, file and plain paths do, others are refused); that a local file
really lies under the allowed folder once links are followed; for http(s), where the host is (addresses.py), at first and after
each redirect, and a download's size, number of redirects and whole time. A host is resolved once, and the address that was
checked is the one connected to: a DNS server that answers differently the next time is not asked again.

Not checked: a local path is resolved before it is opened, so someone who can swap links inside the allowed folder at that moment
can get round it. Where the environment names a proxy, it is the proxy that connects, to the checked address.
"""

import asyncio
import contextlib
import dataclasses
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx

from minicpmv46_jax.processing.sources import describe
from serve.multimodal.ip_rules import Network, Resolve, allowed, resolve

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")  # two letters or more: "C:" starts a path
FLAG = "--allowed-local-media-path"
NETWORKS_FLAG = "--allowed-media-networks"
DOMAINS_FLAG = "--allowed-media-domains"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a download may cost. `total_s` bounds all of it, `connect_s` and `read_s` each wait for the network."""

    max_bytes: int = 256 * 2**20
    max_redirects: int = 3
    connect_s: float = 5.0
    read_s: float = 15.0
    total_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class Reach:
    """Which hosts may be asked.

    Attributes:
      networks: addresses that may be asked although they are not the internet's.
      domains: if not empty, the only hosts that may be asked, by the names that URLs use.
      resolve: from names to addresses.
    """

    networks: tuple[Network, ...] = ()
    domains: frozenset[str] = frozenset()
    resolve: Resolve = resolve


class MediaFetcher:
    """A `processing.FetchMedia` with the server's rules. May be called from several threads at once.

    Args:
      allowed_folder: local files under it may be read; None for none at all.
      limits: of downloads.
      reach: which hosts may be asked.
    """

    def __init__(self, allowed_folder: Path | None = None, limits: Limits | None = None, reach: Reach | None = None):
        self._root = None if allowed_folder is None else allowed_folder.resolve(strict=True)
        self._limits, self._reach = limits or Limits(), reach or Reach()
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
            async with asyncio.timeout(limits.total_s), self._client() as client:
                return await self._followed(client, httpx.URL(url), name)
        except (TimeoutError, httpx.TimeoutException):
            raise ValueError(f"{name}: not complete in time (at most {limits.total_s:g} seconds in all)") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"{name}: {error or type(error).__name__}") from None

    async def _followed(self, client: httpx.AsyncClient, url: httpx.URL, name: str) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            async with self._response(client, url, name) as response:
                if not response.has_redirect_location:
                    return await _body(response, self._limits.max_bytes, name)
                url = url.join(response.headers["Location"])
        raise ValueError(f"{name}: more than the {self._limits.max_redirects} redirects allowed")

    @contextlib.asynccontextmanager
    async def _response(self, client: httpx.AsyncClient, url: httpx.URL, name: str) -> AsyncIterator[httpx.Response]:
        """Asks the address that was checked, by the name that the URL has."""
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{name}: it leads to {describe(str(url))}; only http and https URLs with a host are followed")
        address = await self._address(url, name)
        request = client.build_request(
            "GET",
            url.copy_with(host=address),
            headers={"Host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": url.raw_host.decode("ascii")},  # whose certificate is expected
        )
        response = await client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def _address(self, url: httpx.URL, name: str) -> str:
        """Where a URL's host is, all of its addresses checked."""
        host, domains = url.host, self._reach.domains
        if domains and host.lower().rstrip(".") not in domains:
            raise ValueError(f"{name}: the host {host!r} is none of those that {DOMAINS_FLAG} allows")
        try:
            found = await self._reach.resolve(host, url.port or (443 if url.scheme == "https" else 80))
        except OSError as error:
            raise ValueError(f"{name}: the host {host!r} has no address ({error.strerror or error})") from None
        for address in found:
            if not allowed(address, self._reach.networks):
                raise ValueError(
                    f"{name}: the host {host!r} is at {address}, which is not an address on the internet; "
                    f"{NETWORKS_FLAG} would allow it"
                )
        return found[0]

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=self._tls,
            timeout=httpx.Timeout(self._limits.read_s, connect=self._limits.connect_s),
            follow_redirects=False,  # each is checked like the first
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
    announced = response.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise ValueError(f"{name}: {announced} bytes, more than the {max_bytes} bytes allowed")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"{name}: more than the {max_bytes} bytes allowed")
    return bytes(body)

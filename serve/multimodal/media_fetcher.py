"""Fetches the images and videos that requests name by URL or path, under the server's rules.

Checked: the scheme (http, https, file and plain paths; data URLs are decoded elsewhere, other schemes are
refused). A local file must lie under the allowed folder after links are resolved. For http(s), the host's
address is checked (ip_rules.py) at first and after each redirect. A download's size, redirects and total time
are bounded. A host is resolved once and the connection goes to the checked address, so a DNS server that
changes its answer has no effect.

Not checked: a local path is resolved before it is opened, so a process that swaps links inside the allowed
folder at that moment can bypass the rule. If the environment names a proxy, the proxy connects to the checked
address.
"""

import asyncio
import contextlib
import dataclasses
import re
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx

from minicpmv46_jax.processing.sources import describe
from serve.multimodal.ip_rules import Network, Resolver, is_allowed, resolve

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")  # two letters or more: "C:" starts a path
LOCAL_PATH_FLAG = "--allowed-local-media-path"
NETWORKS_FLAG = "--allowed-media-networks"
DOMAINS_FLAG = "--allowed-media-domains"


@dataclasses.dataclass(frozen=True)
class DownloadLimits:
    """Bounds of one download.

    Attributes:
      max_bytes: size of the body.
      max_redirects: redirects that are followed.
      connect_s, read_s: seconds for one connection attempt, and for one wait for data.
      total_s: seconds for the whole download, redirects included.
    """

    max_bytes: int = 256 * 2**20
    max_redirects: int = 3
    connect_s: float = 5.0
    read_s: float = 15.0
    total_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class NetworkPolicy:
    """Rules for the hosts that downloads may reach.

    Attributes:
      networks: networks that are allowed besides public addresses.
      domains: if not empty, the only allowed host names, as written in URLs.
      resolve: maps host names to addresses.
    """

    networks: tuple[Network, ...] = ()
    domains: frozenset[str] = frozenset()
    resolve: Resolver = resolve


Hold = Callable[[int], None]
"""Counts the bytes of a download as they arrive; may raise any error to end it."""


def _hold_nothing(size: int) -> None:
    """Counts nothing."""


class MediaFetcher:
    """Fetches media under the server's rules: a `processing.FetchMedia`, and `fetch` for an event loop.

    Threads may share it.

    Args:
      allowed_folder: local files under it may be read; None refuses all local files.
      limits: bounds of downloads.
      network_policy: hosts that downloads may reach.
    """

    def __init__(
        self,
        allowed_folder: Path | None = None,
        limits: DownloadLimits | None = None,
        network_policy: NetworkPolicy | None = None,
    ):
        self._root = None if allowed_folder is None else allowed_folder.resolve(strict=True)
        self._limits, self._network_policy = limits or DownloadLimits(), network_policy or NetworkPolicy()
        self._tls = ssl.create_default_context()  # made once: reading the certificates takes longer than a small download

    def __call__(self, url: str) -> bytes | Path:
        """Returns a URL's bytes, or a local file's path. Raises ValueError that names the source."""
        return asyncio.run(self.fetch(url))  # asyncio, because only its timeouts bound a download as a whole

    async def fetch(self, url: str, hold: Hold = _hold_nothing) -> bytes | Path:
        """Returns a URL's bytes, or a local file's path.

        Args:
          url: as in a request.
          hold: called with the size of each part of a download.

        Raises:
          ValueError: the source is refused or not available; the message names it.
          Exception: any error of `hold`.
        """
        if not url:
            raise ValueError("the URL is empty")
        match = _SCHEME.match(url)
        scheme = match[1].lower() if match else None
        if scheme in ("http", "https"):
            return await self._download(url, hold)
        if scheme == "file":
            return self._local_file(_path_of_file_url(url), url)
        if scheme is not None:
            raise ValueError(f"{describe(url)}: unsupported scheme {scheme[:20]!r}; supported are data, http, https and file")
        return self._local_file(url, url)

    def _local_file(self, path: str, url: str) -> Path:
        """Returns the resolved path. Paths outside get the same error whether they exist or not."""
        if self._root is None:
            raise ValueError(f"{describe(url)}: this server reads no local files; {LOCAL_PATH_FLAG} allows a folder")
        try:
            real = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):  # a zero byte, a name too long, links in a circle
            real = None
        if real is None or not real.is_relative_to(self._root):
            raise ValueError(f"{describe(url)}: not under the folder that {LOCAL_PATH_FLAG} allows")
        return real

    async def _download(self, url: str, hold: Hold) -> bytes:
        limits, name = self._limits, describe(url)
        try:
            async with asyncio.timeout(limits.total_s), self._client() as client:
                return await self._follow_redirects(client, httpx.URL(url), hold, name)
        except (TimeoutError, httpx.TimeoutException):
            raise ValueError(f"{name}: not complete in time (at most {limits.total_s:g} seconds in all)") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"{name}: {error or type(error).__name__}") from None

    async def _follow_redirects(self, client: httpx.AsyncClient, url: httpx.URL, hold: Hold, name: str) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            async with self._send(client, url, name) as response:
                if not response.has_redirect_location:
                    return await _read_body(response, self._limits.max_bytes, hold, name)
                url = url.join(response.headers["Location"])
        raise ValueError(f"{name}: more than the {self._limits.max_redirects} redirects allowed")

    @contextlib.asynccontextmanager
    async def _send(self, client: httpx.AsyncClient, url: httpx.URL, name: str) -> AsyncIterator[httpx.Response]:
        """Sends a GET request to the checked address under the URL's host name, and yields the response."""
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{name}: it leads to {describe(str(url))}; only http and https URLs with a host are followed")
        if url.port is not None and not 0 < url.port < 2**16:
            raise ValueError(f"{name}: the port is {url.port}, expected 1 to 65535")
        address = await self._checked_address(url, name)
        request = client.build_request(
            "GET",
            url.copy_with(host=address),
            headers={"Host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": url.raw_host.decode("ascii")},  # the certificate must be for the host name
        )
        response = await client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def _checked_address(self, url: httpx.URL, name: str) -> str:
        """Returns the first address of a URL's host. Raises ValueError unless all are allowed."""
        host, domains = url.host, self._network_policy.domains
        if domains and host.lower().rstrip(".") not in domains:
            raise ValueError(f"{name}: the host {host!r} is none of those that {DOMAINS_FLAG} allows")
        try:
            addresses = await self._network_policy.resolve(host, url.port or (443 if url.scheme == "https" else 80))
        except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 characters
            raise ValueError(f"{name}: the host {host!r} has no address ({getattr(error, 'strerror', None) or error})") from None
        if not addresses:
            raise ValueError(f"{name}: the host {host!r} has no address")
        for address in addresses:
            if not is_allowed(address, self._network_policy.networks):
                raise ValueError(
                    f"{name}: the host {host!r} is at {address}, which is not an address on the internet; "
                    f"{NETWORKS_FLAG} would allow it"
                )
        return addresses[0]

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=self._tls,
            timeout=httpx.Timeout(self._limits.read_s, connect=self._limits.connect_s),
            follow_redirects=False,  # each redirect is checked like the first URL
            headers={"Accept-Encoding": "identity"},  # images are compressed already; and no gzip bombs
        )


def _path_of_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{describe(url)}: a file URL must not name a host, as in file:///folder/name")
    return url2pathname(parts.path)


async def _read_body(response: httpx.Response, max_bytes: int, hold: Hold, name: str) -> bytes:
    if response.status_code != 200:
        raise ValueError(f"{name}: HTTP status {response.status_code}")
    announced = response.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise ValueError(f"{name}: {announced} bytes, more than the {max_bytes} bytes allowed")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        hold(len(chunk))
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"{name}: more than the {max_bytes} bytes allowed")
    return bytes(body)

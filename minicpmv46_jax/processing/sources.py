"""Reads the bytes of an image or video from paths, bytes, data URLs and http(s) URLs.

Every failure is one `ValueError` that names its source. The message never contains base64 content.
"""

import base64
import binascii
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx

FetchMedia = Callable[[str], bytes | Path]
"""Function from a URL or path in the user's spelling (never a data URL) to its bytes, or to the file that
holds them."""

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")  # two letters or more: "C:" starts a path


def describe(source: Any) -> str:
    """Returns a short name of a source for error messages."""
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes"
    if isinstance(source, str) and is_data_url(source):
        return "data URL"
    if isinstance(source, (str, Path)):
        text = str(source)
        return text if len(text) <= 200 else f"{text[:80]}... ({len(text)} characters)"
    return type(source).__name__


def is_data_url(source: str) -> bool:
    """Returns whether the string is a data URL, which contains its bytes."""
    return source[:5].lower() == "data:"


def fetch(url: str, *, timeout_s: float | int = 30.0, max_bytes: int = 512 * 2**20) -> bytes | Path:
    """Fetches an http(s) URL, a file URL or a local path; the default `FetchMedia`.

    It follows every URL, so it is not safe for URLs from untrusted users.

    Args:
        timeout_s: limit of the whole download, in seconds.
        max_bytes: limit of the download's size.
    Raises:
        ValueError: the scheme is not supported; the download failed, timed out or is too large.
    """
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else None
    if scheme in ("http", "https"):
        return _download(url, timeout_s, max_bytes)
    if scheme == "file":
        return Path(url2pathname(urlsplit(url).path))
    if match and url[match.end() :].startswith("//"):
        raise ValueError(f"{describe(url)}: unsupported scheme {scheme!r}; supported are http, https, file and data")
    return Path(url)


def _download(url: str, timeout_s: float | int, max_bytes: int) -> bytes:
    deadline = time.monotonic() + timeout_s
    body = bytearray()
    try:
        with httpx.stream("GET", url, timeout=timeout_s, follow_redirects=True) as response:
            if response.status_code != 200:
                raise ValueError(f"{describe(url)}: HTTP status {response.status_code}")
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > max_bytes:
                    raise ValueError(f"{describe(url)}: more than the {max_bytes} bytes allowed")
                if time.monotonic() > deadline:  # httpx limits the wait for one chunk, not for the download
                    raise ValueError(f"{describe(url)}: not complete after {timeout_s:g} seconds")
    except httpx.TimeoutException:
        raise ValueError(f"{describe(url)}: no answer within {timeout_s:g} seconds") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{describe(url)}: {error or type(error).__name__}") from None
    return bytes(body)


def decode_data_url(url: str) -> bytes:
    """Returns the bytes of a base64 data URL (RFC 2397).

    Raises:
        ValueError: the URL is not base64, or its base64 is broken.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("data URL: expected data:<type>;base64,<content>")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: a character outside ASCII
        raise ValueError(f"data URL: broken base64 of {len(body)} characters") from None


def read(source: str | bytes | bytearray | Path, fetch: FetchMedia) -> bytes | Path:
    """Returns a source's bytes, or an existing file that holds them.

    Raises:
        ValueError: the file does not exist, or the source is empty; errors of `fetch` and `decode_data_url`.
    """
    if isinstance(source, str):
        data = decode_data_url(source) if is_data_url(source) else fetch(source)
    else:
        data = bytes(source) if isinstance(source, bytearray) else source
    if isinstance(data, Path):
        _check_file(data, describe(source))
    elif not data:
        raise ValueError(f"{describe(source)}: it is empty")
    return data


def _check_file(path: Path, name: str) -> None:
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:  # the name is too long, or has a zero byte
        raise ValueError(f"{name}: not a usable file name ({type(error).__name__})") from None
    if not found:
        raise ValueError(f"{name}: {'not a file' if path.exists() else 'no such file'}")

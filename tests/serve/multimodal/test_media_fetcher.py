"""The server's rules for URLs and paths in requests: files, downloads, limits, addresses and domains."""

import asyncio
import http.server
import ipaddress
import threading
from pathlib import Path

import pytest

from serve.multimodal.ip_rules import is_allowed, resolve
from serve.multimodal.media_fetcher import DownloadLimits, MediaFetcher, NetworkPolicy

PICTURE = b"a picture's bytes" * 100
LOOPBACK_POLICY = NetworkPolicy(networks=(ipaddress.ip_network("127.0.0.1/32"),))  # allows the test site


@pytest.fixture
def folder(tmp_path):
    """An allowed folder with a file, beside a file that is not allowed."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "inside.png").write_bytes(PICTURE)
    (tmp_path / "secret.png").write_bytes(b"secret")
    return allowed


@pytest.fixture
def fetch(folder):
    return MediaFetcher(folder, network_policy=LOOPBACK_POLICY)


class _Site(http.server.BaseHTTPRequestHandler):
    """A test site.

    /picture; /none (404); /hop/N (N redirects, then /picture); /to-file (redirects to a file URL);
    /never (no answer).
    """

    def do_GET(self):
        if self.path == "/never":
            self.server.stopped.wait(20)
        elif self.path == "/drip":
            self._drip()
        elif self.path == "/picture":
            self._reply(200, PICTURE)
        elif self.path.startswith("/hop/"):
            left = int(self.path.removeprefix("/hop/"))
            self._reply(302, b"", "/picture" if left == 1 else f"/hop/{left - 1}")
        elif self.path == "/to-file":
            self._reply(302, b"", "file:///etc/hostname")
        elif self.path.startswith("/to/"):
            self._reply(302, b"", f"http://{self.path.removeprefix('/to/')}:{self.server.server_port}/picture")
        elif self.path == "/host":
            self._reply(200, self.headers["Host"].encode())
        else:
            self._reply(404, b"nothing here")

    def _drip(self):
        """Sends a byte now and then, and never ends."""
        self.send_response(200)
        self.end_headers()
        while not self.server.stopped.wait(0.02):
            try:
                self.wfile.write(b".")
            except OSError:
                return

    def _reply(self, status, content, location=None):
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    server.stopped = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "FILE://{}"])
def test_files_under_the_allowed_folder_are_read(fetch, folder, form):
    assert fetch(form.format(folder / "inside.png")) == (folder / "inside.png").resolve()


def test_file_urls_are_percent_decoded(fetch, folder):
    (folder / "two words.png").write_bytes(PICTURE)
    assert fetch((folder / "two words.png").as_uri()).read_bytes() == PICTURE


def test_paths_outside_get_the_same_error_whether_they_exist_or_not(fetch, folder):
    def refusal(path):
        with pytest.raises(ValueError, match="allowed-local-media-path") as caught:
            fetch(str(path))
        return str(caught.value).replace(str(path), "PATH")

    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "circle").symlink_to(folder / "circle")
    paths = ["../secret.png", "../nothing.png", "link.png", "circle"]
    refusals = {refusal(folder / path) for path in paths} | {refusal(path) for path in ("/etc/passwd", "x.png", "a\0b")}
    assert len(refusals) == 1
    assert refusal(f"{folder}-too/x.png") in refusals  # a folder whose name merely begins the same


def test_local_files_are_refused_without_an_allowed_folder(folder):
    with pytest.raises(ValueError, match="reads no local files; --allowed-local-media-path"):
        MediaFetcher()(str(folder / "inside.png"))


@pytest.mark.parametrize(
    "url, words",
    [
        ("", "the URL is empty"),
        ("ftp://host/x.png", "unsupported scheme 'ftp'"),
        ("gopher:x", "unsupported scheme 'gopher'"),
        ("file://elsewhere/x.png", "must not name a host"),
        ("http://", "http://"),
        ("http://[::1", "http://"),
        ("http://127.0.0.1:1/x.png", "http://127.0.0.1:1/x.png"),
    ],
)
def test_invalid_urls_are_refused(fetch, url, words):
    with pytest.raises(ValueError) as caught:
        fetch(url)
    assert str(caught.value).startswith(url) and words in str(caught.value) and "\n" not in str(caught.value)


def test_downloads_follow_redirects(fetch, site):
    assert fetch(f"{site}/picture") == PICTURE
    assert fetch(f"{site}/hop/3") == PICTURE


@pytest.mark.parametrize(
    "path, words", [("/none", "HTTP status 404"), ("/hop/4", "redirects"), ("/to-file", "only http and https")]
)
def test_failed_downloads_are_explained(fetch, site, path, words):
    with pytest.raises(ValueError, match=words):
        fetch(site + path)


def test_download_size_is_bounded(site):
    exact = MediaFetcher(network_policy=LOOPBACK_POLICY, limits=DownloadLimits(max_bytes=len(PICTURE)))
    assert exact(f"{site}/picture") == PICTURE
    less = MediaFetcher(network_policy=LOOPBACK_POLICY, limits=DownloadLimits(max_bytes=len(PICTURE) - 1))
    with pytest.raises(ValueError, match=f"more than the {len(PICTURE) - 1} bytes"):
        less(f"{site}/picture")


@pytest.mark.parametrize(
    "path, limits",
    [
        ("/never", DownloadLimits(read_s=0.2)),
        ("/never", DownloadLimits(total_s=0.2)),
        ("/drip", DownloadLimits(read_s=10, total_s=0.3)),
    ],
)
def test_download_time_is_bounded(site, path, limits):
    with pytest.raises(ValueError, match="not complete in time"):
        MediaFetcher(network_policy=LOOPBACK_POLICY, limits=limits)(site + path)


PUBLIC = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
NOT_PUBLIC = (
    "127.0.0.1 127.1.2.3 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 224.0.0.1 255.255.255.255 "
    "240.0.0.1 :: ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1:: "
    "2001:0:7f00:1:: fe80::1 fe80::1%eth0 fc00::1 fd12::1 fec0::1 ff02::1 2001:db8::1 100::1"
).split()


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address):
    assert is_allowed(address, ())


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_other_addresses_are_refused(address):
    assert not is_allowed(address, ())


def test_further_networks_are_allowed():
    networks = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "fd00::/8")]
    assert all(is_allowed(address, networks) for address in ("10.9.9.9", "::ffff:10.9.9.9", "fd12::1", "8.8.8.8"))
    assert not any(is_allowed(address, networks) for address in ("127.0.0.1", "fc00::1", "::ffff:192.168.0.1"))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0", "[::]"],
)
def test_every_notation_of_loopback_is_refused(site, host):
    port = site.rpartition(":")[2]
    with pytest.raises(ValueError, match=r"not an address on the internet; --allowed-media-networks|Invalid IPv4"):
        MediaFetcher()(f"http://{host}:{port}/picture")


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "2130706433", "[::ffff:127.0.0.2]", "169.254.169.254"])
def test_redirects_are_checked_like_the_first_url(site, host):
    no_more = NetworkPolicy(resolve=lambda name, port: _answers("127.0.0.9") if name == "localhost" else resolve(name, port))
    network_policy = NetworkPolicy(networks=LOOPBACK_POLICY.networks, resolve=no_more.resolve)
    if host == "2130706433":  # 127.0.0.1, which is allowed here
        assert MediaFetcher(network_policy=network_policy)(f"{site}/to/{host}") == PICTURE
        return
    with pytest.raises(ValueError, match="not an address on the internet"):
        MediaFetcher(network_policy=network_policy)(f"{site}/to/{host}")


async def _answers(*addresses):
    return list(addresses)


def test_host_is_resolved_once_and_the_checked_address_is_used(site):
    asked = []

    async def rebinding(host, port):
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    port = site.rpartition(":")[2]
    fetch = MediaFetcher(network_policy=NetworkPolicy(LOOPBACK_POLICY.networks, resolve=rebinding))
    assert fetch(f"http://site.test:{port}/host") == f"site.test:{port}".encode()  # the host name, at the checked address
    assert asked == ["site.test"]
    with pytest.raises(ValueError, match=r"at 127\.0\.0\.2, which is not"):
        fetch(f"http://site.test:{port}/host")


def test_one_refused_address_refuses_the_host():
    fetch = MediaFetcher(network_policy=NetworkPolicy(resolve=lambda host, port: _answers("8.8.8.8", "10.0.0.1")))
    with pytest.raises(ValueError, match=r"at 10\.0\.0\.1"):
        fetch("http://site.test/picture")


def test_only_allowed_domains_are_reached(site):
    port = site.rpartition(":")[2]
    network_policy = NetworkPolicy(LOOPBACK_POLICY.networks, frozenset({"good.test"}), lambda host, port: _answers("127.0.0.1"))
    fetch = MediaFetcher(network_policy=network_policy)
    assert fetch(f"http://Good.test:{port}/picture") == PICTURE
    for url in (f"http://bad.test:{port}/picture", f"http://good.test:{port}/to/bad.test"):
        with pytest.raises(ValueError, match=r"'bad\.test' is none of those that --allowed-media-domains"):
            fetch(url)


def test_unknown_host_is_refused():
    with pytest.raises(ValueError, match=r"the host 'no\.such\.host\.invalid' has no address"):
        MediaFetcher()("http://no.such.host.invalid/x.png")


def test_system_resolver_reads_numbers_as_addresses():
    assert asyncio.run(resolve("2130706433", 80)) == ["127.0.0.1"]


def test_allowed_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        MediaFetcher(Path(tmp_path / "none"))

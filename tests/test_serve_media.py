"""What a request's URLs and paths may open."""

import http.server
import threading
from pathlib import Path

import pytest

from serve.media import Limits, MediaFetcher

PICTURE = b"a picture's bytes" * 100


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
    return MediaFetcher(folder)


class _Site(http.server.BaseHTTPRequestHandler):
    """/picture; /none (404); /hop/N (N redirects, then /picture); /to-file (a redirect to a file URL); /never (no answer)."""

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
        else:
            self._reply(404, b"nothing here")

    def _drip(self):
        """Always on time for the next byte, and never done."""
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
def test_files_under_the_allowed_folder(fetch, folder, form):
    assert fetch(form.format(folder / "inside.png")) == (folder / "inside.png").resolve()


def test_percent_signs_of_file_urls(fetch, folder):
    (folder / "two words.png").write_bytes(PICTURE)
    assert fetch((folder / "two words.png").as_uri()).read_bytes() == PICTURE


def test_outside_is_refused_in_the_same_words_whether_it_exists_or_not(fetch, folder):
    def refusal(path):
        with pytest.raises(ValueError, match="allowed-local-media-path") as caught:
            fetch(str(path))
        return str(caught.value).replace(str(path), "PATH")

    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "circle").symlink_to(folder / "circle")
    paths = ["../secret.png", "../nothing.png", "link.png", "circle"]
    refusals = {refusal(folder / path) for path in paths} | {refusal(path) for path in ("/etc/passwd", "x.png", "a\0b")}
    assert len(refusals) == 1
    assert refusal(f"{folder}-too/x.png") in refusals  # a longer name is not a folder inside


def test_no_folder_allowed_none_read(folder):
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
def test_urls_that_lead_nowhere(fetch, url, words):
    with pytest.raises(ValueError) as caught:
        fetch(url)
    assert str(caught.value).startswith(url) and words in str(caught.value) and "\n" not in str(caught.value)


def test_downloads(fetch, site):
    assert fetch(f"{site}/picture") == PICTURE
    assert fetch(f"{site}/hop/3") == PICTURE


@pytest.mark.parametrize("path, words", [("/none", "HTTP status 404"), ("/hop/4", "redirects"), ("/to-file", "to-file")])
def test_downloads_that_fail(fetch, site, path, words):
    with pytest.raises(ValueError, match=words):
        fetch(site + path)


def test_a_download_is_bounded_in_bytes(site):
    exact = MediaFetcher(limits=Limits(max_bytes=len(PICTURE)))
    assert exact(f"{site}/picture") == PICTURE
    less = MediaFetcher(limits=Limits(max_bytes=len(PICTURE) - 1))
    with pytest.raises(ValueError, match=f"more than the {len(PICTURE) - 1} bytes"):
        less(f"{site}/picture")


@pytest.mark.parametrize(
    "path, limits",
    [("/never", Limits(read_s=0.2)), ("/never", Limits(total_s=0.2)), ("/drip", Limits(read_s=10, total_s=0.3))],
)
def test_a_download_is_bounded_in_time(site, path, limits):
    with pytest.raises(ValueError, match="not complete in time"):
        MediaFetcher(limits=limits)(site + path)


def test_the_allowed_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        MediaFetcher(Path(tmp_path / "none"))

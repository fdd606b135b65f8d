"""Downloads against a real HTTP server on the loopback that misbehaves in every way that servers do."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from features.errors import InputError
from features.images import gather as images
from features.images.download import DownloadError, DownloadSpec, download, is_public
from features.images.gather import ImageSpec, gather_images, image_path, images_folder, stored_images
from tests.features.seeing import picture


def jpeg(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "JPEG")
    return stream.getvalue()


class Server(ThreadingHTTPServer):
    """Answers by path, and counts what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.together = self.most_together = 0
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            count = self.server.asked[self.path]
            self.server.together += 1
            self.server.most_together = max(self.server.most_together, self.server.together)
        time.sleep(0.02)
        with self.server.lock:  # before the answer: a client that has it may ask again at once
            self.server.together -= 1
        with contextlib.suppress(OSError):  # the client has hung up
            self._answer(self.path.strip("/"), count)

    def _answer(self, path: str, count: int) -> None:
        path = path.partition("?")[0]
        body = jpeg(int(path.removeprefix("good-"))) if path.startswith("good-") else jpeg()
        if path.startswith("good"):
            time.sleep(0.02)
            self._send(200, body)
        elif path == "second-try":
            self._send(*((503, b"") if count == 1 else (200, body)))
        elif path in ("404", "500"):
            self._send(int(path), b"")
        elif path == "drip":
            self._send(200, b"", length=1000)
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif path == "silent":
            time.sleep(3)
        elif path == "half":
            self._send(200, body[: len(body) // 2], length=len(body))
        elif path == "half-chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(body) + body[:10])
        elif path == "large":
            self._send(200, b"x" * 5000)
        elif path == "large-unsaid":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000)
        elif path == "text":
            self._send(200, b"<html>no image here</html>")
        elif path == "busy":
            self.send_response(503)
            self.send_header("Retry-After", "\xb2")  # a digit to `str.isdigit`, and no number
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.startswith("to-"):
            to = {"file": "file:///etc/passwd", "private": "http://10.0.0.1/x", "loop": "/to-loop", "good": "/good-1",
                  "nowhere": "http://[bad/"}  # fmt: skip
            self.send_response(302)
            self.send_header("Location", to[path[3:]])
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def spec_of(**fields: object) -> DownloadSpec:
    return DownloadSpec(**{"private_addresses": True, "timeout": 1.0, "backoff": 0.0, "max_bytes": 4000, **fields})


def test_a_file_comes_whole(server: Server) -> None:
    assert download(server.url("good-3"), spec_of()) == jpeg(3)
    assert download(server.url("to-good"), spec_of()) == jpeg(1)
    assert download(server.url("good-1?size=large&x=ü"), spec_of()) == jpeg(1)


@pytest.mark.parametrize(
    ("path", "reason", "asked"),
    [
        ("404", "HTTP 404", 1),
        ("500", r"HTTP 500 \(3 tries\)", 3),
        ("half", r"ended after \d+ of [\d,]+ bytes \(3 tries\)", 3),
        ("half-chunked", r"IncompleteRead.* \(3 tries\)", 3),
        ("large", "larger than 4,000 bytes", 1),
        ("large-unsaid", "larger than 4,000 bytes", 1),
        ("to-file", "file address, only http and https are fetched", 1),
        ("to-loop", "more than 5 redirects", 6),
        ("to-nowhere", r"not a URL \(Invalid IPv6 URL\)", 1),
        ("busy", r"HTTP 503 \(3 tries\)", 3),
    ],
)
def test_what_does_not_come_says_why(server: Server, path: str, reason: str, asked: int) -> None:
    with pytest.raises(DownloadError, match=f"^{reason}$"):
        download(server.url(path), spec_of())
    assert server.asked[f"/{path}"] == asked


def test_all_addresses_of_a_name_share_the_time_of_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = 0.0, []

    def nobody(address: tuple[str, int], timeout: float) -> None:
        nonlocal now
        given.append(timeout)
        now += 20.0
        raise TimeoutError

    addresses = [(None, None, None, "", (f"192.0.9.{number}", 80)) for number in range(3)]
    monkeypatch.setattr("features.images.download.time.monotonic", lambda: now)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: addresses)
    monkeypatch.setattr("socket.create_connection", nobody)
    for scheme in ("http", "https"):
        now, given = 0.0, []
        with pytest.raises(DownloadError, match="no answer within 30 s"):
            download(f"{scheme}://images.example/a.jpg", DownloadSpec(tries=1))
        assert given == [30.0, 10.0]


@pytest.mark.parametrize("path", ["drip", "silent"])
def test_a_slow_server_ends_at_the_deadline(server: Server, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"^no answer within 0\.4 s$"):
        download(server.url(path), spec_of(timeout=0.4, tries=1))
    assert time.monotonic() - start < 2.5  # `silent` answers after 3, `drip` after 50


def test_another_try_helps_and_waits_longer_each_time(server: Server) -> None:
    assert download(server.url("second-try"), spec_of()) == jpeg()
    waits: list[float] = []
    with pytest.raises(DownloadError, match="HTTP 500"):
        download(server.url("500"), spec_of(tries=4, backoff=1.0), waits.append)
    assert [1 <= waits[0] <= 1.5, 2 <= waits[1] <= 3, 4 <= waits[2] <= 6, len(waits)] == [True, True, True, 3]


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (ConnectionResetError("reset"), 3),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), 3),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 1),
        (ssl.SSLCertVerificationError("certificate verify failed"), 1),
        (http.client.InvalidURL("control characters"), 1),
    ],
)
def test_what_another_try_cannot_change_is_asked_once(
    error: Exception, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(url: str, *_: object) -> bytes:
        asked.append(url)
        raise error

    monkeypatch.setattr("features.images.download._request", ask)
    with pytest.raises(DownloadError, match=f"^{type(error).__name__}: "):
        download("http://example.com/x", spec_of())
    assert len(asked) == tries


def test_private_addresses_are_refused_also_behind_names_and_redirects(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = spec_of(private_addresses=False)
    for url in (
        server.url("good"),
        f"http://localhost:{server.server_port}/good",
        f"http://[::1]:{server.server_port}/",
    ):
        with pytest.raises(DownloadError, match=r"is the private address .*; images\.private_addresses would allow it"):
            download(url, closed)
    assert server.asked == {}
    # The first host is taken for a public one; what it redirects to is looked at anew.
    monkeypatch.setattr("features.images.download.is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(DownloadError, match=r"10\.0\.0\.1 is the private address 10\.0\.0\.1"):
        download(server.url("to-private"), closed)
    assert server.asked == {"/to-private": 1}


def test_the_address_that_was_checked_is_the_one_that_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the name is looked up once, so a second answer has nobody to mislead."""
    real, lookups = socket.getaddrinfo, []

    def rebinding(host: str, *rest: object, **more: object) -> object:
        if host == "rebind.example":
            lookups.append(host)
            host = "127.0.0.1" if len(lookups) == 1 else "10.0.0.1"
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr("features.images.download.is_public", lambda address: address == "127.0.0.1")
    url = f"http://rebind.example:{server.server_port}/good-2"
    assert download(url, spec_of(private_addresses=False)) == jpeg(2)
    assert lookups == ["rebind.example"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # a cloud's credentials
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fec0::1", False),
        ("64:ff9b:1::7f00:1", False),
        ("::127.0.0.1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize("url", ["ftp://x/y", "http:///x", "http://[::1", "x", "http://example.com:99999999/"])
def test_what_is_no_address_of_the_web(url: str) -> None:
    with pytest.raises(DownloadError, match=r"only http and https are fetched|not a URL"):
        download(url, spec_of())


def test_all_faults_of_a_spec_at_once() -> None:
    with pytest.raises(InputError, match=r"images\.parallel is 0; .*; images\.timeout is 0; give a number above 0$"):
        ImageSpec(parallel=0, timeout=0)
    with pytest.raises(InputError, match=r"images\.max_missing_fraction is 2; give a number from 0 to 1"):
        ImageSpec(max_missing_fraction=2)


# --- gathering ----------------------------------------------------------------------------------------------------


def test_images_are_fetched_once_side_by_side_and_tried_again_where_they_failed(server: Server, tmp_path: Path) -> None:
    spec = ImageSpec(private_addresses=True, timeout=1.0, backoff=0.0, parallel=3, tries=2, max_bytes=100_000)
    (tmp_path / "local.jpg").write_bytes(jpeg(0))
    good = [server.url(f"good-{i}") for i in range(12)]
    bad = {
        server.url("text"): r"not a whole image (UnidentifiedImageError: ",
        server.url("404"): "HTTP 404",
        server.url("to-nowhere"): "not a URL (Invalid IPv6 URL)",
        "gone.jpg": "No such file",
        "nul\0.jpg": "embedded null byte",
        "pipe.jpg": "not a file",
        "large.jpg": "larger than 100,000 bytes",
    }
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "large.jpg").write_bytes(b"x" * 100_001)
    references = [*good, *good, *bad, "local.jpg"]
    calls: list[tuple[int, int]] = []
    gathered = gather_images(references, tmp_path, tmp_path, spec, lambda *call: calls.append(call))
    assert set(gathered.names) == {*good, "local.jpg"}
    assert gathered.names["local.jpg"] == gathered.names[good[0]]  # known by content
    assert {url: gathered.missing[url].startswith(why) for url, why in bad.items()} == dict.fromkeys(bad, True)
    assert image_path(images_folder(tmp_path), gathered.names[good[5]]).read_bytes() == jpeg(5)
    assert calls[-1] == (20, 20)
    assert 1 < server.most_together <= 3
    assert not list(tmp_path.rglob("*.tmp"))

    server.asked.clear()
    again = gather_images(references, tmp_path, tmp_path, spec)
    assert again.names == gathered.names
    assert set(server.asked) == {"/text", "/404", "/to-nowhere"}
    index = next((images_folder(tmp_path) / "index").iterdir())
    index.write_text(index.read_text() + '["half a line of a ki')
    assert stored_images(references, tmp_path, tmp_path) == gathered.names
    (tmp_path / "local.jpg").write_bytes(jpeg(7))
    assert "local.jpg" not in stored_images(references, tmp_path, tmp_path)


def test_no_more_images_are_decoded_at_once_than_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    together, most, lock, decode = [0], [0], threading.Lock(), images.decode

    def slowly(content: bytes) -> object:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.02)
        with lock:
            together[0] -= 1
        return decode(content)

    monkeypatch.setattr(images, "decode", slowly)
    monkeypatch.setattr(images, "_DECODING", threading.Semaphore(2))
    gathered = gather_images([f"{i}.jpg" for i in range(8)], tmp_path, tmp_path, ImageSpec(parallel=8))
    assert len(gathered.names) == 8
    assert most[0] <= 2

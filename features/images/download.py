"""Download of one file over http or https from untrusted servers: bounded in time and size, never from a private address.

The address that is checked is the address that is connected to, for each redirect anew: a name that resolves to a public
address once and to a private one the next time (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import http.client
import ipaddress
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from features.checks import number, refuse, whole
from features.errors import one_line

_REDIRECTS = 5
_CHUNK = 65_536
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
# Networks that the standard library takes for public: site-local, local NAT64 (RFC 8215), IPv4 addresses in IPv6 form.
_NOT_PUBLIC = tuple(map(ipaddress.IPv6Network, ("fec0::/10", "64:ff9b:1::/48", "::/96")))
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that another try may change


@dataclass(frozen=True, kw_only=True)
class DownloadSpec:
    """How files are fetched."""

    # files at a time
    parallel: int = 16
    # seconds for one try, to the last byte; how long a name may be looked up is the system's own setting
    timeout: float = 30.0
    # tries of one file; after the first, only where another may help: time-outs, broken connections, busy servers
    tries: int = 3
    # seconds before the second try; doubled before each further one, and up to half of it more at random
    backoff: float = 1.0
    # largest file
    max_bytes: int = 20_000_000
    # whether addresses of this machine and of private networks are allowed
    private_addresses: bool = False

    def __post_init__(self) -> None:
        refuse(*self.faults(), place="images.")

    def faults(self) -> list[str]:
        """Return what is wrong with the fields."""
        return [
            *(whole(self, name, least=1) for name in ("parallel", "tries", "max_bytes")),
            number(self, "timeout", above=0),
            number(self, "backoff", least=0),
        ]


class DownloadError(Exception):
    """Says why there is no file. wait: seconds that the server asks to wait; None where no other try would help."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def download(url: str, spec: DownloadSpec, sleep: Callable[[float], None] = time.sleep) -> bytes:
    """Return the file's bytes, after as many tries as it takes and the spec allows. Raises DownloadError."""
    for attempt in range(1, spec.tries + 1):
        try:
            return _try_once(url, spec)
        except DownloadError as error:
            if error.wait is None or attempt == spec.tries:
                tries = f" ({attempt} tries)" if attempt > 1 else ""
                raise DownloadError(f"{error}{tries}") from error
            backoff = (
                spec.backoff * 2 ** (attempt - 1) * random.uniform(1, 1.5)
            )  # so that they do not all come back at once
            sleep(min(max(backoff, error.wait), _LONGEST_WAIT))
    raise AssertionError("tries >= 1")


def _try_once(url: str, spec: DownloadSpec) -> bytes:
    """Make one try, redirects included."""
    deadline = time.monotonic() + spec.timeout
    for _ in range(_REDIRECTS + 1):
        try:
            response = _request(url, spec, deadline)
        except TimeoutError as error:
            raise DownloadError(f"no answer within {spec.timeout:g} s", 0.0) from error
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(
                f"{type(error).__name__}: {one_line(error)}".rstrip(": "), _wait_after(error)
            ) from error
        except ValueError as error:
            raise DownloadError(f"not a URL ({error})") from error
        if isinstance(response, bytes):
            return response
        url = response
    raise DownloadError(f"more than {_REDIRECTS} redirects")


def _wait_after(error: Exception) -> float | None:
    """Return 0 where another try may help; None for a bad URL, a bad certificate and a name that nobody has."""
    final = isinstance(error, (http.client.InvalidURL, ssl.SSLCertVerificationError))
    unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
    return None if final or unknown else 0.0


def _request(url: str, spec: DownloadSpec, deadline: float) -> bytes | str:
    """Return the file, or the URL that the server redirects to."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"not a URL ({error})") from error
    if parts.scheme not in ("http", "https") or not host:
        raise DownloadError(f"{parts.scheme or 'no'} address, only http and https are fetched")
    connection_class = _Https if parts.scheme == "https" else _Http
    connection = connection_class(host, port, timeout=_left(deadline))
    connection.allow_private, connection.deadline = spec.private_addresses, deadline
    try:
        path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="/?%:@!$&'()*+,;=~-._")
        connection.request("GET", path, headers={"User-Agent": "cdr-diffusion-study", "Accept-Encoding": "identity"})
        with _ended_at(deadline, connection.sock), connection.getresponse() as response:
            return _read(url, response, spec)
    finally:
        connection.close()


@contextmanager
def _ended_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Cut the connection at the deadline: a time-out of the socket starts anew with each byte that a slow server drips."""

    def cut() -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_left(deadline), cut)
    timer.start()
    try:
        yield
    except (DownloadError, OSError, http.client.HTTPException):
        _left(deadline)  # a connection that was cut at the deadline says so, and not what the cut looks like
        raise
    finally:
        timer.cancel()


def _read(url: str, response: http.client.HTTPResponse, spec: DownloadSpec) -> bytes | str:
    """Return the body, or the URL that the server redirects to."""
    if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
        return urljoin(url, location)
    if response.status != 200:
        raise DownloadError(f"HTTP {response.status}", _retry_after(response) if response.status in _RETRIED else None)
    length = response.length  # None where the server does not say
    too_large = DownloadError(f"larger than {spec.max_bytes:,} bytes")
    if length is not None and length > spec.max_bytes:
        raise too_large
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > spec.max_bytes:
            raise too_large
    if length is not None and len(body) < length:
        raise DownloadError(f"ended after {len(body):,} of {length:,} bytes", 0.0)
    return bytes(body)


def _left(deadline: float) -> float:
    """Return the seconds that are left. Raises TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _retry_after(response: http.client.HTTPResponse) -> float:
    """Return the seconds that the server asks to wait, where it gives them as a number."""
    seconds = response.getheader("Retry-After", "0")
    return float(seconds) if seconds.isascii() and seconds.isdigit() else 0.0  # "²" is a digit to `isdigit` alone


class _Http(http.client.HTTPConnection):
    """Connects to an address that was checked, not to a name, which may resolve to another address by then."""

    allow_private = False
    deadline: float

    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.deadline, self.allow_private)


class _Https(http.client.HTTPSConnection):
    allow_private = False
    deadline: float

    def connect(self) -> None:
        plain = _connect(self.host, self.port, self.deadline, self.allow_private)
        try:
            with _ended_at(self.deadline, plain):
                self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def _connect(host: str, port: int, deadline: float, allow_private: bool) -> socket.socket:
    failure: OSError | None = None
    for *_, socket_address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        address = str(socket_address[0])
        if not allow_private and not is_public(address):
            raise DownloadError(f"{host} is the private address {address}; images.private_addresses would allow it")
        try:
            return socket.create_connection((address, port), _left(deadline))
        except OSError as error:
            failure = error
    raise failure or OSError(f"{host} has no address")


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet, in whatever form it is written."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # an IPv4 address behind NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if any(ip in network for network in _NOT_PUBLIC):
            return False
    return ip.is_global and not ip.is_multicast

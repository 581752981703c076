"""An address -> one whole file, or one line that says why not.

What is cut goes on where it was: `<file>.part` holds the bytes that came, `<file>.part.json`
the version of the file that they belong to (its ETag, or its time). Of another version no byte
is kept. Redirects and proxies are followed as the environment says.
"""

import http.client
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request

import kit
from kit import files
from kit.data.download.headers import (
    Version,
    asked_wait,
    follows,
    length,
    version,
)

CHUNK = 1 << 20
STEP = 1 << 16  # bytes that a try must bring to be no idle one
ABSENT = (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
BEYOND = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
LATER = (
    *(HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, BEYOND),
    HTTPStatus.TOO_MANY_REQUESTS,
)


class Failed(Exception):
    """A file that could not be had; its text is the reason."""

    def __init__(self, url: str, reason: str, absent: bool = False) -> None:
        super().__init__(reason)
        self.url, self.absent = url, absent  # absent: the server has no such file


class Wrong(Exception):
    """A file that came whole and is not what it should be."""


class Stopped(Exception):
    """The run is ending: what is there stays, and goes on another time."""


class _Again(Exception):
    """What may be better at another try."""

    def __init__(self, reason: str, code: int = 0, after: float = 0.0) -> None:
        super().__init__(reason)
        self.code, self.after = code, after  # HTTP's; seconds that the server asks for


@dataclass(frozen=True)
class Patience:
    """How long a server is asked, and how gently."""

    tries: int = 8  # in a row that bring nothing new
    copies: int = 3  # that came whole and were wrong
    timeout: float = 60.0  # seconds of silence, and over which the pace is taken
    slowest: float = 4096.0  # bytes a second
    pause: float = 1.0  # seconds before the second try; doubled for each further one
    longest: float = 120.0  # of such pauses
    obeyed: float = 900.0  # seconds at most that a server can ask for


class Client:
    """Fetches for any number of threads, until `stop` is set."""

    def __init__(
        self,
        patience: Patience = Patience(),
        stop: threading.Event | None = None,
        meter: Callable[[int], object] = lambda count: None,  # hears of bytes
    ) -> None:
        self.patience, self.stop = patience, stop or threading.Event()
        self.meter = meter
        # neither files nor FTP: some addresses come from tables
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            *(urllib.request.ProxyHandler, urllib.request.UnknownHandler),
            *(urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
            *(urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor),
            urllib.request.HTTPDefaultErrorHandler,
        ):
            self._opener.add_handler(handler())

    def fetch(
        self, url: str, path: Path, check: Callable[[Path], object] | None = None
    ) -> Path:
        """`path`, whole; nothing is asked for where it is there and as it should be.

        check: raises Wrong where the bytes are not those they should be; they are fetched
        anew then. Raises Failed.
        """
        if path.exists():
            try:
                if check:
                    check(path)
                return path
            except Wrong:
                path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        part, wrong = path.with_name(f"{path.name}.part"), 0

        def attempt() -> None:
            nonlocal wrong
            self._complete(url, part)
            try:
                if check:
                    check(part)
            except Wrong as error:
                part.unlink()
                wrong += 1
                if wrong >= self.patience.copies:
                    raise Failed(url, f"{error}; {wrong} times") from None
                raise _Again(str(error)) from None

        self._persist(url, attempt, lambda: _size(part))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _note(part).unlink(missing_ok=True)
        return path

    def read(self, url: str, most: int) -> bytes:
        """A small file; raises Failed, too where it has more than `most` bytes."""

        def attempt() -> bytes:
            with self._open(url, {}) as answer:
                size, data = _promised(url, answer).size, bytearray()
                for chunk in self._chunks(answer):
                    data += chunk
                    if len(data) > most:
                        raise Failed(url, f"more than {most} bytes")
            if size not in (-1, len(data)):
                raise _Again(f"cut at byte {len(data)} of {size}")
            return bytes(data)

        return self._persist(url, attempt, lambda: 0)

    def size(self, url: str) -> int | None:
        """Bytes of a file by one HEAD request; None where no answer says it."""
        try:
            with self._open(url, {}, "HEAD") as answer:
                return length(answer)
        except (_Again, Failed):
            return None

    def _persist(
        self, url: str, attempt: Callable[[], Any], reached: Callable[[], int]
    ) -> Any:
        """Tries until one succeeds, or too many in a row bring no more bytes than ever."""
        idle, best = 0, reached()
        while True:
            try:
                return attempt()
            except _Again as error:
                now = reached()
                idle, best = (1, now) if now >= best + STEP else (idle + 1, best)
                if idle >= self.patience.tries:
                    raise Failed(url, f"{error}; {idle} tries") from None
                self._pause(idle, error.after)

    def _pause(self, idle: int, after: float) -> None:
        how = self.patience
        wait = min(how.longest, how.pause * 2 ** (idle - 1)) * random.uniform(0.5, 1.0)
        if self.stop.wait(max(wait, min(after, how.obeyed))):
            raise Stopped

    def _complete(self, url: str, part: Path) -> None:
        """Brings `part` from what it has to the whole file, by one request."""
        told = _known(part, url)
        have = _size(part) if told else 0
        if told and have == told.size and part.exists():
            return
        asked = {"Range": f"bytes={have}-", "If-Range": told.tag} if have else {}
        try:
            answer = self._open(url, asked)
        except _Again as error:
            if have and error.code == BEYOND:  # no such bytes in what is there now
                part.unlink()
            raise
        with answer:
            if answer.status == HTTPStatus.PARTIAL_CONTENT:
                if not have or not follows(answer, told, have):
                    part.unlink(missing_ok=True)
                    raise _Again("the server goes on with another file")
            else:  # the whole file: it has changed, or the server knows no ranges
                have, told = 0, _promised(url, answer)
                part.unlink(missing_ok=True)
                files.write_json(_note(part), asdict(told))
            with part.open("ab") as file:
                for chunk in self._chunks(answer):
                    file.write(chunk)
        have = _size(part)
        if told.size == -1:  # chunked: its end was marked
            files.write_json(_note(part), asdict(told) | {"size": have})
        elif have > told.size:
            part.unlink()
            raise _Again(f"{have} bytes of {told.size}")
        elif have < told.size:
            raise _Again(f"cut at byte {have} of {told.size}")

    def _open(
        self, url: str, headers: dict[str, str], method: str = "GET"
    ) -> HTTPResponse:
        if self.stop.is_set():
            raise Stopped
        try:
            if urlsplit(url).scheme not in ("http", "https"):
                raise ValueError
            request = Request(
                quote(url, safe="%/:=&?~#+!$,;'@()*[]"),
                headers={"User-Agent": f"landmark-kit/{kit.__version__}"}
                | {"Accept-Encoding": "identity"}
                | headers,
                method=method,
            )
            return self._opener.open(request, timeout=self.patience.timeout)
        except HTTPError as error:
            with error:
                code, after = error.code, asked_wait(error.headers.get("Retry-After"))
            if code >= 500 or code in LATER:
                raise _Again(f"HTTP {code}", code, after) from None
            raise Failed(url, f"HTTP {code}", code in ABSENT) from None
        except (ValueError, http.client.InvalidURL):
            raise Failed(url, "no address that can be asked for") from None
        except (OSError, HTTPException) as error:
            raise _Again(_reason(error)) from None

    def _chunks(self, answer: HTTPResponse) -> Iterator[bytes]:
        """The bytes as they come; a connection that hardly brings any is given up."""
        begun, got = time.monotonic(), 0
        while True:
            if self.stop.is_set():
                raise Stopped
            try:
                data = answer.read1(CHUNK)
            except (OSError, HTTPException) as error:
                raise _Again(_reason(error)) from None
            if not data:
                return
            yield data
            self.meter(len(data))
            got += len(data)
            passed = time.monotonic() - begun
            if passed > self.patience.timeout:
                if got < self.patience.slowest * passed:
                    raise _Again(f"only {got} bytes in {passed:.0f} s")
                begun, got = time.monotonic(), 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _known(part: Path, url: str) -> Version | None:
    """The version of the bytes in `part`, where they can be gone on with."""
    try:
        version = Version(**files.read_json(_note(part)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    # without a length nobody could tell whether what follows is all
    known = version.url == url and version.tag and version.size >= 0
    return version if known else None


def _promised(url: str, answer: HTTPResponse) -> Version:
    if length(answer) is None and not answer.chunked:
        raise Failed(url, "the server does not say how long the file is")
    return version(url, answer)


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None)  # of urllib's own error
    if isinstance(cause, Exception):
        error = cause
    return str(error) or type(error).__name__

"""Kaggle's client, signed in: calls that are repeated with care, errors in one line.

The client answers many failures with exit code 0, and authenticates (and prints) when it is
imported; so it is imported inside functions, its calls are made in this process, and what it
prints is not passed on. No message leaves here with a credential in it.
"""

import base64
import io
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

from kit.kaggle import credentials, redaction
from kit.kaggle.timeouts import Deadline, Limits, TimeOverError, limit_time
from kit.text import in_a_line, printable

Answer = TypeVar("Answer")
TRIES, FIRST_WAIT = 6, 2.0  # of one call; seconds, doubled after each try
LONGEST_WAIT = 600.0  # seconds, whatever the server asks for
CHUNK, SMALL = 1 << 16, 1 << 26  # bytes of a download: a piece, a small file
POLL, GROWTH = (2.0, 60.0), 1.5  # seconds between two looks: the first, the longest
LIMIT = (
    36 * 3600.0
)  # seconds to wait for one thing; a kernel may queue long, then run 12 h
HINTS = {
    401: "Kaggle does not accept these credentials; make new ones in its settings",
    403: "not allowed: wrong owner or slug, or the competition's rules are not accepted",
    404: "there is no such thing on Kaggle",
    429: "too many requests; wait and run the same command again",
}


class KaggleError(RuntimeError):
    """What Kaggle did not do, and why, in one line that is safe to print."""

    def __init__(self, text: str) -> None:
        super().__init__(in_a_line(text, 1000))


@dataclass(frozen=True)
class Clock:
    """Seconds, and how to let them pass."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Client:
    """A signed-in client; keeps nothing between two calls."""

    def __init__(
        self, clock: Clock, say: Callable[[str], None], limits: Limits | None = None
    ) -> None:
        self.clock = clock
        self.limits = limits or Limits()
        self.deadline: Deadline  # of the call that is being made
        self._say = say
        self._screen: Any = None  # where `say` prints while the client may not
        self._secrets: list[str] = []  # in all their forms
        self.api = self._sign_in()

    def say(self, text: str) -> None:
        with redirect_stdout(self._screen or sys.stdout):
            self._say(printable(self.redact(text)))

    def redact(self, text: str) -> str:
        """The text without credentials, wherever it came from."""
        return redaction.redact(text, self._secrets)

    def _sign_in(self) -> Any:
        try:
            place = credentials.check_credentials()
        except ValueError as error:
            raise KaggleError(f"credentials: {error}") from None
        with self._quiet():
            try:
                with limit_time(self.limits):  # the client signs in when imported
                    from kaggle.api.kaggle_api_extended import KaggleApi

                api = KaggleApi()
                self._secrets = _secrets(api)
            except TimeOverError:
                raise KaggleError("signing in: no answer in time") from None
            except ImportError as error:
                words = f"no kaggle client ({error}); pip install kaggle six"
                raise KaggleError(words) from None
        api.with_retry = lambda call, **_: call  # it may sleep for days; `ask` repeats
        try:
            self.ask("signing in", api.authenticate)
        except SystemExit:
            refused = f"credentials: Kaggle does not accept those of {place}"
            raise KaggleError(refused if place else credentials.ABSENT) from None
        self._secrets = _secrets(api)
        return api

    def call(
        self,
        doing: str,
        path: str,
        request: Any,
        read: Callable[[Any], Any] = lambda answer: answer,
        **how: Any,
    ) -> Any:
        """Sends a request to `path`, a service and method of the client; what `read` returns."""

        def send() -> Any:
            with self.api.build_kaggle_client() as kaggle:
                method: Any = kaggle
                for name in path.split("."):
                    method = getattr(method, name)
                return read(method(request))

        return self.ask(doing, send, **how)

    def pages(self, doing: str, ask: Callable[[str], Answer]) -> Iterator[Answer]:
        """Every page of a list; ask: for the page of a token, "" for the first."""
        token, tokens = "", {""}
        while len(tokens) <= self.limits.pages:
            page: Any = ask(token)
            yield page
            token = page.next_page_token
            if not token:
                return
            if token in tokens:
                raise self.error(doing, f"its list repeats the page {token!r}")
            tokens.add(token)
        raise self.error(doing, f"its list has more than {self.limits.pages} pages")

    def ask(
        self,
        doing: str,
        send: Callable[[], Answer],
        *,
        tries: int = TRIES,
        size: int = 0,
        absent: tuple[int, ...] = (),
        arrived: Callable[[], Any] | None = None,
    ) -> Any:
        """What `send` returns; too many requests, a server's error, a lost line are repeated.

        size: bytes that it carries, which take their time. absent: HTTP codes that are no error but None. arrived: asked before a repeat for what
        the last try may have done although its answer was lost; None when it did not.
        """
        from requests.exceptions import RequestException

        wait = FIRST_WAIT
        for last in [False] * (tries - 1) + [True]:
            try:
                with self._quiet(), limit_time(self.limits, size) as self.deadline:
                    return send()
            except TimeOverError:
                after = None
                if last:
                    raise self.error(doing, "no answer (time is over)") from None
            except RequestException as error:
                status, after, text = _read_error(error)
                if status in absent:
                    return None
                if last or not (status is None or status == 429 or status >= 500):
                    raise self.error(doing, text, status) from None
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                # the client's own check, or an unreadable answer
                raise self.error(doing, str(error)) from None
            self.clock.sleep(min(wait if after is None else after, LONGEST_WAIT))
            wait *= 2
            if arrived is not None and (found := arrived()) is not None:
                return found
        raise AssertionError("unreachable")

    def receive(self, answer: Any, most: int) -> Iterator[bytes]:
        """The body of an answer in pieces, as long as announced and not longer than `most`."""
        said = answer.headers.get("Content-Length", "")
        packed = answer.headers.get("Content-Encoding", "identity") != "identity"
        wanted = int(said) if said.isdigit() and not packed else None
        size, most = 0, most if wanted is None else min(most, wanted)
        for chunk in answer.iter_content(CHUNK):
            size += len(chunk)
            if size > most:
                raise ValueError(f"more than {most} bytes came")
            self.deadline.allow(len(chunk))
            yield chunk
        if wanted is not None and size < wanted:
            raise ValueError(f"{size} bytes came, not {wanted}")

    def receive_small(self, answer: Any) -> bytes:
        """The content of a small file, which Kaggle may have packed on its way down."""
        data = b"".join(self.receive(answer, SMALL))
        if not zipfile.is_zipfile(io.BytesIO(data)):
            return data
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (inside,) = archive.infolist()
            if inside.file_size > SMALL:
                raise ValueError(f"{inside.filename}: more than {SMALL} bytes")
            return archive.read(inside)

    def error(self, doing: str, text: str, status: int | None = None) -> KaggleError:
        words = in_a_line(self.redact(str(text)), 300)
        code = f"{status}: " if status else ""
        hint = f" ({HINTS[status]})" if status in HINTS else ""
        return KaggleError(f"{doing}: {code}{words}{hint}")

    def made(self, answer: Any, what: str) -> None:
        """Refuses an answer that says, with status 200, that nothing was made."""
        error = getattr(answer, "error", None)
        if error or getattr(answer, "status", "ok") == "error":
            raise self.error(what, error or "Kaggle made nothing")

    def poll(self, what: str, look: Callable[[], Answer | None]) -> Answer:
        """The first answer of `look` that is not None."""
        start, wait = self.clock.now(), POLL[0]
        while (found := look()) is None:
            if self.clock.now() - start > LIMIT:
                words = f"not finished after {LIMIT / 3600:.0f} h; run this again"
                raise KaggleError(f"{what}: {words}")
            self.clock.sleep(wait)
            wait = min(wait * GROWTH, POLL[1])
        return found

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keeps what the client prints: it may repeat what a server echoed."""
        screen, self._screen = self._screen, self._screen or sys.stdout
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield
        finally:
            self._screen = screen


def filled(request: Any, **fields: Any) -> Any:
    """A message of the client with its fields set."""
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def _secrets(api: Any) -> list[str]:
    """What must not be shown: the token or key, and the key as it is sent; in all forms."""
    from kagglesdk.kaggle_env import get_access_token_from_env

    values = api.config_values
    pair = f"{values.get('username')}:{values.get('key')}".encode()
    token, _ = get_access_token_from_env()
    found = (token, values.get("token"), values.get("key"))
    sent = base64.b64encode(pair).decode()
    return redaction.find_forms({it for it in (*found, sent) if it})


def _read_error(error: Any) -> tuple[int | None, float | None, str]:
    """HTTP status (None: the line was lost), seconds the server asks to wait, its message."""
    response = error.response
    if response is None:
        return None, None, f"no answer ({type(error).__name__})"
    status = response.status_code
    if status < 400:  # an error that came as a good answer
        status = int(response.json().get("code", 500))
    try:
        after = max(0.0, float(response.headers.get("Retry-After")))
    except (TypeError, ValueError):  # none, or a date
        after = None
    return status, after, str(error)

"""Kaggle's client, signed in: calls that are repeated with care, errors in one line.

The client answers many failures with exit code 0, and authenticates (and prints) when it is
imported; so it is imported inside functions, its calls are made in this process, and what it
prints is not passed on. No message leaves here with a credential in it.
"""

import base64
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

Answer = TypeVar("Answer")
TRIES, FIRST_WAIT = 6, 2.0  # seconds; doubled after each try
HINTS = {
    401: "Kaggle does not accept these credentials; make new ones in its settings",
    403: "not allowed: wrong owner or slug, or the competition's rules are not accepted",
    404: "there is no such thing on Kaggle",
    429: "too many requests; wait and run the same command again",
}


class KaggleError(RuntimeError):
    """What Kaggle did not do, and why, in one line."""


@dataclass(frozen=True)
class Clock:
    """Seconds, and how to let them pass."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Client:
    """A signed-in client; keeps nothing between two calls."""

    def __init__(self, clock: Clock, say: Callable[[str], None]) -> None:
        self.clock = clock
        self._say = say
        self._screen: Any = None  # where `say` prints while the client may not
        self._secrets: list[str] = []
        self.api = self._sign_in()
        values = self.api.config_values
        pair = f"{values.get('username')}:{values.get('key')}".encode()
        found = [values.get("key"), values.get("token")]
        found.append(base64.b64encode(pair).decode())
        self._secrets = [it for it in found if it and len(it) > 3]

    def say(self, text: str) -> None:
        with redirect_stdout(self._screen or sys.stdout):
            self._say(self.redact(text))

    def redact(self, text: str) -> str:
        """The text without credentials, wherever it came from."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _sign_in(self) -> Any:
        with self._quiet():
            try:
                from kaggle.api.kaggle_api_extended import KaggleApi

                api = KaggleApi()
            except ImportError as error:
                words = f"no kaggle client ({error}); pip install kaggle six"
                raise KaggleError(words) from None
        try:
            self.ask("signing in", api.authenticate)
        except SystemExit:
            raise KaggleError(
                "no Kaggle credentials; set KAGGLE_USERNAME and KAGGLE_KEY, or put "
                "kaggle.json in ~/.kaggle"
            ) from None
        return api

    def call(self, doing: str, path: str, request: Any, **how: Any) -> Any:
        """Sends a request to `path`, a service and method of the client."""

        def send() -> Any:
            with self.api.build_kaggle_client() as kaggle:
                method: Any = kaggle
                for name in path.split("."):
                    method = getattr(method, name)
                return method(request)

        return self.ask(doing, send, **how)

    def ask(
        self,
        doing: str,
        send: Callable[[], Answer],
        *,
        tries: int = TRIES,
        absent: tuple[int, ...] = (),
        arrived: Callable[[], Any] | None = None,
    ) -> Any:
        """What `send` returns; too many requests, a server's error, a lost line are repeated.

        absent: HTTP codes that are no error but None. arrived: asked before a repeat for what
        the last try may have done although its answer was lost; None when it did not.
        """
        from requests.exceptions import RequestException

        wait = FIRST_WAIT
        for last in [False] * (tries - 1) + [True]:
            try:
                with self._quiet():
                    return send()
            except RequestException as error:
                status, after, text = _read_error(error)
                if status in absent:
                    return None
                if last or not (status is None or status == 429 or status >= 500):
                    raise self.error(doing, text, status) from None
            self.clock.sleep(after if after is not None else wait)
            wait *= 2
            if arrived is not None and (found := arrived()) is not None:
                return found
        raise AssertionError("unreachable")

    def error(self, doing: str, text: str, status: int | None = None) -> KaggleError:
        words = " ".join(self.redact(str(text)).split())[:300]
        code = f"{status}: " if status else ""
        hint = f" ({HINTS[status]})" if status in HINTS else ""
        return KaggleError(f"{doing}: {code}{words}{hint}")

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keeps what the client prints: it may repeat what a server echoed."""
        screen, self._screen = self._screen, self._screen or sys.stdout
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield
        finally:
            self._screen = screen


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

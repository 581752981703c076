"""Limits of calls that are made through requests, by whatever library makes them.

Kaggle's client sets no timeouts, and a timeout of requests begins anew with every byte. So inside
`limit_time` every connection has one, and all of them are cut when the time of the call is over.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Of what is waited for; the defaults are far beyond what a working server needs."""

    silence: float = 60.0  # seconds without a byte
    call: float = 300.0  # seconds of a call, beside those for its bytes
    pace: float = 100_000.0  # bytes a second, of the slowest line that will do
    pages: int = 10_000  # of a list


class TimeOverError(BaseException):
    """A call took too long. It is no Exception because the client repeats on every one."""


class Deadline:
    """When a call is over, and the connections that are cut then."""

    def __init__(self, seconds: float, pace: float) -> None:
        self.over = False
        self._pace = pace
        self._until = time.monotonic() + seconds
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def allow(self, size: int) -> None:
        """Gives the time that `size` bytes may take."""
        self._until += size / self._pace

    def add(self, connection: socket.socket) -> None:
        """Cuts this connection, too, when the time is over; no new one is made after that."""
        with self._lock:
            if self.over:
                raise TimeOverError
            # a copy of the descriptor: TLS takes the socket itself away
            self._connections.append(socket.socket(fileno=os.dup(connection.fileno())))

    def end(self) -> None:
        self._done.set()
        self._thread.join()
        for connection in self._connections:
            connection.close()

    def _watch(self) -> None:
        while (left := self._until - time.monotonic()) > 0:
            if self._done.wait(left):
                return
        with self._lock:
            self.over = True
            for connection in self._connections:
                with suppress(OSError):  # it is closed already
                    connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def limit_time(limits: Limits, size: int = 0) -> Iterator[Deadline]:
    """Raise TimeOverError unless all calls inside end in time; size: bytes that they carry."""
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry, connection

    deadline = Deadline(limits.call + size / limits.pace, limits.pace)
    send, connect = HTTPAdapter.send, connection.create_connection

    def send_in_time(
        adapter: Any,
        request: Any,
        stream: bool = False,
        timeout: Any = None,
        **how: Any,
    ) -> Any:
        adapter.max_retries = Retry(0, read=False)  # who calls repeats, and resumes
        return send(adapter, request, stream=stream, timeout=limits.silence, **how)

    def connect_in_time(*where: Any, **how: Any) -> socket.socket:
        made = connect(*where, **how)
        deadline.add(made)
        return made

    HTTPAdapter.send, connection.create_connection = send_in_time, connect_in_time
    try:
        yield deadline
    except Exception:
        if not deadline.over:
            raise
    finally:
        HTTPAdapter.send, connection.create_connection = send, connect
        deadline.end()
    if deadline.over:  # a body without a length seems whole when it is cut
        raise TimeOverError

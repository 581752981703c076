"""What node 0's pipeline tells the other nodes, in two small files of a shared folder.

`session.json` changes every few seconds while the pipeline runs and says when it is over;
`call.json` is there while the pipeline wants the other nodes in a launch. Whether node 0
lives is told by the content changing, not by any clock but the reader's.
"""

import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kit import files

SESSION, CALL = "session.json", "call.json"
BEAT = 2.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one; a network folder may show a file a minute late
LOOK = 0.5  # seconds between two looks
WELL = "well"  # how a pipeline ends that did what it was asked to


class Lost(RuntimeError):
    """Node 0 did not start, fell silent, or ended with an error."""


@dataclass(frozen=True)
class Call:
    """A launch that node 0 is about to make."""

    module: str
    arguments: tuple[str, ...]
    logs: str
    max_restarts: int


@contextmanager
def host(folder: Path, fine: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Node 0: a session that lasts as long as the block, and says how it ended.

    fine: an exception that is a good end, too.
    """
    with files.lock(folder):
        (folder / CALL).unlink(missing_ok=True)
        session, stop = uuid.uuid4().hex, threading.Event()

        def beat() -> None:
            for count in itertools.count():
                with suppress(OSError):  # a full disk may have room again
                    _write(folder, session, count, "")
                if stop.wait(BEAT):
                    return

        thread = threading.Thread(target=beat, name="session", daemon=True)
        thread.start()
        ended = "interrupted"
        try:
            yield
            ended = WELL
        except Exception as error:
            ended = WELL if isinstance(error, fine) else str(error)
            raise
        finally:
            stop.set()
            thread.join()
            _write(folder, session, -1, ended)


@contextmanager
def calling(folder: Path, call: Call) -> Iterator[None]:
    """Node 0: asks the other nodes to join a launch, as long as the block lasts."""
    path = folder / CALL
    files.write_json(path, {"id": uuid.uuid4().hex} | asdict(call))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def follow(folder: Path, patience: float, silence: float = SILENCE) -> Iterator[Call]:
    """Another node: each call of the session that runs or comes, once, until it is over.

    patience: seconds for the session to show itself; raises `Lost` after them, after
    `silence` seconds without a sign of life, and when the session did not end well.
    """
    first = last = _read(folder / SESSION)
    since, seen, live = time.monotonic(), "", False
    while True:
        now = _read(folder / SESSION)
        if now != last:  # one that stands still may be of a session long gone
            last, since, live = now, time.monotonic(), True
        ended = now.get("ended", "")
        if live and ended:
            if ended == WELL:
                return
            raise Lost(f"the pipeline of node 0 ended: {ended}")
        waited = time.monotonic() - since
        if live and waited > silence:
            raise Lost(f"node 0 gave no sign of life for {silence:g} s")
        if not live and waited > patience:
            there = "the one there is over" if first.get("ended") else "none runs"
            raise Lost(
                f"{folder}: no pipeline of node 0 within {patience:g} s ({there})"
            )
        call = _read(folder / CALL)
        if live and call and call["id"] != seen:
            seen = call.pop("id")
            yield Call(**call | {"arguments": tuple(call["arguments"])})
            since = time.monotonic()
            continue
        time.sleep(LOOK)


def _write(folder: Path, session: str, beat: int, ended: str) -> None:
    value = {"session": session, "beat": beat, "ended": ended}
    files.write_json(folder / SESSION, value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return {}

"""Many files at once, and the checks of what came."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from kit import files
from kit.data.download.transfer import Client, Failed, Wrong

log = logging.getLogger(__name__)

GIVING_UP = 20  # failures in a row


def each(
    client: Client,
    jobs: int,
    work: Callable[[Any], None],
    items: Sequence[Any],
    url: Callable[[Any], str],
) -> list[Failed]:
    """Does `work` for each; returns the failures. A server that only fails is left alone."""
    bad, row = [], 0
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(work, item): item for item in items}
        try:
            for done in as_completed(waiting):
                try:
                    done.result()
                    row = 0
                except CancelledError:
                    reason = f"not tried: {GIVING_UP} before it failed in a row"
                    bad.append(Failed(url(waiting[done]), reason))
                except Failed as error:
                    log.warning("%s: %s", error.url, error)
                    bad.append(error)
                    row += 1
                if row == GIVING_UP:
                    for other in waiting:
                        other.cancel()
        except BaseException:
            client.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(bad, key=lambda error: error.url)


def has_md5(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False))
    if found.hexdigest() != expected:
        raise Wrong(f"MD5 {found.hexdigest()}, official is {expected}")


def is_table(path: Path, columns: Sequence[str]) -> None:
    with path.open("rb") as file:
        header = file.readline(4096).decode("utf-8", "replace").strip().split(",")
    if missing := [name for name in columns if name not in header]:
        raise Wrong(f"no column {', '.join(missing)}")


def is_list(path: Path) -> None:
    try:
        listed = isinstance(files.read_json(path), list)
    except ValueError as error:
        raise Wrong(str(error)) from None
    if not listed:
        raise Wrong("not a list of landmarks")

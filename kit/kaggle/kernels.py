"""A build's kernel on Kaggle: pushed once, watched until it ends, its output fetched.

A pushed notebook carries a fingerprint of itself and of its metadata with every dataset version
pinned; by it, the cells and the attached sources a later publish knows its own.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kit import files
from kit.kaggle import check, manifest
from kit.kaggle.client import KaggleError
from kit.kaggle.manifest import find_fault
from kit.kaggle.server import Kernel, Server

BUSY = "Maximum batch GPU session count"
BUSY_WAIT = (30.0, 600.0)  # seconds between two pushes: the first, the longest
BUSY_LIMIT = 13 * 3600.0  # a session ends after 12 h
LOG_LINES, LOG_LETTERS = 20, 500  # shown of the log of a kernel that failed
MARK = "landmark_kit"  # key of the fingerprint in a pushed notebook's metadata


def push(
    server: Server, build: Path, versions: Mapping[str, int], again: bool
) -> tuple[str, int]:
    """Pushes the kernel unless it is there; its name and version."""
    folder = build / manifest.SUBMISSION
    metadata = _pinned(files.read_json(folder / manifest.KERNEL), versions)
    ref = metadata["id"]
    with TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        files.write_json(Path(copy, manifest.KERNEL), metadata)
        code = Path(copy, metadata["code_file"])
        mark = files.fingerprint([metadata, files.sha256(code)])
        _stamp(code, mark)
        before = server.kernel(ref)
        if before and not again and _is(before, mark, code, metadata):
            server.say(
                f"kernel {ref}: version {before.version} is this one already; --again repeats it"
            )
            return ref, before.version
        known = before.version if before else 0

        def arrived() -> int | None:
            now = server.kernel(ref)
            new = now and now.version > known and _is(now, mark, code, metadata)
            return now.version if now and new else None

        version = _save(server, ref, Path(copy), arrived)
    server.say(f"kernel {ref}: pushed as version {version}")
    return ref, version


def _save(
    server: Server, ref: str, folder: Path, arrived: Callable[[], int | None]
) -> int:
    """Pushes, waiting while all GPU sessions are taken; reads every field of the answer."""
    start, wait = server.clock.now(), BUSY_WAIT[0]
    while True:
        answer = server.push(ref, folder, arrived)
        if isinstance(answer, int):
            return answer
        if not answer.error:
            break
        waited = server.clock.now() - start
        if BUSY not in answer.error or waited + wait > BUSY_LIMIT:
            raise KaggleError(server.redact(f"kernel {ref}: {answer.error}"))
        server.say(f"kernel {ref}: {answer.error}; trying again in {wait:.0f} s")
        server.clock.sleep(wait)
        wait = min(wait * 2, BUSY_WAIT[1])
    for kind in ("dataset", "competition", "kernel", "model"):
        if refused := getattr(answer, f"invalid_{kind}_sources"):
            names = ", ".join(map(str, refused))
            raise KaggleError(f"kernel {ref}: Kaggle did not attach {kind} {names}")
    if not answer.version_number:
        raise KaggleError(f"kernel {ref}: Kaggle named no version of what was pushed")
    return answer.version_number


def _pinned(metadata: dict[str, Any], versions: Mapping[str, int]) -> dict[str, Any]:
    """The kernel's metadata with this build's datasets at their versions."""
    pinned = []
    for source in metadata.get("dataset_sources", []):
        ref = "/".join(source.split("/")[:2])
        pinned.append(f"{ref}/{versions[ref]}" if ref in versions else source)
    return metadata | {"dataset_sources": pinned}


def _stamp(notebook: Path, mark: str) -> None:
    """Writes a fingerprint where it travels with the notebook and runs nothing."""
    content = files.read_json(notebook)
    content["metadata"] = content.get("metadata", {}) | {MARK: mark}
    files.write_json(notebook, content)


def _is(held: Kernel, mark: str, notebook: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether the server's kernel is this one: the mark, the cells, and the sources attached."""
    try:
        there = json.loads(held.source)
        marked = there["metadata"].get(MARK) == mark
        sent = json.loads(check.sent_source(notebook))
        same = [it["source"] for it in there["cells"]] == [
            it["source"] for it in sent["cells"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    wanted = {"/".join(it.split("/")[:2]) for it in metadata["dataset_sources"]}
    wanted |= set(metadata.get("competition_sources", []))
    return marked and same and held.sources >= wanted


def run(server: Server, ref: str, version: int) -> None:
    """Waits for the kernel's end; shows the end of the log if that is an error."""
    seen: list[str] = []

    def look() -> tuple[str, str] | None:
        state, message = server.kernel_status(ref, version)
        if state not in seen:
            seen.append(state)
            server.say(f"kernel {ref}: version {version} is {_words(state)}")
        over = state in ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
        return (state, message) if over else None

    state, message = server.poll(f"kernel {ref}", look)
    if state == "COMPLETE":
        return
    _, log = server.kernel_output(ref, version)
    lines = [line for line in log.splitlines() if line.strip()]
    for line in lines[-LOG_LINES:]:
        server.say(f"  {line[:LOG_LETTERS]}")
    cause = message or (lines[-1] if lines else "no message and no log")
    end = "ended in error" if state == "ERROR" else "was cancelled"
    say = f"kernel {ref}: version {version} {end}: {cause}"
    raise KaggleError(" ".join(server.redact(say).split()))


def fetch(server: Server, ref: str, version: int, output: Path) -> tuple[Path, ...]:
    """The kernel's output files, and its log, on this machine."""
    urls, log = server.kernel_output(ref, version)
    log_path = output / f"{ref.partition('/')[2]}.log"
    wrong = [f"{name!r} {fault}" for name in urls if (fault := find_fault(name))]
    for name in urls if not wrong else ():
        path = output / name
        if not path.resolve().is_relative_to(output.resolve()):
            wrong.append(f"{name!r} would leave {output}")
        elif path == log_path:
            wrong.append(f"{name!r} is the name of its log")
        elif any(parent.as_posix() in urls for parent in Path(name).parents):
            wrong.append(f"{name!r} lies in another file")
    if wrong:
        raise KaggleError(f"kernel {ref}: output {'; '.join(wrong)}")
    paths = [server.fetch(url, output / name) for name, url in urls.items()]
    paths.append(files.write_text(log_path, log))
    server.say(f"kernel {ref}: {len(paths)} files in {output}")
    return tuple(paths)


def _words(state: str) -> str:
    return state.lower().replace("_", " ")

"""Files that are whole or absent: atomic writes, hashes, and a lock per folder."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

DAY = 86_400.0  # seconds; a temporary file of another machine is stale after that
PROBE = 1 << 20  # bytes that a disk with room takes
_PART = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)\.part$")
_FULL = "make room (or raise the quota or `ulimit -f`) and run the same command again"
_DENIED = "give a folder where this user may write, or change its owner or mode"
_FAILING = "the disk or its server fails; run the same command again once it answers"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EROFS: "give a folder on a disk that can be written",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENAMETOOLONG: "give shorter names (most disks take 255 bytes a name)",
    errno.ENOTDIR: "a file stands where a folder is needed; give another path",
    errno.EEXIST: "a file stands where a folder is needed; give another path",
    errno.EISDIR: "a folder stands where a file is needed; give another path",
    errno.EIO: _FAILING,
    errno.ESTALE: _FAILING,
}
_NO_LOCKS = {
    *(errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP),
    *(errno.ENOSYS, errno.EINVAL),
}


@contextmanager
def replacing(path: Path, size: int = 0, aside: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there replaces `path` at the end.

    A failure inside the block leaves `path` as it was and removes the temporary file; where the
    disk is to blame, OSError says so in words. size: bytes that are wanted, for the message. aside:
    in a temporary folder, for a library (safetensors) that makes temporary files of its own beside.
    """
    part = path.with_name(f".{_short(path.name)}.{_writer(os.getpid())}.part")
    temporary = part / path.name if aside else part
    try:
        with explain_errors(path, temporary, size=size):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        _remove(part)


@contextmanager
def explain_errors(
    path: Path, temporary: Path | None = None, size: int = 0
) -> Iterator[None]:
    """Say in one line why `path` could not be written: full, read-only, too long a name, ...

    Raises the same type of OSError with the same errno; an error that names another file passes as
    it is. temporary: what is written in its place. Libraries that write by themselves (torch,
    safetensors, numpy) raise errors without errno: then a little more is written to it, and the
    disk's own answer counts. size: bytes that are wanted.
    """
    try:
        yield
    except Exception as error:
        cause = error
        if not (isinstance(error, OSError) and error.errno):
            cause = _probe(temporary) if temporary else None
        advice = _ADVICE.get(cause.errno) if cause else None
        if advice is None or not _is_about(cause, path, temporary):
            raise
        room = _room(path, temporary, size) if advice is _FULL else ""
        told = type(cause)(f"{path}: not written: {cause.strerror}{room}; {advice}")
        told.errno = cause.errno  # and no strerror, which would be all that is printed
        raise told from None


def sweep_parts(folder: Path, deep: bool = True) -> list[Path]:
    """Remove the temporary files that `replacing` left in `folder` when it was killed.

    Those of a process that still runs are kept. Of another machine (or of an older version) nothing
    is known: what was not written to for a day is removed. deep: folders in it, too.
    """
    swept = []
    for place, folders, names in os.walk(folder):
        own = [name for name in folders if _PART.search(name)]
        folders[:] = [name for name in folders if name not in own] if deep else []
        for name in [*names, *own]:
            path = Path(place, name)
            if name.startswith(".") and name.endswith(".part") and _is_stale(path):
                _remove(path)
                swept.append(path)
    return swept


def write_text(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    return write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_without_repeats)
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path}: not JSON ({error})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key stands twice, of which Python keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r:.50} stands twice")
    return found


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a value made of JSON's types; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def lock(folder: Path, patience: float = 30.0) -> Iterator[None]:
    """Holds `folder` for this process; waits up to `patience` seconds for another one.

    The wait covers a killed run whose kernel is still on its way out. The lock is the
    process's own: it ends with the process, however that ends. What killed processes left half
    written is removed.
    """
    path = folder / ".lock"
    with explain_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        give_up = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise RuntimeError(
                        f"{folder}: another process is writing here; wait for it or end it"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise OSError(
                    f"{folder}: its disk has no file locks ({error.strerror}), which keep two "
                    "runs apart; mount it with locks (NFS: a lock service, or the option "
                    "local_lock=flock for one machine) or give a folder on another disk"
                ) from None
        sweep_parts(folder)
        yield


def differing(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first thing that `wanted` says otherwise, as "name (there, not wanted)"; "" for none."""
    for name, value in wanted.items():
        if there.get(name) != value:
            return f"{name} ({there.get(name)}, not {value})"
    return ""


def _short(name: str) -> str:
    """`name`, or its hash where the name of its temporary file would be too long."""
    data = os.fsencode(name)
    return name if len(data) <= 200 else hashlib.sha256(data).hexdigest()[:32]


@lru_cache
def _writer(pid: int) -> str:
    """Tells a process from every other one: of its machine, and of those that had its number."""
    state = _process(pid)
    return f"{_machine()}-{pid}-{state[1] if state else 0}"


@lru_cache
def _machine() -> str:
    """Eight letters: of the host, since it was started, and the processes one sees from here."""
    known = [socket.gethostname()]
    with suppress(OSError):  # no /proc
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        known.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return fingerprint(known)[:8]


def _remove(part: Path) -> None:
    """A temporary file or folder; what cannot be removed stays, and hides no other error."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
        return
    with suppress(OSError):
        part.unlink(missing_ok=True)


def _process(pid: int) -> tuple[str, int] | None:
    """State and start of a process in ticks; None where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    values = text.rpartition(")")[2].split()  # its name may hold anything
    return values[0], int(values[19])


def _is_stale(path: Path) -> bool:
    found = _PART.search(path.name)
    if found is None or found["machine"] != _machine():
        try:
            return time.time() - path.lstat().st_mtime > DAY
        except OSError:
            return False
    pid = int(found["pid"])
    if state := _process(pid):
        return state[0] in "ZX" or state[1] != int(found["started"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _probe(path: Path) -> OSError | None:
    """What the disk says to a little more in the file of that path, if it refuses."""
    try:
        with path.open("ab") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _is_about(error: OSError, path: Path, temporary: Path | None) -> bool:
    """Whether an error is of that file or of a folder above it, and not of what is read for it."""
    if isinstance(
        error.filename, int | None
    ):  # perhaps of a read: these are of a write
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    named = Path(os.fsdecode(error.filename))
    return named in (path, temporary) or named in (temporary or path).parents


def _room(path: Path, temporary: Path | None, size: int) -> str:
    """What was wanted, or else written until then, and what is free before it is removed."""
    with suppress(OSError):
        folder = next(each for each in path.parents if each.exists())
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free"
        if size:
            return f" ({size / 1e6:.1f} MB wanted, {free})"
        if temporary and temporary.is_file():
            return f" (after {temporary.stat().st_size / 1e6:.1f} MB, {free})"
        return f" ({free})"
    return ""


def _sync_folder(folder: Path) -> None:
    """So that a renamed file is there after a power failure, where the disk can promise that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""A command under a folder that stands for /kaggle, within Kaggle's limits; nothing outlives it.

Where the system allows user namespaces, there is no network but the loopback, what Kaggle mounts
is mounted read-only, and working is a file system as large as the limit. Elsewhere, as in many
containers, Python's sockets are guarded, the files of input are compared before and after, and
the size of working is watched. Memory is limited in each process by RLIMIT_DATA and watched
in the whole tree: RLIMIT_AS would count mapped files, too.
"""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kit import pipeline
from kit.kaggle import runtime
from kit.kaggle.confine import GO, READY

log = logging.getLogger(__name__)

TICK = 0.1  # seconds between two looks
SMALL = 65_536  # bytes of a file that is compared by content, too
UNSHARE = (
    *("unshare", "--user", "--map-root-user", "--mount", "--net"),
    *("--pid", "--fork", "--kill-child", "--mount-proc"),
)
PASSED = (  # of this process's environment: what tells of the machine
    *("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
)
SOCKET = """\
# the standard library's socket, with a guard
for path, scope in (({real!r}, globals()), ({guard!r}, {{"__name__": "guard"}})):
    with open(path, encoding="utf-8") as file:
        exec(compile(file.read(), path, "exec"), scope)
scope["install"]()
"""


@dataclass(frozen=True)
class Limits:
    memory: float = 13.0  # GB, anonymous
    disk: float = 20.0  # GB in working
    hours: float = 9.0  # of a session


class Outcome(NamedTuple):
    code: int  # of the command
    seconds: float
    peak: int  # bytes of anonymous memory, an upper bound where processes share pages
    ended: str  # why it was not left to end by itself
    changed: str  # the first file of input that is not as it was


@dataclass
class Sandbox:
    process: subprocess.Popen[bytes]
    control: socket.socket
    root: Path
    limits: Limits
    working: Path  # as this process sees it, also after the end
    isolated: bool  # by namespaces
    refusal: str  # of the system, where namespaces were tried and are not had
    before: dict[str, Any]  # input as it was, unless it is mounted read-only

    @property
    def network(self) -> str:
        return "namespace" if self.isolated else "socket guard"

    @property
    def readonly(self) -> str:
        return "mount" if self.isolated else "compared"

    def end(self) -> None:
        """Ends the whole tree; returns when it is gone."""
        self.control.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextmanager
def confined(
    command: Sequence[str],
    root: Path,
    limits: Limits,
    *,
    variables: Mapping[str, str] | None = None,
    sources: Sequence[Path] = (),
    isolated: bool | None = None,
) -> Iterator[Sandbox]:
    """A sandbox in which `watch` starts a command, in root/working.

    root: a folder with input/ in it; sources: folders that links in input/ lead to; variables:
    of the environment, beside the few that tell of the machine; isolated: whether
    by namespaces, None for where the system allows them.
    """
    root = root.resolve()
    for name in ("input", "working", "temp", "home", "tmp"):
        (root / name).mkdir(exist_ok=True)
    spec = {
        "command": list(command),
        "root": str(root),
        "environment": _environment(root) | dict(variables or {}),
        "sources": sorted({str(path.resolve()) for path in sources}),
        "memory": int(limits.memory * 1e9),
        "disk": int(limits.disk * 1e9),
    }
    begun, refusal = None, ""
    if isolated is not False:
        try:
            begun = _start(spec | {"isolated": True})
        except OSError as error:
            if isolated:
                raise
            refusal = str(error)
            log.warning("no namespaces, so sockets are guarded: %s", refusal)
    within = begun is not None
    process, control, folder = begun or _start(_guarded(spec) | {"isolated": False})
    working = Path(f"/proc/self/fd/{folder}")
    before = {} if within else _files(root / "input")
    box = Sandbox(process, control, root, limits, working, within, refusal, before)
    try:
        yield box
    finally:
        box.end()
        os.close(folder)


def watch(box: Sandbox, look: Callable[[float], str] = lambda seconds: "") -> Outcome:
    """Starts the command and ends it at a limit, or when `look` says why it is to end.

    look: called with the seconds since the start, every TICK.
    """
    peak, ended, began = 0, "", time.monotonic()
    box.control.sendall(GO)
    while box.process.poll() is None and not ended:
        time.sleep(TICK)
        seconds = time.monotonic() - began
        used = _memory(box)
        peak = max(peak, used)
        ended = _over(box, seconds, used) or look(seconds)
    box.end()
    seconds = time.monotonic() - began
    changed = "" if box.isolated else _changed(box.before, _files(box.root / "input"))
    return Outcome(box.process.returncode, seconds, peak, ended, changed)


def _over(box: Sandbox, seconds: float, used: int) -> str:
    limits = box.limits
    if seconds > limits.hours * 3600:
        return f"ended after {limits.hours:.3g} h, the limit"
    if used > limits.memory * 1e9:
        return f"ended at {used / 1e9:.2f} GB of memory, more than {limits.memory:g}"
    if box.isolated:  # then the file system is full before
        return ""
    held = sum(size for size, *_ in _files(box.working, content=False).values())
    if held > limits.disk * 1e9:
        return f"ended at {held / 1e9:.2f} GB in working, more than {limits.disk:g}"
    return ""


def _memory(box: Sandbox) -> int:
    """Bytes of anonymous memory; each page counted once where the count matters."""
    pids = pipeline.descendants(box.process.pid)
    used = pipeline.anonymous_memory(pids)
    if used <= box.limits.memory * 1e9:
        return used
    shares = [_share(pid) for pid in pids]
    return used if None in shares else sum(filter(None, shares))


def _share(pid: int) -> int | None:
    """Bytes, shared pages divided among those that map them; None where nobody tells."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process is gone
        return 0
    found = [line.split() for line in lines if line.startswith(("Pss_A", "Pss_S"))]
    return sum(1024 * int(words[1]) for words in found) if found else None


def _environment(root: Path) -> dict[str, str]:
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    own = {"HOME": root / "home", "TMPDIR": root / "tmp", runtime.ROOT: root}
    return passed | {name: str(path) for name, path in own.items()}


def _guarded(spec: dict[str, Any]) -> dict[str, Any]:
    """With a module before the standard library's socket that guards it in every Python."""
    folder = Path(spec["root"]) / "guard"
    folder.mkdir(exist_ok=True)
    paths = {
        "real": socket.__file__,
        "guard": str(Path(__file__).with_name("guard.py")),
    }
    (folder / "socket.py").write_text(SOCKET.format(**paths), encoding="utf-8")
    return spec | {"environment": spec["environment"] | {"PYTHONPATH": str(folder)}}


def _start(
    spec: Mapping[str, Any],
) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """The confined process, the socket that holds it, and its folder working, opened."""
    control, other = socket.socketpair()
    own = [sys.executable, "-m", "kit.kaggle.confine", json.dumps(spec)]
    try:
        with other:
            process = subprocess.Popen(
                [*(UNSHARE if spec["isolated"] else ()), *own],
                env=spec["environment"]
                | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
                cwd=spec["root"],
                stdin=other,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the shell is ours to pass on
            )
        said, folders, *_ = socket.recv_fds(control, len(READY), 1)
        if said != READY:
            words = process.communicate()[0].decode(errors="replace").split("\n")
            lines = [line for line in map(str.strip, words) if line]
            raise OSError(lines[-1] if lines else "no namespaces, for no given reason")
    except OSError:
        control.close()
        raise
    return process, control, folders[0]


def _files(folder: Path, content: bool = True) -> dict[str, tuple[int, int, str]]:
    """Path -> size, time of change, and hash of small files; folders are there or not."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in folders:
            found[Path(place, name).relative_to(folder).as_posix()] = 0, 0, ""
        for name in names:
            path = Path(place, name)
            with suppress(FileNotFoundError):
                about = path.stat()
                small = content and about.st_size <= SMALL
                text = path.read_bytes() if small else b""
                facts = (
                    about.st_size,
                    about.st_mtime_ns,
                    hashlib.sha256(text).hexdigest(),
                )
                found[path.relative_to(folder).as_posix()] = facts
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = before.keys() | after.keys()
    return min(
        (name for name in names if before.get(name) != after.get(name)), default=""
    )

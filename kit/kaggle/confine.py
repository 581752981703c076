"""The first process of a sandbox: confines itself, runs a command, ends all that is below it.

It waits for a word to go, and ends everything as soon as the process that started it lets go.
"""

import argparse
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kit import pipeline

LOG = "log.txt"  # what the command prints
READY, GO = b"ready", b"go"


def main() -> None:
    """Confines this process, runs the command when told to, and ends with its code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "spec", type=json.loads, help="JSON; kit.kaggle.sandbox starts it"
    )
    spec = parser.parse_args().spec
    root, control = Path(spec["root"]), socket.socket(fileno=0)
    try:
        (_isolate if spec["isolated"] else _adopt)(spec)
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr.strip())
    resource.setrlimit(resource.RLIMIT_DATA, (spec["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = os.open(root / "working", os.O_RDONLY | os.O_DIRECTORY)
    socket.send_fds(control, [READY], [folder])
    os.close(folder)
    if control.recv(len(GO)) != GO:
        return
    threading.Thread(target=_end_with, args=[control], daemon=True).start()
    with (root / LOG).open("wb") as log:
        process = subprocess.Popen(
            spec["command"],
            env=spec["environment"],
            cwd=root / "working",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    code = _wait(process.pid)
    _sweep()
    os._exit(code if code >= 0 else 128 - code)


def _wait(pid: int) -> int:
    """The exit code of a child; orphans that end before are let go of."""
    with suppress(ChildProcessError):  # all were ended meanwhile
        while True:
            ended, status = os.wait()
            if ended == pid:
                return os.waitstatus_to_exitcode(status)
    return -signal.SIGKILL


def _isolate(spec: Mapping[str, Any]) -> None:
    """In namespaces of its own: read-only folders, a small disk, a loopback."""
    root = Path(spec["root"])
    for folder in [*spec["sources"], str(root / "input")]:
        flags = os.statvfs(folder).f_flag  # a namespace must keep what is forbidden
        kept = {"nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
        names = [
            "remount",
            "bind",
            "ro",
            *(n for n, bit in kept.items() if flags & bit),
        ]
        _mount("--bind", folder, folder)
        _mount("-o", ",".join(names), folder)
    size = f"size={spec['disk']},mode=0755"
    _mount("-t", "tmpfs", "-o", size, "kaggle", str(root / "working"))
    with socket.socket() as any_socket:  # struct ifreq: name, flags
        set_flags, up_and_running = 0x8914, 0x41
        request = struct.pack("16sh22x", b"lo", up_and_running)
        fcntl.ioctl(any_socket, set_flags, request)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


def _adopt(spec: Mapping[str, Any]) -> None:
    """Without namespaces: no large files, and orphans come back to this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (spec["disk"],) * 2)
    set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER in linux/prctl.h
    ctypes.CDLL(None).prctl(set_child_subreaper, 1)


def _end_with(control: socket.socket) -> None:
    """Waits until the other side lets go, by its will or its death."""
    with suppress(OSError):
        control.recv(1)
    _sweep()
    os._exit(128 + signal.SIGKILL)


def _sweep() -> None:
    while pids := pipeline.descendants(os.getpid()):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    main()

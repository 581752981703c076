"""torchrun, in a process that ends with its launcher and names what failed first.

`python -m kit.nodes.agent LAUNCHER FOLDER NODE FLAG...`, started by kit.launch: the
launcher's process id, a folder for this run's logs, a `Node` as JSON, and torchrun's flags.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kit.files import write_text
from kit.nodes.peers import CAUSE, Node, Peers

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

AGENT = "KIT_LAUNCH_AGENT"  # process id of the torchrun a rank belongs to
FOLDER = "KIT_LAUNCH_FOLDER"  # of this run's logs
ORPHANED = 8.0  # seconds in which torchrun may end its ranks once the launcher is gone
LENGTH = 1000  # characters of a cause
HINTS = (  # what a cause says, and what to do about it
    (
        r"shared memory|/dev/shm|bus error",
        "; give /dev/shm more room (docker: --shm-size), or take --workers 0",
    ),
    (
        r"DataLoader worker .*(killed|exited unexpectedly)",
        "; is the memory full? fewer --workers, or a smaller batch, need less",
    ),
)


def main(arguments: list[str]) -> None:
    """Runs torchrun; the exit status and CAUSE in FOLDER say how that ended."""
    parser = argparse.ArgumentParser(description="torchrun; kit.launch starts it.")
    parser.add_argument("launcher", type=int, help="process that it ends with")
    parser.add_argument("folder", help="of this run's logs")
    parser.add_argument("node", type=json.loads, help="kit.nodes.peers.Node as JSON")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of torchrun")
    given = parser.parse_args(arguments)
    folder, flags = given.folder, given.flags
    # Popen's `preexec_fn` may deadlock where there are threads, as in a notebook kernel
    end_with(given.launcher, signal.SIGTERM)
    threading.Thread(target=_end_late, args=(given.launcher,), daemon=True).start()
    os.environ |= {AGENT: str(os.getpid()), FOLDER: folder}
    where, run = Node(**given.node), Path(folder)
    if where.nodes == 1:
        _alone(run, flags)
    else:
        _together(Peers(where, run), flags)


def _end_late(launcher: int) -> None:
    """Kill this process, and so its ranks, where the signal of `end_with` does not end it."""
    while os.getppid() == launcher:
        time.sleep(1)
    time.sleep(ORPHANED)
    os.kill(os.getpid(), signal.SIGKILL)


def _alone(run: Path, flags: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(flags)
    except ChildFailedError as error:
        write_text(run / CAUSE, cause(*error.get_first_failure(), run))
        raise


def _together(peers: "Peers", flags: list[str]) -> None:
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import (
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.run import main as torchrun

    node = peers.node
    # until torchrun has its own handler, so that the others hear of it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        peers.meet()
        torchrun([*peers.flags(), *flags])
        peers.finish()
    except ChildFailedError as error:
        first = error.get_first_failure()
        # NCCL ends a rank by SIGABRT when its peer is gone
        peers.fail(
            cause(*first, peers.run), doubtful=first[1].exitcode == -signal.SIGABRT
        )
        raise
    except RendezvousTimeoutError:
        peers.fail(
            f"not all of {node.nodes} nodes came to {node.endpoint} "
            f"within {node.patience:g} s"
        )
        raise
    except (RendezvousConnectionError, DistNetworkError) as error:
        # node 0 has the store; torchrun may notice that it is gone before the watcher does
        own = f"{type(error).__name__}: {error}"
        peers.fail("another node failed: node 0 is gone" if node.rank else own)
        raise
    except (SignalException, KeyboardInterrupt):
        peers.fail("it was interrupted")
        raise
    except TimeoutError as error:
        peers.fail(str(error))
        raise
    except Exception as error:
        peers.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        peers.leave()


def cause(rank: int, failure: "ProcessFailure", run: Path) -> str:
    """One line: the rank, what it raised or how it ended, and where its log is."""
    folders = run.glob(f"*/attempt_*/{failure.local_rank}")
    log = max(folders, key=lambda path: path.stat().st_mtime) / "stderr.log"
    if isinstance(failure.message, dict):  # from the error file that `record` wrote
        said = name_cause(failure.message["message"])
        return f"rank {rank}: {said}; its log is {log}"
    return f"rank {rank} {ended(failure.exitcode, log)}; its log is {log}"


def name_cause(text: str) -> str:
    """What an exception says, on one line, and what to do about it where that is known.

    Of a traceback in it, as a loader's process sends, the last exception; of a long text
    its start and its end.
    """
    trace = text.rpartition("Traceback (most recent call last):")[2]
    if trace != text:  # frames are indented, the exception is not
        lines = trace.strip("\n").split("\n")
        ends = [n for n, line in enumerate(lines) if line and not line[0].isspace()]
        text = "\n".join(lines[ends[0] :]) if ends else trace
    said = " ".join(text.split())
    if len(said) > LENGTH:
        said = f"{said[: LENGTH // 3]} ... {said[-LENGTH * 2 // 3 :]}"
    hints = (hint for pattern, hint in HINTS if re.search(pattern, said, re.IGNORECASE))
    return said + next(hints, "")


def ended(code: int, log: Path) -> str:
    """How a process ended that left no exception: its signal, or its last words."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + " (out of memory?)" * (name == "SIGKILL")
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"exited with code {code}: {name_cause(last)}"


def end_with(parent: int, number: int) -> None:
    """Lets the kernel send signal `number` to this process when `parent` ends.

    This also covers a parent that is killed. torchrun starts each rank in a session of
    its own, so a signal to torchrun's group would not reach the ranks.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
    else:  # as macOS: who looks twice a second has to do
        threading.Thread(target=_watch, args=(parent, number), daemon=True).start()
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), number)


def _watch(parent: int, number: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main(sys.argv[1:])

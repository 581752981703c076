"""Runs one module on every GPU, from a notebook or a shell, and the ranks' side of it.

torchrun is underneath: rank 0 prints live, every rank has its log files, an error is the
one that came first, and nothing outlives the process that launched. A module that is
launched looks like this, and also runs alone with `python -m` and under plain torchrun:

    @entry
    def main(arguments: Sequence[str] | None = None) -> None:
        options = parser.parse_args(arguments)
        with group() as rank: ...

    if __name__ == "__main__":
        main()
"""

import ctypes
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

from kit.files import write_text

if TYPE_CHECKING:
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a rank that waits longer gives up
HOLD = 3.0  # seconds an exception is held back, see `entry`
EXIT_TIMEOUT = 20  # seconds a failed rank may take to leave
ENDING = ((signal.SIGINT, 10), (signal.SIGTERM, 35), (signal.SIGKILL, 10))  # seconds

_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_AGENT = "KIT_LAUNCH_AGENT"  # process id of the torchrun a rank belongs to
_TORCHRUN = re.compile(  # what torchrun tells its ranks, or reads as its own defaults
    rf"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    rf"|(TORCHELASTIC|PET)_\w+|{_AGENT}"
)
_LIVE = "[default0]:"  # torchrun's mark on the lines of its first rank


class RankError(RuntimeError):
    """A launch failed; the message is the rank that failed first, why, and its log."""


@dataclass(frozen=True)
class Rank:
    """One process's place among all of a launch."""

    rank: int
    world: int
    local: int  # the place on this machine, hence the number of the GPU
    device: "torch.device"

    @property
    def main(self) -> bool:
        return self.rank == 0


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int,
    logs: Path,
    nodes: int = 1,
    node_rank: int = 0,
    rendezvous: str = "",
    max_restarts: int = 0,
) -> None:
    """Calls `main(arguments)` of `module` in `processes` ranks; returns when all are done.

    A single process runs inside the caller, without a process group, even where the
    caller itself inherited a rank from an outer torchrun. Otherwise each launch makes a
    folder of its own in `logs`, with `torchrun.log` and
    `*/attempt_*/<local rank>/{stdout,stderr}.log`.

    With several nodes every node makes the same call with its `node_rank`; `rendezvous` is
    "host:port" of node 0, which has rank 0. Each node prints its first rank and reports
    the first failure among its own ranks.
    """
    _check(module, processes, nodes, node_rank, rendezvous, max_restarts)
    if processes == nodes == 1:
        with _without_torchrun():
            importlib.import_module(module).main(list(arguments))
        return
    logs.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=logs))
    if nodes == 1:  # the system chooses the port, so launches do not collide
        place = ["--standalone", "--local-addr=127.0.0.1"]
    else:  # c10d would number the nodes by host name, not by node_rank
        place = ["--rdzv-backend=static", f"--rdzv-endpoint={rendezvous}"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from kit.launch import _agent; _agent()"),
            *(str(os.getpid()), str(run)),
            *place,
            *(f"--nnodes={nodes}", f"--node-rank={node_rank}"),
            *(f"--nproc-per-node={processes}", f"--max-restarts={max_restarts}"),
            *("--redirects=3", "--tee=0:3", f"--log-dir={run}", "-m", module),
            *(text.replace("$", "$$") for text in arguments),  # torchrun substitutes
        ],
        env=_environment(processes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # a Ctrl-C in the shell is ours to pass on
    )
    try:
        with (run / "torchrun.log").open("w", encoding="utf-8") as log:
            for line in process.stdout:
                if _LIVE in line:
                    print(line.replace(_LIVE, ""), end="", flush=True)
                else:
                    log.write(line)
        process.communicate()
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        cause, log = run / "cause.txt", run / "torchrun.log"
        if cause.exists():
            raise RankError(cause.read_text(encoding="utf-8"))
        raise RankError(f"torchrun {_ended(process.returncode, log)}; its log is {log}")


@contextmanager
def group() -> Iterator[Rank]:
    """Joins the process group that torchrun's environment describes; alone without one.

    After an exception the group is left to the end of the process: to leave it in order
    would mean to wait for ranks that never come.
    """
    import torch
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available()
    if not _in_rank():
        yield Rank(0, 1, 0, torch.device("cuda:0" if cuda else "cpu"))
        return
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store, rank, world = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    # One store serves all attempts, dead ranks' addresses included (pytorch#135712).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo",
        store=torch.distributed.PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if cuda else None,
    )
    yield Rank(rank, world, local, device)
    torch.distributed.destroy_process_group()


def entry(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates the `main` of a launched module: its exception reaches the launcher.

    A rank also fails because another one has: its connection breaks. So an exception is
    held back a little before it is recorded. If another rank was first, torchrun sees that
    within a tenth of a second and ends this one in the meantime.
    """

    @wraps(main)
    def wrapper(arguments: Sequence[str] | None = None) -> None:
        if not _in_rank():
            return main(arguments)
        from torch.distributed.elastic.multiprocessing.errors import record

        _end_with(int(os.environ.get(_AGENT, os.getppid())), signal.SIGKILL)

        @record
        def held() -> None:
            try:
                main(arguments)
            except Exception:
                time.sleep(HOLD)
                signal.alarm(EXIT_TIMEOUT)  # threads, or a GPU that waits for its peers
                raise

        held()

    return wrapper


def _check(
    module: str,
    processes: int,
    nodes: int,
    node_rank: int,
    rendezvous: str,
    max_restarts: int,
) -> None:
    if processes < 1:
        raise ValueError(f"processes is {processes}; it must be at least 1")
    if not 0 <= node_rank < nodes:
        raise ValueError(f"node_rank {node_rank} is not one of {nodes} nodes")
    if nodes > 1 and not re.fullmatch(r".+:\d+", rendezvous):
        raise ValueError(
            f"{nodes} nodes need rendezvous='host:port' of node 0, not {rendezvous!r}"
        )
    if nodes > 1 and max_restarts:  # a static rendezvous would not restart the others
        raise ValueError("max_restarts needs nodes=1; launch again on every node")
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:  # a package above it is missing, or broken
        raise ValueError(f"{module} cannot be launched: {error}") from error
    if found is None:
        raise ValueError(f"{module} cannot be launched: there is no such module")
    if processes > 1:
        import torch

        devices = torch.cuda.device_count()
        if 0 < devices < processes:
            raise ValueError(
                f"{processes} processes do not fit on {devices} CUDA devices; "
                f"launch {devices}, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
            )


@contextmanager
def _without_torchrun() -> Iterator[None]:
    """Hides an outer torchrun from what runs inside the block."""
    names = [name for name in os.environ if _TORCHRUN.fullmatch(name)]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _environment(processes: int) -> dict[str, str]:
    """This process's environment, made ready for torchrun and `processes` ranks."""
    values = {k: v for k, v in os.environ.items() if not _TORCHRUN.fullmatch(k)}
    paths = (str(Path(__file__).resolve().parents[1]), values.get("PYTHONPATH"))
    values["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    values["PYTHONUNBUFFERED"] = "1"
    # PyTorch would give every core to every rank, torchrun a single one to each.
    cores = len(os.sched_getaffinity(0))
    values.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # Ranks and their loaders share the cores: threads that wait sleep instead of spinning.
    values.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # On its way here each refresh of a progress bar becomes a line.
    values.setdefault("TQDM_MININTERVAL", "10")
    return values


def _end(process: subprocess.Popen[str]) -> None:
    """Ends torchrun, and so its ranks, the harder the longer it takes."""
    for number, patience in ENDING:
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        # A second interrupt asks for more haste. A pipe that nobody reads could block it.
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.communicate(timeout=patience)


def _agent() -> None:
    """torchrun itself, in a process that ends with its launcher and names the root cause.

    Popen's `preexec_fn` could tie the two as well, but may deadlock where there are
    threads, as in every notebook kernel.
    """
    launcher, folder, *flags = sys.argv[1:]
    run = Path(folder)
    _end_with(int(launcher), signal.SIGTERM)
    os.environ[_AGENT] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(flags)
    except ChildFailedError as error:
        write_text(run / "cause.txt", _cause(*error.get_first_failure(), run))
        raise


def _end_with(parent: int, number: int) -> None:
    """Lets the kernel send signal `number` to this process when `parent` ends.

    This also covers a parent that is killed. torchrun starts each rank in a session of
    its own, so a signal to torchrun's group would not reach the ranks.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), number)


def _cause(rank: int, failure: "ProcessFailure", run: Path) -> str:
    """One line: the rank, what it raised or how it ended, and where its log is."""
    folders = run.glob(f"*/attempt_*/{failure.local_rank}")
    log = max(folders, key=lambda path: path.stat().st_mtime) / "stderr.log"
    if isinstance(failure.message, dict):  # from the error file that `record` wrote
        said = textwrap.shorten(failure.message["message"], 500, placeholder=" ...")
        return f"rank {rank}: {said}; its log is {log}"
    return f"rank {rank} {_ended(failure.exitcode, log)}; its log is {log}"


def _ended(code: int, log: Path) -> str:
    """How a process ended that left no exception: its signal, or its last words."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + " (out of memory?)" * (name == "SIGKILL")
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"exited with code {code}: {textwrap.shorten(last, 500, placeholder=' ...')}"


def _in_rank() -> bool:
    return all(name in os.environ for name in _RANK)

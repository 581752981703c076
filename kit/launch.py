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

import importlib
import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

from kit import files
from kit.nodes.agent import AGENT, FOLDER, end_with, ended
from kit.nodes.peers import CAUSE, EXIT_TIMEOUT, LIVE, Node
from kit.nodes.session import Call, calling, follow

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a rank that waits longer gives up
PATIENCE = 600.0  # seconds that nodes wait for each other
HOLD = 3.0  # seconds an exception is held back, see `entry`
ENDING = ((signal.SIGINT, 10), (signal.SIGTERM, 35), (signal.SIGKILL, 10))  # seconds

LEAVE = 12  # seconds in which an interrupted process may end what it started

STOP_AT = "KIT_STOP_AT"  # unix time, see `time_left`

_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TORCHRUN = re.compile(  # what torchrun tells its ranks, or reads as its own defaults
    rf"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    rf"|(TORCHELASTIC|PET)_\w+|{AGENT}|{FOLDER}"
)
_STOPPED = "stopped.txt"  # in the run's folder: a rank raised Stopped, and why


class RankError(RuntimeError):
    """A launch failed; the message is the rank that failed first, why, and its log."""


class Stopped(RuntimeError):
    """The time is over: the work is saved, and the same call goes on with it."""


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


@dataclass(frozen=True)
class Place:
    """This machine among those of a launch, and how often they start again."""

    nodes: int = 1
    node_rank: int = 0
    rendezvous: str = ""  # "host:port" of node 0
    max_restarts: int = 0
    patience: float = PATIENCE  # seconds that nodes wait for each other

    def __post_init__(self) -> None:
        nodes, rendezvous = self.nodes, self.rendezvous
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}, not at least 0")
        if not 0 <= self.node_rank < nodes:
            raise ValueError(f"node_rank {self.node_rank} is not one of {nodes} nodes")
        if nodes > 1 and not (self.host and 0 < self.port < 2**16):
            raise ValueError(
                f"{nodes} nodes need rendezvous='host:port' of node 0, not {rendezvous!r}"
            )
        if not 0 < self.patience < math.inf:
            raise ValueError(f"patience is {self.patience}; it must be some seconds")

    @property
    def host(self) -> str:
        """Without the brackets of IPv6."""
        return self.rendezvous.rpartition(":")[0].removeprefix("[").removesuffix("]")

    @property
    def port(self) -> int:
        port = self.rendezvous.rpartition(":")[2]
        return int(port) if port.isdecimal() else 0

    def environment(self, calls: Path | None = None) -> dict[str, str]:
        """Variables that make this the place of every `launch` that names none.

        So the machines are no parameters of notebooks. calls: the folder of a
        `kit.nodes.session.host`, where node 0 tells the others what it launches.
        """
        values = asdict(self) | {"calls": calls or ""}
        return {_variable(name): str(value) for name, value in values.items()}


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int,
    logs: Path,
    place: Place | None = None,
) -> None:
    """Calls `main(arguments)` of `module` in `processes` ranks; returns when all are done.

    A single process that is not to be restarted runs inside the caller, without a process
    group, even where the caller itself inherited a rank from an outer torchrun. Otherwise
    each launch makes folders of its own in `logs`, one an attempt, with `torchrun.log` and
    `*/attempt_0/<local rank>/{stdout,stderr}.log`.

    With several nodes every node makes the same call, each with its own `place`. Ranks are
    numbered in the order of the nodes, so rank 0 is on node 0. Each node prints its first
    rank; when a rank fails all nodes end, its own with the rank's reason and the others
    with "another node failed".

    After a failure everything is started again, `max_restarts` times; what then goes on
    from where is the module's affair. `Stopped`, raised by every rank, is raised here.
    """
    place = place or _usual_place()
    _check(module, processes)
    if processes == place.nodes == 1 and not place.max_restarts:
        with _without_torchrun():
            importlib.import_module(module).main(list(arguments))
        return
    call = Call(module, tuple(arguments), str(logs.resolve()), place.max_restarts)
    with _announced(call, place):
        for attempt in range(place.max_restarts + 1):
            try:
                return _attempt(call, processes, place)
            except RankError as error:
                if attempt == place.max_restarts:
                    raise
                number = f"restart {attempt + 1} of {place.max_restarts}"
                print(f"{error}\n{number}", flush=True)


def serve(folder: Path, processes: int, place: Place) -> None:
    """Joins every launch of the pipeline on node 0 that calls through `folder`.

    Returns when that pipeline has ended well; else raises `kit.nodes.session.Lost`. A launch that
    fails is printed: what follows from it is decided on node 0.
    """
    for call in follow(folder, place.patience):
        print(f"joining {call.module} {' '.join(call.arguments)}", flush=True)
        here = replace(place, max_restarts=call.max_restarts)
        logs = Path(call.logs)
        try:
            launch(
                call.module, call.arguments, processes=processes, logs=logs, place=here
            )
        except (RankError, Stopped) as error:
            print(error, flush=True)


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the block at the first SIGINT, SIGTERM or SIGHUP.

    A second signal ends the process at once, and so does the first if the block has not
    ended `LEAVE` seconds later. A shell's background job inherits that SIGINT is ignored:
    it is taken here. What `nohup` set stays.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def interrupt(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, lambda *_: die_by(number))
        signal.alarm(LEAVE)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def die_by(number: int) -> None:
    """End this process by a signal, as a shell expects of one that was sent it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def time_left() -> float:
    """Seconds until KIT_STOP_AT, a unix time; infinite without it.

    Whoever finds none left saves its work and raises `Stopped`, on every rank: let rank 0
    decide, clocks differ.
    """
    text = os.environ.get(STOP_AT, "")
    try:
        return float(text) - time.time() if text else math.inf
    except ValueError:
        raise ValueError(f"{STOP_AT} is {text!r}, not a unix time") from None


def count_cores() -> int:
    """CPU cores that this process may use; where the system does not say (macOS), all of them."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


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
    # Under plain torchrun one store serves all attempts, dead ranks' addresses included
    # (pytorch#135712).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo",
        store=torch.distributed.PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if cuda else None,
    )
    try:
        yield Rank(rank, world, local, device)
    except Stopped:  # on every rank, so all are there to leave in order
        torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def entry(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates the `main` of a launched module: its exception reaches the launcher.

    A rank also fails because another one has: its connection breaks. So an exception is
    held back a little before it is recorded. If another rank was first, torchrun sees that
    within a tenth of a second, and the other nodes' within another one, and they end this
    one in the meantime.

    A rank that raises Stopped leaves a note for the launcher and no failure: torchrun would
    end the others, which may still be saving.
    """

    @wraps(main)
    def wrapper(arguments: Sequence[str] | None = None) -> None:
        if not _in_rank():
            try:
                return main(arguments)
            except (OSError, ValueError, RuntimeError) as error:
                if arguments is not None:  # of a caller in this process
                    raise
                sys.exit(str(error))
        from torch.distributed.elastic.multiprocessing.errors import record

        end_with(int(os.environ.get(AGENT, os.getppid())), signal.SIGKILL)

        @record
        def held() -> None:
            try:
                main(arguments)
            except Stopped as stopped:
                if FOLDER not in os.environ:  # under plain torchrun
                    raise
                files.write_text(Path(os.environ[FOLDER]) / _STOPPED, str(stopped))
            except Exception:
                time.sleep(HOLD)
                signal.alarm(EXIT_TIMEOUT)  # threads, or a GPU that waits for its peers
                raise

        held()

    return wrapper


def _variable(name: str) -> str:
    return f"KIT_{name.upper()}"


def _usual_place() -> Place:
    """As `Place.environment` has set it, or this machine alone."""
    values = {}
    for field in fields(Place):
        text = os.environ.get(_variable(field.name), "")
        try:
            if text:
                values[field.name] = field.type(text)
        except ValueError:
            raise ValueError(
                f"{_variable(field.name)} is {text!r}, not a number"
            ) from None
    return Place(**values)


def _check(module: str, processes: int) -> None:
    if processes < 1:
        raise ValueError(f"processes is {processes}; it must be at least 1")
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
def _announced(call: Call, place: Place) -> Iterator[None]:
    """On node 0 of a pipeline: the others hear of this launch as long as it lasts."""
    folder = os.environ.get(_variable("calls"), "")
    if place.nodes == 1 or place.node_rank or not folder:
        yield
        return
    with calling(Path(folder), call):
        yield


def _attempt(call: Call, processes: int, place: Place) -> None:
    """Starts torchrun once and returns when all of its ranks are done."""
    logs = Path(call.logs)
    logs.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=logs))
    process = subprocess.Popen(
        _command(call, processes, place, run),
        env=_environment(processes, alone=place.nodes == 1),
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
                if LIVE in line:
                    print(line.replace(LIVE, ""), end="", flush=True)
                else:
                    log.write(line)
        process.communicate()
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        cause, log = run / CAUSE, run / "torchrun.log"
        if cause.exists():
            raise RankError(cause.read_text(encoding="utf-8"))
        if process.returncode == -signal.SIGALRM:  # its watch over the nodes hangs
            raise RankError("another node failed: node 0 does not answer any more")
        raise RankError(f"torchrun {ended(process.returncode, log)}; its log is {log}")
    if (run / _STOPPED).exists():
        raise Stopped((run / _STOPPED).read_text(encoding="utf-8"))


def _command(call: Call, processes: int, place: Place, run: Path) -> list[str]:
    node, where = Node(), []  # of several nodes: the agent knows where they meet
    if place.nodes > 1:
        what = files.fingerprint([call.module, call.arguments, place.nodes])
        here = (place.nodes, place.node_rank, place.host, place.port)
        node = Node(*here, launch=what, patience=place.patience)
    else:  # the system chooses the port, so launches do not collide
        where = ["--standalone", "--local-addr=127.0.0.1"]
    return [
        *(sys.executable, "-m", "kit.nodes.agent"),
        *(str(os.getpid()), str(run), json.dumps(asdict(node))),
        *where,
        *(f"--nnodes={place.nodes}", f"--nproc-per-node={processes}"),
        # another attempt is another torchrun: one count and one store for all nodes
        *("--max-restarts=0", "--redirects=3", "--tee=0:3", f"--log-dir={run}"),
        *("-m", call.module),
        *(text.replace("$", "$$") for text in call.arguments),  # torchrun substitutes
    ]


@contextmanager
def _without_torchrun() -> Iterator[None]:
    """Hides an outer torchrun from what runs inside the block."""
    names = [name for name in os.environ if _TORCHRUN.fullmatch(name)]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _environment(processes: int, alone: bool = False) -> dict[str, str]:
    """This process's environment, made ready for torchrun and `processes` ranks.

    alone: on one machine; then gloo listens on the loopback interface only.
    """
    own = Place().environment()  # a rank that launches does so alone
    values = {
        name: value
        for name, value in os.environ.items()
        if not (_TORCHRUN.fullmatch(name) or name in own)
    }
    paths = (str(Path(__file__).resolve().parents[1]), values.get("PYTHONPATH"))
    values["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    values["PYTHONUNBUFFERED"] = "1"
    # PyTorch would give every core to every rank, torchrun a single one to each.
    cores = count_cores()
    values.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # Ranks and their loaders share the cores: threads that wait sleep instead of spinning.
    values.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    names = {name for _, name in socket.if_nameindex()} if alone else set()
    if loopback := sorted(names & {"lo", "lo0"}):  # Linux, macOS
        values.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
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


def _in_rank() -> bool:
    return all(name in os.environ for name in _RANK)

"""Notebooks and parameters -> executed notebooks, in order; what is done is skipped."""

import difflib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kit import __version__, checksums, files
from kit.launch import Stopped, time_left
from kit.nodes.agent import name_cause


@dataclass(frozen=True)
class Step:
    """One notebook of a chain; its executed copy is FOLDER/<name>.ipynb."""

    name: str
    notebook: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()  # earlier steps whose results it reads
    outputs: tuple[Path, ...] = ()  # must exist when it ends; under FOLDER/..
    inputs: tuple[Path, ...] = ()  # files whose content decides the result
    machine: dict[str, Any] = field(default_factory=dict)  # parameters that do not
    user_files: tuple[Path, ...] = ()  # files and folders that no output may hold
    # What decides outputs that the chains beside FOLDER write, too. Such a step writes each
    # file whole, so its outputs stay where they are until it has run again.
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    name: str
    state: str  # done, stale (changed, or an output is gone), missing, or one of _LEFT
    seconds: float | None = None
    peak_bytes: int | None = None
    why: str = ""  # it is stale


# what a step leaves beside its results; a change of it makes nothing stale
_LOOSE = {"job.json", "log.csv", "screen.json", "screen.npy", "tensorboard", "resume"}
_FIELDS = ("fingerprint", "outputs", "read", "seconds", "peak_bytes")  # of a marker

# a step that is not done, by the notebook it left behind: FOLDER/<name>.<suffix>.ipynb
_LEFT = {"started": "running", "failed": "error", "stopped": "stopped"}


class StepError(RuntimeError):
    """A step did not finish: one line with its name, the reason, the notebook."""


def run(
    steps: Sequence[Step],
    folder: Path,
    *,
    force: Collection[str] = (),
    start: str = "",
) -> None:
    """Runs, in order, the steps that are not done; all are checked before one starts.

    A step is done when its marker, FOLDER/<name>.done.json, holds its fingerprint (code
    cells, parameters but those in `machine`, fingerprints of the steps in `after`), and what it
    read and wrote is what the marker knows: by size, time and inode of every file, and by its
    checksum where these differ. A changed file that is itself an output, such as chain.json, is
    kept beside as NAME.changed. A notebook that leaves early by `sys.exit(0)` is judged in the same way.

    Raises `Stopped` when a notebook does, or when no time is left before a step: then the
    next run goes on from there.

    The steps in `force`, and `start` with every later one, lose their markers and
    outputs before the first step runs, so a failure does not make the next run forget
    them. A forced step drags the steps after it along only if it writes other results;
    `start` does.

    Raises ValueError where a chain beside `folder` has a step of the same name that was
    done with another `shared`, for both write the same outputs; where that step is forced,
    the other chain loses its marker instead, and RuntimeError tells that it is running.
    """
    folder = folder.absolute()  # papermill changes the working directory
    _check_chain(steps, folder)
    forced = pick_forced(steps, force, start)
    for step in steps:
        check_parameters(step)
    with files.lock(folder):
        files.sweep_parts(folder.parent)  # the work folder, of runs that were killed
        for step in steps:
            if step.name in forced:
                _forget(step, folder)
        fingerprints: dict[str, str] = {}
        for step in steps:
            fingerprints[step.name] = _fingerprint(step, fingerprints)
            with _only_writer(step, folder, step.name in forced):
                found = _status(step, folder, fingerprints[step.name])
                if found.state == "done":
                    _refresh_marker(step.name, folder)
                    print(f"{step.name}: done already", flush=True)
                    continue
                if found.why:
                    print(f"{step.name}: stale: {found.why}", flush=True)
                if time_left() <= 0:
                    raise Stopped(_stopped("before", step))
                _keep_changed(step, folder)
                _run_step(step, folder, fingerprints[step.name])


def status(steps: Sequence[Step], folder: Path) -> list[Status]:
    """The state of every step, in order; reads only."""
    folder = folder.absolute()
    _check_chain(steps, folder)
    fingerprints: dict[str, str] = {}
    for step in steps:
        fingerprints[step.name] = _fingerprint(step, fingerprints)
    return [_status(step, folder, fingerprints[step.name]) for step in steps]


def table(statuses: Sequence[Status]) -> str:
    """One aligned line per step."""
    rows = [("step", "state", "seconds", "peak MB")]
    for each in statuses:
        seconds = "-" if each.seconds is None else f"{each.seconds:.1f}"
        rows.append((each.name, each.state, seconds, _megabytes(each.peak_bytes)))
    name, state, seconds, peak = (
        max(map(len, text)) for text in zip(*rows, strict=True)
    )
    lines = [
        f"{a:<{name}}  {b:<{state}}  {c:>{seconds}}  {d:>{peak}}" for a, b, c, d in rows
    ]
    lines += [f"{each.name} is stale: {each.why}" for each in statuses if each.why]
    return "\n".join(lines)


class Peak:
    """None until a child was seen, and always on systems without /proc."""

    bytes: int | None = None


@contextmanager
def peak_memory(interval: float = 0.1, itself: bool = False) -> Iterator[Peak]:
    """Watches the memory of all descendants of this process, and of `itself` where asked.

    RssAnon + RssShmem: a shared page counts once in every process that maps it.
    """
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(interval):
            peak.bytes = max(peak.bytes or 0, _memory(itself)) or None

    thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def descendants(pid: int) -> list[int]:
    """The processes below one, the ended ones that nobody waited for included."""
    found, waiting = [], _children(pid)
    while waiting:
        found.append(waiting.pop())
        waiting += _children(found[-1])
    return found


def anonymous_memory(pids: Iterable[int]) -> int:
    """Bytes; a shared page counts once in every process that maps it."""
    total = 0
    for pid in pids:
        for line in _read(f"/proc/{pid}/status").splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += 1024 * int(line.split()[1])
    return total


def _check_chain(steps: Sequence[Step], folder: Path) -> None:
    earlier: list[str] = []
    for step in steps:
        if not re.fullmatch(r"[\w-]+", step.name):
            raise ValueError(f"step {step.name!r}: use letters, digits, _ and - only")
        if step.name in earlier:
            raise ValueError(f"{step.name}: two steps have this name")
        for name in step.after:
            if name not in earlier:
                raise ValueError(
                    f"{step.name}: comes after {name!r}, which is no earlier step "
                    f"(earlier: {', '.join(earlier) or 'none'})"
                )
        if not step.notebook.is_file():
            raise ValueError(f"{step.name}: there is no notebook {step.notebook}")
        earlier.append(step.name)
    # Outputs are removed when a step is forced, so a wrong path must not get through.
    root = folder.parent.resolve()
    if root == root.parent:
        raise ValueError(f"{folder}: put it into a folder of its own, not into {root}")
    kept = [folder, Path(__file__), *(step.notebook for step in steps)]
    for step in steps:
        kept += [*step.inputs, *step.user_files]
    for step in steps:
        for output in step.outputs:
            if root not in output.resolve().parents:
                raise ValueError(f"{step.name}: output {output} is not under {root}")
            for path in kept:
                if path.resolve().is_relative_to(output.resolve()):
                    raise ValueError(
                        f"{step.name}: output {output} holds {path}; move that elsewhere"
                    )


@contextmanager
def _only_writer(step: Step, folder: Path, forced: bool) -> Iterator[None]:
    """Hold the outputs that `step` shares with the chains beside `folder`, see `run`."""
    if not step.shared:
        yield
        return
    with files.lock(folder.parent):
        for marker in sorted(folder.parent.glob(f"*/{step.name}.done.json")):
            other = marker.parent
            made = _read_marker(step.name, other).get("shared")
            differing = _differing(_origin(step), made)
            if other == folder or not differing:
                continue
            if not forced:
                raise ValueError(
                    f"{step.name}: {other.name} made {step.outputs[0]} with other "
                    f"{', '.join(differing)}; take the same, or another work folder, or "
                    f"--from {step.name}, after which {other.name} cannot go on with them"
                )
            with files.lock(other, patience=0):
                marker.unlink()
        yield


def _origin(step: Step) -> dict[str, Any]:
    """What decides shared outputs, the content of files included."""
    inputs = {str(path): files.sha256(path) for path in step.inputs if path.exists()}
    return step.shared | inputs


def _differing(
    origin: dict[str, Any],
    other: dict[str, Any] | None,  # None: not known
) -> list[str]:
    names = origin.keys() | (origin if other is None else other).keys()
    return sorted(
        name
        for name in names
        if other is not None and origin.get(name) != other.get(name)
    )


def pick_forced(steps: Sequence[Step], force: Collection[str], start: str) -> set[str]:
    """The names of the steps to run again, see `run`; raises ValueError for one not there."""
    names = [step.name for step in steps]
    for name in [*force, *([start] if start else [])]:
        if name not in names:
            raise ValueError(f"no step {name!r}; the steps are {', '.join(names)}")
    return {*force, *(names[names.index(start) :] if start else [])}


def check_parameters(step: Step) -> None:
    """papermill only warns about unknown names, and makes text of tuples and paths."""
    import papermill

    try:
        known = list(papermill.inspect_notebook(_literal(step.notebook)))
    except ValueError as error:  # not JSON, or no language in the metadata
        raise ValueError(f"{step.name}: {step.notebook}: {error}") from error
    cells = files.read_json(step.notebook)["cells"]
    tagged = sum("parameters" in cell["metadata"].get("tags", []) for cell in cells)
    if tagged != 1:
        raise ValueError(
            f"{step.name}: {step.notebook} needs one cell tagged 'parameters', "
            f"it has {tagged}"
        )
    for name in step.machine.keys() & step.parameters.keys():
        raise ValueError(f"{step.name}: parameter {name} stands in machine, too")
    for name, value in (step.parameters | step.machine).items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            raise ValueError(
                f"{step.name}: unknown parameter {name!r}{hint} "
                f"{step.notebook.name} knows {', '.join(known) or 'none'}"
            )
        if not _is_json(value):
            raise ValueError(
                f"{step.name}: parameter {name} = {value!r} is not plain JSON: "
                "use text, numbers, true or false, null, lists and dicts of these"
            )


def _fingerprint(step: Step, fingerprints: dict[str, str]) -> str:
    """Only code cells count: prose, ids and outputs cannot change a result."""
    cells = files.read_json(step.notebook)["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    after = {name: fingerprints[name] for name in step.after}
    inputs = {str(path): files.sha256(path) for path in step.inputs if path.exists()}
    return files.fingerprint([code, step.parameters, after, inputs])


def _status(step: Step, folder: Path, fingerprint: str) -> Status:
    marker = folder / f"{step.name}.done.json"
    if not marker.exists():
        for state, suffix in _LEFT.items():
            if (folder / f"{step.name}.{suffix}.ipynb").exists():
                return Status(step.name, state)
        return Status(step.name, "missing")
    done = _read_marker(step.name, folder)
    if not done:
        return Status(step.name, "stale", why=f"{marker} is damaged")
    why = _why_stale(step, folder, fingerprint, done)
    state = "stale" if why else "done"
    return Status(step.name, state, done["seconds"], done["peak_bytes"], why)


def _why_stale(step: Step, folder: Path, fingerprint: str, done: dict[str, Any]) -> str:
    """Why a step is to be run again, "" if it is not."""
    if done["fingerprint"] != fingerprint:
        return "its code, parameters or inputs are not those it ran with"
    gone = [str(output) for output in step.outputs if not output.exists()]
    if gone:
        return f"{gone[0]} is gone"
    changed = _changed_files(done, folder)
    if changed:
        return f"{changed[0]} changed since {step.name} wrote it"
    for name in step.after:
        before = _read_marker(name, folder)
        if before and done["read"].get(name) != _digest(before):
            return f"{name} has other results than those that {step.name} read"
    return ""


def _read_marker(name: str, folder: Path) -> dict[str, Any]:
    """The marker of a step; {} where there is none or a damaged one."""
    return checksums.find_manifest(folder / f"{name}.done.json", _FIELDS)


def _written_files(step: Step) -> list[Path]:
    """The files of its outputs, but for what is hidden or read by nobody."""
    found: set[Path] = set()
    for output in step.outputs:
        for path in output.rglob("*") if output.is_dir() else [output]:
            parts = path.relative_to(output).parts
            loose = any(part in _LOOSE or part.startswith(".") for part in parts)
            if path.is_file() and not loose:
                found.add(path.absolute())
    return sorted(found)


def _identities(paths: Iterable[Path], folder: Path) -> dict[str, list[Any]]:
    """Size, time, inode and checksum of each file, by its path from the work folder."""
    return {
        os.path.relpath(path, folder.parent): [
            *checksums.identify(path),
            checksums.compute_checksum(path),
        ]
        for path in paths
    }


def _changed_files(done: dict[str, Any], folder: Path) -> list[str]:
    """Outputs that are gone or not what the marker knows; read only where size or time differ."""
    return [
        name
        for name, (*identity, checksum) in done.get("outputs", {}).items()
        for path in [folder.parent / name]
        if not path.is_file()
        or (
            checksums.identify(path) != identity
            and checksums.compute_checksum(path) != checksum
        )
    ]


def _digest(done: dict[str, Any]) -> str:
    """Equal for equal results of a step."""
    return files.fingerprint(
        {name: known[-1] for name, known in done["outputs"].items()}
    )


def _refresh_marker(name: str, folder: Path) -> None:
    """Times and inodes of the same files in a work folder that was copied, not to read them again."""
    done = _read_marker(name, folder)
    paths = [folder.parent / path for path in done["outputs"]]
    if any(
        checksums.identify(path) != known[:-1]
        for path, known in zip(paths, done["outputs"].values(), strict=True)
    ):
        outputs = _identities(paths, folder)
        checksums.write_manifest(
            folder / f"{name}.done.json", done | {"outputs": outputs}
        )


def _keep_changed(step: Step, folder: Path) -> None:
    """Puts aside what the step would write over: perhaps somebody changed it by hand."""
    changed = _changed_files(_read_marker(step.name, folder), folder)
    for output in step.outputs:
        if os.path.relpath(output, folder.parent) in changed and output.is_file():
            output.replace(output.with_name(f"{output.name}.changed"))


def _forget(step: Step, folder: Path) -> None:
    (folder / f"{step.name}.done.json").unlink(missing_ok=True)
    for output in () if step.shared else step.outputs:
        if output.is_dir() and not output.is_symlink():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)


def _run_step(step: Step, folder: Path, fingerprint: str) -> None:
    marker = folder / f"{step.name}.done.json"
    left = {
        state: folder / f"{step.name}.{suffix}.ipynb" for state, suffix in _LEFT.items()
    }
    for path in (marker, *left.values()):
        path.unlink(missing_ok=True)
    running, kept = left["started"], left["failed"]
    print(f"{step.name}: running {step.notebook}", flush=True)
    began = time.monotonic()
    try:
        with peak_memory() as peak:
            reason = _execute(step, running)
        if not reason:
            absent = [str(output) for output in step.outputs if not output.exists()]
            reason = f"ended without writing {', '.join(absent)}" if absent else ""
        seconds = time.monotonic() - began
        used = f"{seconds:.1f} s, peak {_megabytes(peak.bytes)} MB"
        if reason:
            print(f"{step.name}: failed, {used}", flush=True)
            raise StepError(f"{step.name}: {reason} (see {kept})")
        with files.replacing(folder / f"{step.name}.ipynb") as whole:
            running.replace(whole)
    except Stopped:
        kept = left["stopped"]
        raise
    finally:
        if running.exists():
            running.replace(kept)
    before = {name: _read_marker(name, folder) for name in step.after}
    checksums.write_manifest(
        marker,
        {
            "fingerprint": fingerprint,
            "outputs": _identities(_written_files(step), folder),
            "notebook": _identities([folder / f"{step.name}.ipynb"], folder),
            "read": {name: _digest(done) for name, done in before.items() if done},
            "parameters": step.parameters,
            "machine": step.machine,
            "shared": _origin(step) if step.shared else None,
            "seconds": round(seconds, 3),
            "peak_bytes": peak.bytes,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "kit": __version__,
        },
    )
    print(f"{step.name}: done, {used}", flush=True)


def _execute(step: Step, output: Path) -> str:
    """Why the notebook failed, in one line; empty when it did not. May raise Stopped."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    notebook = step.notebook.absolute()
    try:
        with _kernel_environment():
            papermill.execute_notebook(
                _literal(notebook),
                _literal(output),
                step.parameters | step.machine,
                kernel_name="python3",
                kernel_manager_class=_own_kernel(),
                cwd=str(notebook.parent),
                progress_bar=False,
                log_output=False,
                stdout_file=sys.stdout,  # live
                stderr_file=sys.stderr,
                start_timeout=300,
                autosave_cell_every=30,
                coalesce_streams=True,  # a progress bar is one output
                iopub_timeout=120,
                # else every start tells of "unencrypted", some ends of an "interrupt"
                extra_arguments=["--log-level=CRITICAL"],
            )
    except papermill.PapermillExecutionError as error:
        if error.ename == Stopped.__name__:
            raise Stopped(_stopped("at", step)) from None
        return name_cause(f"{error.ename}: {error.evalue}")
    except DeadKernelError:
        return "the kernel was killed (out of memory?); fewer --workers need less"
    except (RuntimeError, TimeoutError) as error:  # no kernel came up, or it went mute
        return name_cause(f"{type(error).__name__}: {error}")
    return ""


def _own_kernel() -> type:
    """A kernel manager for this interpreter, whatever kernel is installed as python3."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict())

    return OwnKernel


def _stopped(where: str, step: Step) -> str:
    return f"stopped as asked {where} {step.name}; the same command goes on"


@contextmanager
def _kernel_environment() -> Iterator[None]:
    """Notebooks import this `kit`, and without a word about missing Jupyter widgets.

    Threads that wait sleep: where loader processes share the cores, spinning ones made
    training four times slower.
    """
    root = str(Path(__file__).resolve().parents[1])
    names = ("PYTHONPATH", "PYTHONWARNINGS", "OMP_WAIT_POLICY")
    before = {name: os.environ.get(name) for name in names}
    path, warnings, policy = before.values()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, path]))
    quiet = "ignore:IProgress not found"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [quiet, warnings]))
    os.environ["OMP_WAIT_POLICY"] = policy or "PASSIVE"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _literal(path: Path) -> str:
    """papermill fills `{name}` in paths with parameters; doubled braces stay braces."""
    return str(path.absolute()).replace("{", "{{").replace("}", "}}")


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def _memory(itself: bool) -> int:
    own = os.getpid()
    return anonymous_memory([own] * itself + descendants(own))


def _children(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    texts = (_read(f"/proc/{pid}/task/{thread}/children") for thread in threads)
    return [int(child) for text in texts for child in text.split()]


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:  # the process is gone
        return ""


def _megabytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:.0f}"

"""A build and a folder of photos -> what its notebook does on Kaggle, tried in a sandbox."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import files
from kit.answers import submission
from kit.kaggle import answering, confine, manifest, mounts, runtime, sandbox
from kit.kaggle.answering import RETRIEVAL
from kit.kaggle.build import told
from kit.kaggle.mounts import INDEX, QUERY, TRAIN
from kit.kaggle.runtime import Mode
from kit.kaggle.sandbox import Limits
from kit.text import in_a_line, printable

PREFIX = "kaggle-rehearsal-"  # of a run's folder, before the id of its process
RESULT, EXECUTED = "submission.csv", "executed.ipynb"
LINES = 15  # of an error that are shown
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Rehearsal:
    """What one run came to."""

    layout: str  # of mounts.LAYOUTS
    mode: Mode
    ok: bool
    valid: bool  # there is a submission.csv that Kaggle would score
    submission: Path | None  # a copy of it, where results are kept
    first_valid_s: float | None  # seconds after the start until there was a valid one
    seconds: float
    peak_gb: float  # anonymous memory of all processes; an upper bound
    network: str  # how it was kept away: namespace or socket guard
    readonly: str  # how input was protected: mount or compared
    problem: str = ""  # in one line; none where it is ok
    error: str = ""  # the last lines that tell of it


def rehearse(
    build: Path,
    data: Path,
    *,
    layout: str = "short",
    mode: Mode = Mode.COMMIT,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    keep: Path | None = None,
    isolated: bool | None = None,
    killed_after: float | None = None,
) -> Rehearsal:
    """Runs the notebook of a build as Kaggle would; problems of the run are in the answer.

    data: GLDv2's layout, with test/ and index/; keep: folder for submission.csv, the executed
    notebook and the log; isolated: by namespaces, None for where the system allows
    them; killed_after: seconds after the first valid submission.csv at which everything is
    ended. Such a run is ok when the file is valid then.
    """
    kernel = files.read_json(build / manifest.SUBMISSION / manifest.KERNEL)
    notebook = build / manifest.SUBMISSION / kernel["code_file"]
    task = answering.task(told(notebook).get("task", RETRIEVAL))
    # a competition of landmarks shows train, if anything, but no index
    folders = (QUERY, INDEX) if len(task.shown) > 1 else (QUERY, TRAIN)
    photos = {name: mounts.images(data, name, mode) for name in folders}
    if not photos[QUERY]:
        raise FileNotFoundError(f"no images in {data / QUERY}/a/b/c")
    check = _check({name: [it.stem for it in found] for name, found in photos.items()})
    sweep_folders()
    with (
        tempfile.TemporaryDirectory(
            prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True
        ) as folder,
        files.lock(Path(folder)),
    ):
        root = Path(folder)
        mounts.fill(root / "input", build, kernel, photos, layout, task.form.columns)
        with sandbox.confined(
            _command(notebook, root),
            root,
            limits,
            variables=_variables(mode),
            sources=(build, data),
            isolated=isolated,
        ) as box:
            look = _Look(box.working / RESULT, check, killed_after)
            outcome = sandbox.watch(box, look)
            look(outcome.seconds)  # it may have come with the end
            kept = keep / f"{layout}-{mode}" if keep else root / "kept"
            fault = check(_kept(box, kept) / RESULT)
        problem, error = _problem(outcome, fault, look.killed, kept)
        return Rehearsal(
            *(layout, mode, not problem, not fault),
            kept / RESULT if keep and (kept / RESULT).exists() else None,
            *(look.first, outcome.seconds, outcome.peak / 1e9),
            *(box.network, box.readonly, problem, error),
        )


def sweep_folders() -> list[Path]:
    """Remove the folders of rehearsals that were killed; those that run hold a lock."""
    swept = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not pid.isdigit() or Path("/proc", pid).exists():
            continue
        with suppress(OSError, RuntimeError), files.lock(folder, patience=0):
            shutil.rmtree(folder)
            swept.append(folder)
    return swept


def summary(run: Rehearsal) -> str:
    """One line."""
    result = "ok" if run.ok else "FAILED"
    first = "no valid file"
    if run.first_valid_s is not None:
        first = f"first valid file after {run.first_valid_s:.1f} s"
    return (
        f"{run.layout} {run.mode}: {result}, {first}, {run.seconds:.1f} s in all, "
        f"{run.peak_gb:.2f} GB, network: {run.network}, input: {run.readonly}"
    )


def table(runs: Sequence[Rehearsal]) -> str:
    """One aligned line a run."""
    head = (
        "layout",
        "mode",
        "result",
        "first valid s",
        "s",
        "peak GB",
        "network",
        "input",
    )
    rows = [head]
    for run in runs:
        first = "-" if run.first_valid_s is None else f"{run.first_valid_s:.1f}"
        figures = first, f"{run.seconds:.1f}", f"{run.peak_gb:.2f}"
        result = "ok" if run.ok else "FAILED"
        rows.append(
            (run.layout, str(run.mode), result, *figures, run.network, run.readonly)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [map(str.ljust, row, widths) for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


class _Look:
    """Waits for the first valid file; ends the run a while after it, if asked to."""

    def __init__(
        self, result: Path, check: Callable[[Path], str], killed_after: float | None
    ) -> None:
        self.result, self.check, self.killed_after = result, check, killed_after
        self.first: float | None = None
        self.killed = False
        self.seen: Any = None

    def __call__(self, seconds: float) -> str:
        if self.first is None and self._new() and not self.check(self.result):
            self.first = seconds
        if self.killed_after is None or self.first is None:
            return ""
        self.killed = seconds >= self.first + self.killed_after
        return (
            f"killed {self.killed_after:g} s after the first valid file" * self.killed
        )

    def _new(self) -> bool:
        """Whether the file is another than at the last look."""
        try:
            about = self.result.stat()
        except OSError:
            return False
        before, self.seen = self.seen, (about.st_ino, about.st_size, about.st_mtime_ns)
        return self.seen != before


def _check(ids: Mapping[str, list[str]]) -> Callable[[Path], str]:
    """What is wrong with a submission.csv, in one line; nothing when it is valid.

    ids: of the competition's folders; without an index landmarks are answered.
    """

    def fault(path: Path) -> str:
        if not path.is_file():
            return f"there is no {RESULT}"
        try:
            if INDEX in ids:
                submission.check(path, ids[QUERY], ids[INDEX])
            else:
                submission.check_landmarks(path, ids[QUERY])
        except (OSError, ValueError) as error:
            return in_a_line(str(error).replace(str(path), RESULT), 300)
        return ""

    return fault


def _variables(mode: Mode) -> dict[str, str]:
    again = {runtime.RERUN: "1"} if mode is Mode.RERUN else {}
    return {runtime.RUN_TYPE: "Batch"} | again


def _command(notebook: Path, root: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "papermill", "--kernel", "python3"),
        *("--cwd", str(root / "working"), "--no-progress-bar", "--log-output"),
        *("--autosave-cell-every", "5"),
        *(str(notebook.resolve()), str(root / EXECUTED)),
    ]


def _kept(box: sandbox.Sandbox, to: Path) -> Path:
    """Copies what a run leaves behind over what an earlier one left."""
    to.mkdir(parents=True, exist_ok=True)
    for path in (box.working / RESULT, box.root / EXECUTED, box.root / confine.LOG):
        (to / path.name).unlink(missing_ok=True)
        if path.is_file():
            shutil.copyfile(path, to / path.name)
    return to


def _problem(
    outcome: sandbox.Outcome, fault: str, killed: bool, kept: Path
) -> tuple[str, str]:
    """A line, and the last lines of the error behind it."""
    left = fault or f"{RESULT} is valid"
    if outcome.changed:
        return f"input was changed: {in_a_line(outcome.changed)}", ""
    if killed:
        return (f"{outcome.ended}: {fault}" if fault else ""), ""
    if outcome.ended:
        return f"{outcome.ended}; {left}", _tail(kept / confine.LOG)
    if outcome.code:
        what, lines = _raised(kept / EXECUTED)
        text = lines or _tail(kept / confine.LOG)
        dead = "DeadKernelError" in text
        what = what or (
            "the kernel died (out of memory?)" if dead else "no notebook ran"
        )
        return f"{what}; {left}", text
    return fault, ""


def _raised(notebook: Path) -> tuple[str, str]:
    """Type and message of the error in an executed notebook, and its last lines."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return "", ""
    for cell in cells:
        for each in cell.get("outputs", []):
            if each["output_type"] == "error":
                text = printable(COLOUR.sub("", "\n".join(each["traceback"])))
                what = in_a_line(f"{each['ename']}: {each['evalue']}", 300)
                return what.removesuffix(":"), "\n".join(
                    text.rstrip().split("\n")[-LINES:]
                )
    return "", ""


def _tail(log: Path) -> str:
    if not log.is_file():
        return ""
    text = printable(COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace")))
    return "\n".join(text.rstrip().split("\n")[-LINES:])

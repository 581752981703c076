"""Spaces of stage fields -> trials on groups of GPUs and their mAP@100 in one table, resumable.

TUNE/tune.json     what all trials share
     journal.log   Optuna's study: every trial and its state
     tune.csv      one row a finished trial, made from the journal
     trials/<number>/trial.log, <seed>/<stage>/, <seed>/features/<stage>/<list>/

Any number of processes, on any number of nodes, may work on one TUNE at once. The objective is
the public half's mAP@100, averaged over seeds; the private half's is recorded beside it.
"""

import csv
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kit import config, files, launch
from kit.answers import leaks, tuning
from kit.answers.trial import STOPPED, Search, Trial
from kit.data import lists, tables
from kit.models import net as nets
from kit.nodes.agent import ended
from kit.training.spaces import Point, Space, is_range, points

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

STUDY = "tune"
POLL = 0.2  # seconds between two looks at the trials that run


class _Running(NamedTuple):
    """A trial in the hands of this process."""

    trial: Trial
    devices: str
    process: subprocess.Popen[bytes]
    claim: ExitStack  # the lock of its folder
    since: float


def tune(
    spaces: Space | Sequence[Space],
    search: Search,
    *,
    gpus: int,
    per_trial: int = 1,
    trials: int = 0,
    seed: int = 0,
    block: str = "0/1",
    retry: bool = False,
) -> Path:
    """Runs every point of the spaces that was not run yet; returns tune.csv.

    gpus // per_trial trials run at once, each a process of its own; without GPUs these are just
    places. trials, seed: see `points`. block: "i/n" takes every n-th point, from the i-th on. A
    trial that fails is a row with its reason and the others go on; `retry` runs such points
    again, as trials of their own. An interrupted trial goes on where it was. Raises
    launch.Stopped when the time is over that the environment grants.
    """
    places = _places(gpus, per_trial)
    found = points(spaces, search.job.stage, trials, seed)
    part, parts = _block(block)
    _prepare(search, found)
    study, storage = _study(search.folder)
    failed = {each.number for each in study.trials if each.state.name == "FAIL"}
    running: list[_Running] = []
    stopped = False
    try:
        while True:
            stopped = stopped or launch.time_left() <= 0
            while places and not stopped:
                mine, again = found[part::parts], failed if retry else set()
                claimed = _claim(search, study, mine, per_trial, again)
                if claimed is None:
                    break
                running.append(_start(*claimed, places.pop(0), gpus))
            if not running:
                break
            done = _first_ended(running)
            running.remove(done)
            places.append(done.devices)
            stopped = stopped or done.process.returncode == STOPPED
            _finish(done, study, storage)
    finally:
        for each in running:
            _end(each)
    if stopped:
        raise launch.Stopped(f"{search.folder}: the time is over; tune again to go on")
    return search.folder / "tune.csv"


def table(folder: Path) -> tuple[list[str], list[list[object]]]:
    """Header and a row a finished trial, best public mAP first, failed ones last."""
    if not (folder / "journal.log").exists():
        raise FileNotFoundError(f"no search in {folder}; run 08_tune_training first")
    header, rows = _rows(_study(folder)[0].trials)
    at = header.index("public")
    return header, sorted(rows, key=lambda row: (row[at] is None, -(row[at] or 0)))


# --- before the first trial ---------------------------------------------------------------------


def _places(gpus: int, per_trial: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of every group of GPUs."""
    if not 1 <= per_trial <= gpus:
        raise ValueError(f"per_trial is {per_trial}, not one of 1 to {gpus} (gpus)")
    devices = torch.cuda.device_count()
    if not devices:
        return [""] * (gpus // per_trial)
    if devices < gpus:
        raise ValueError(f"gpus is {gpus}, there are {devices} CUDA devices")
    every = ",".join(map(str, range(devices)))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    firsts = range(0, gpus - per_trial + 1, per_trial)
    return [",".join(names[first : first + per_trial]) for first in firsts]


def _block(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if part.isdecimal() and parts.isdecimal() and int(part) < int(parts):
        return int(part), int(parts)
    raise ValueError(f"block {text!r} is not i/n with i from 0 to n - 1")


def _prepare(search: Search, found: Sequence[Point]) -> None:
    """Refuses what cannot be scored, leaks, and a folder that holds another search."""
    job, folder = search.job, search.folder
    inits = sorted({point.stage.init for point in found} - {""})
    if job.stage.name in inits:
        raise ValueError(f"stage {job.stage.name} cannot start from itself")
    earlier = {init: nets.describe(job.runs / init) for init in inits}
    trained = {point.stage.images for point in found}
    names = sorted({search.query, search.index, *trained})
    named = {name: lists.load(job.lists, name, ("id",)) for name in names}
    solution = job.lists / "solution.csv"
    tuning.refuse_empty_half(tables.read_solution(solution), solution)
    seen = {named[name].hash: name for name in trained}
    for about in earlier.values():
        seen |= about["seen"]
    searched = named[search.index]
    warning = leaks.refuse_leaks(job.lists, searched, seen, search.optimistic)
    if warning:
        print(f"{folder}:{warning}", flush=True)
    shared = {
        "stage": config.to_dict(job.stage),
        "network": config.to_dict(job.net),
        "seeds": list(search.seeds),
        "searched": [search.query, search.index],
        "lists": {name: each.hash for name, each in named.items()},
        "solution": files.sha256(solution),
        "earlier stages": {init: about["hash"] for init, about in earlier.items()},
    }
    with files.lock(folder):
        if not (folder / "tune.json").exists():
            files.write_json(folder / "tune.json", shared)
    before, now = files.read_json(folder / "tune.json"), json.loads(json.dumps(shared))
    if other := [name for name in now if before.get(name) != now[name]]:
        raise ValueError(
            f"{folder} holds a search with other {', '.join(other)}; name another folder"
        )


# --- trials that run ----------------------------------------------------------------------------


def _claim(
    search: Search,
    study: "Study",
    mine: Sequence[Point],
    processes: int,
    again: set[int],
) -> tuple[Trial, ExitStack] | None:
    """The next point that is not finished and that no process runs, and the lock on its trial.

    Whoever runs a trial holds its folder's lock, which ends with the process: a trial that the
    journal calls running and that nobody holds was interrupted.
    """
    with files.lock(search.folder):
        there = {
            trial.user_attrs["key"]: trial
            for trial in study.trials
            if trial.number not in again
        }
        for point in mine:
            trial = there.get(point.key)
            if trial is not None and trial.state.is_finished():
                continue
            number = _add(study, point) if trial is None else trial.number
            claimed, claim = Trial(search, point.stage, number, processes), ExitStack()
            try:
                claim.enter_context(files.lock(claimed.folder, patience=0))
            except RuntimeError:  # another process runs it
                continue
            return claimed, claim
    return None


def _start(trial: Trial, claim: ExitStack, devices: str, gpus: int) -> _Running:
    path = config.write(trial, trial.folder / "trial.json")
    paths = (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": devices,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    cores = launch.count_cores()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // gpus)))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see kit.launch
    with (trial.folder / "trial.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kit.answers.trial", str(path), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the shell is ours to pass on
        )
    return _Running(trial, devices, process, claim, time.monotonic())


def _first_ended(running: Sequence[_Running]) -> _Running:
    while True:
        for each in running:
            if each.process.poll() is not None:
                return each
        time.sleep(POLL)


def _finish(done: _Running, study: "Study", storage: "JournalStorage") -> None:
    """Writes down how a trial ended, unless its time was over."""
    from optuna.trial import TrialState

    trial, search, code = done.trial, done.trial.search, done.process.returncode
    if code == STOPPED:
        done.claim.close()
        return
    seconds = round(time.monotonic() - done.since, 1)
    about: dict[str, Any] = {"seeds": list(search.seeds), "seconds": seconds}
    if code:
        value, state = None, TrialState.FAIL
        said = about["error"] = ended(code, trial.folder / "trial.log")
    else:
        found = files.read_json(trial.folder / "scores.json")
        about |= found
        halves = zip(*found["scores"], strict=True)
        value, private = (statistics.fmean(half) for half in halves)
        state = TrialState.COMPLETE
        said = f"public {value:.4f}  private {private:.4f}; {found['protocol']}"
    print(f"trial {trial.number}: {said}", flush=True)
    with done.claim, files.lock(search.folder):
        known = storage.get_study_id_from_name(STUDY)
        at = storage.get_trial_id_from_study_id_trial_number(known, trial.number)
        for name, each in about.items():
            storage.set_trial_user_attr(at, name, each)
        study.tell(trial.number, value, state=state)
        text = io.StringIO()
        header, rows = _rows(study.trials)
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        files.write_text(search.folder / "tune.csv", text.getvalue())
        _clean(search, study.trials)


def _clean(search: Search, trials: Sequence["FrozenTrial"]) -> None:
    """Removes weights, states and features of the finished trials that are not kept."""
    if search.keep == "all":
        return
    scored = [trial for trial in trials if trial.state.name == "COMPLETE"]
    best = max(scored, key=lambda trial: trial.value, default=None)
    for trial in trials:
        if not trial.state.is_finished() or (trial is best and search.keep == "best"):
            continue
        for seed in search.seeds:
            runs = search.folder / "trials" / str(trial.number) / str(seed)
            stage = runs / search.job.stage.name  # the one before it is a link
            for name in ("model.safetensors", "head.safetensors"):
                (stage / name).unlink(missing_ok=True)
            for folder in (stage / "resume", runs / "features"):
                shutil.rmtree(folder, ignore_errors=True)


def _end(each: _Running) -> None:
    """Ends an unfinished trial's process and those of its group; torchrun ends with it."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        if each.process.poll() is None:
            os.killpg(each.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                each.process.wait(patience)
    each.claim.close()


# --- the study ----------------------------------------------------------------------------------


def _study(folder: Path) -> tuple["Study", "JournalStorage"]:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else: "a study was found"
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    study = optuna.create_study(
        storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True
    )
    return study, storage


def _add(study: "Study", point: Point) -> int:
    """Number of a new trial; one line of the journal, so it is there whole or not at all."""
    from optuna.trial import TrialState, create_trial

    study.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            params={name: _label(value) for name, value in point.fields.items()},
            distributions={n: _distribution(axis) for n, axis in point.space.items()},
            user_attrs={"key": point.key, "fields": point.fields},
        )
    )
    return study.trials[-1].number  # of the one who holds the search's lock


def _distribution(axis: Sequence[Any]) -> "BaseDistribution":
    from optuna import distributions

    if not is_range(axis):
        return distributions.CategoricalDistribution([_label(each) for each in axis])
    low, high, scale = axis
    if scale == "int":
        return distributions.IntDistribution(int(low), int(high))
    return distributions.FloatDistribution(low, high, log=scale == "log")


def _label(value: Any) -> Any:
    """A field's value as Optuna and a table can hold it: lists become text."""
    return value if isinstance(value, str | Real) else json.dumps(value)


def _rows(trials: Iterable["FrozenTrial"]) -> tuple[list[str], list[list[object]]]:
    """Header and a row a finished trial, by number.

    A field is None where a trial's space leaves it as the stage has it. Spreads are standard
    deviations over the seeds, None for a single one; seconds are those of the last process.
    """
    finished = [trial for trial in trials if trial.state.is_finished()]
    fields = dict.fromkeys(n for t in finished for n in t.user_attrs["fields"])
    rows: list[list[object]] = []
    for trial in finished:
        said = trial.user_attrs
        chosen = said["fields"]
        values = [_label(chosen[n]) if n in chosen else None for n in fields]
        numbers: list[float] = []
        for half in zip(*said.get("scores", [[math.nan] * 2]), strict=True):
            spread = statistics.stdev(half) if len(half) > 1 else math.nan
            numbers += [round(statistics.fmean(half), 6), round(spread, 6)]
        scores = [None if math.isnan(number) else number for number in numbers]
        state = "done" if trial.state.name == "COMPLETE" else "failed"
        seeds = " ".join(map(str, said["seeds"]))
        ending = [seeds, said["seconds"], said.get("error")]
        rows.append([trial.number, state, *values, *scores, *ending])
    halves = ("public", "public_spread", "private", "private_spread")
    return ["trial", "state", *fields, *halves, "seeds", "seconds", "error"], rows

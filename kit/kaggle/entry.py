"""A run of the submission notebook: where its files are, how long it has, and what it answered.

At home the features and the chain are in a work folder, and images beside it. On Kaggle the same
work folder is linked from what is mounted, and a file that scores is there at once: whatever fails
later, or takes too long, leaves the best one so far. A run that is scored ends without an error
then, for Kaggle scores no run that fails; any other raises it.
"""

import math
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kit import launch
from kit.answers import submission
from kit.answers.submission import Table
from kit.data import lists, sources
from kit.kaggle import flat, runtime, wheels
from kit.pipeline import peak_memory
from kit.plan import INDEX, QUERY, Run

RESULT, SAMPLE = "submission.csv", "sample_submission.csv"
LATE = "out of time"
WORK, SITE = "work", "site"  # in Kaggle's scratch
RESERVE = 120.0  # seconds kept for writing, and for Kaggle to save what was written


class OutOfTime(BaseException):  # no handler of errors on the way may take it for one
    """A step was ended because the session's time is over."""


class Task(NamedTuple):
    """What a competition shows, and what it wants."""

    query: str = "test"  # folders
    index: str = "index"  # "": only queries are shown, and landmarks are wanted
    public_queries: int = runtime.PUBLIC_QUERIES
    commit_images: int = 0  # queries, and index images, of a commit; 0: all of them
    form: submission.Form = submission.FORM
    sizes: bool = False  # heights and widths of all images are needed, for a template


class Done(NamedTuple):
    """A step of the notebook as the closing table tells it."""

    name: str
    state: str
    seconds: float
    peak: int | None  # bytes of anonymous memory, processes that it started included


@dataclass
class Entry:
    """A run, at home or on Kaggle."""

    place: Run  # where lists, models, features and the chain are
    out: Path
    asked: np.ndarray  # (Q,) every query's id
    scored: bool = False  # Kaggle scores it: nothing may end it but its end
    ends: float = math.inf  # unix time
    gpus: int = 0  # that work
    form: submission.Form = submission.FORM
    done: list[Done] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, ends: float | None = None) -> Iterator[None]:
        """Times what is inside, and ends it when the time is over; ends: another time.

        Where a file that scores exists, running out of time is told and no error, nor is what
        later steps miss then; in a run that is scored nothing is.
        """
        began, state = time.monotonic(), "done"
        left = (self.ends if ends is None else ends) - time.time()
        try:
            with peak_memory(itself=True) as peak, _alarm(left):
                yield
        except (OutOfTime, launch.Stopped) as error:
            state = LATE
            if not self.out.exists():
                raise
            print(f"{name}: {error or 'the time is over'}; {self.out.name} stays")
        except Exception as error:
            state = "failed"
            late = any(each.state == LATE for each in self.done)
            if not ((self.scored or late) and self.out.exists()):
                raise
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            print(f"{name}: failed, {what}; {self.out.name} stays")
        finally:
            seconds = time.monotonic() - began
            self.done.append(Done(name, state, seconds, peak.bytes))

    def write(
        self, query_ids: np.ndarray, ranked: np.ndarray, index_ids: np.ndarray
    ) -> None:
        """The answers (Q, k) of queries (Q,), checked; none of others that are asked."""
        ranked = ranked[:, : self.form.most]
        whole = np.full((len(self.asked), ranked.shape[1]), "", ranked.dtype)
        rows = {query: row for row, query in enumerate(self.asked.tolist())}
        whole[[rows[query] for query in query_ids.tolist()]] = ranked
        submission.write(self.out, self.asked, whole, self.asked, index_ids, self.form)

    def write_landmarks(self, predictions: Table, landmarks: Iterable[str]) -> None:
        """Predictions (id, landmark, confidence) of some queries, checked; none of the others."""
        known = frozenset(landmarks)
        submission.write_landmarks(
            self.out, predictions, self.asked.tolist(), known, self.form
        )

    def table(self) -> str:
        """Seconds and memory of every step."""
        width = max(len(each.name) for each in self.done)
        lines = [f"{'step':{width}}  {'state':11}  seconds  peak MB"]
        for name, state, seconds, peak in self.done:
            used = "-" if peak is None else f"{peak / 1e6:.0f}"
            lines.append(f"{name:{width}}  {state:11}  {seconds:7.1f}  {used:>7}")
        return "\n".join(lines)


def at_home(place: Run, out: Path, form: submission.Form, query: str = QUERY) -> Entry:
    """A run on a work folder, whose answers are written to `out`."""
    return Entry(place, out, lists.load(place.lists, query).ids, form=form)


def on_kaggle(
    recipe: str,
    competition: str,
    datasets: Sequence[str],
    task: Task,
    hours: float,
    started: float,
) -> Entry:
    """A run on Kaggle: a file that scores, then lists of the images, links to what travelled.

    datasets: owner/slug of each. hours: of the session; started: unix time. A commit looks at
    the first of its images, and the other queries have empty answers.
    """
    data = runtime.find("competition", competition)
    asked = np.array(sorted(sources.image_ids(data / task.query)), "U16")
    if not len(asked):
        raise FileNotFoundError(f"no image in {data / task.query}")
    run = runtime.detect(asked, task.public_queries)
    print(run.statement)
    entry = Entry(
        Run(recipe, data, runtime.temp() / WORK),
        runtime.working() / RESULT,
        asked,
        scored=run.mode is runtime.Mode.RERUN,
        ends=runtime.stop_at(started, hours, RESERVE),
        form=task.form,
    )
    with entry.step("sample", math.inf):
        if task.index:
            some = next(sources.image_ids(data / task.index), "")
            _first_file(entry, data / SAMPLE, some)
        else:
            _first_landmarks(entry, data / SAMPLE)
    with entry.step("mount"):
        place = entry.place
        # an index that nobody asks for may not be there: the queries stand in for it
        facts = sources.competition(data, task.query, task.index or task.query)
        wanted = (QUERY, INDEX) if task.index else (QUERY,)
        if not task.index:
            facts.index = facts.index.head(0)
        if run.mode is runtime.Mode.COMMIT and task.commit_images:
            facts.query = facts.query.head(task.commit_images)
            facts.index = facts.index.head(task.commit_images)
        lists.build(facts, data, place.lists, sizes=task.sizes, wanted=wanted)
        mounts = [runtime.find("dataset", name) for name in datasets]
        flat.link(mounts, place.work)
        seen = runtime.gpus()
        print(seen)
        entry.gpus = runtime.hide_faulty(seen)
        for name in wheels.install(mounts, runtime.temp() / SITE):
            print(f"installed {name}")
    return entry


def _first_file(entry: Entry, sample: Path, some: str) -> None:
    """The competition's own sample where it fits the queries, else one index image for all."""
    asked = entry.asked.tolist()
    try:
        submission.check(sample, asked, form=entry.form)
        found = submission.read(sample, entry.form)
        answers = [found[query] for query in asked]
    except (OSError, ValueError) as error:
        print(f"{SAMPLE} is not used: {error}")
        answers = [[some]] * len(asked)
    width = max(1, *map(len, answers))
    ranked = np.full((len(asked), width), "", "U16")
    for row, images in zip(ranked, answers, strict=True):
        row[: len(images)] = images
    submission.write(entry.out, entry.asked, ranked, asked, form=entry.form)


def _first_landmarks(entry: Entry, sample: Path) -> None:
    """The competition's own sample where it fits the queries, else no prediction at all."""
    asked = entry.asked.tolist()
    try:
        submission.check_landmarks(sample, asked, form=entry.form)
        found = submission.read_landmarks(sample, entry.form)
    except (OSError, ValueError) as error:
        print(f"{SAMPLE} is not used: {error}")
        found = submission.no_landmarks(asked)
    submission.write_landmarks(entry.out, found, asked, form=entry.form)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside once the time is over, at the next line of Python."""

    def ring(*_: object) -> None:
        raise OutOfTime("the time is over")

    if seconds == math.inf or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would mean never
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""One trial of a search: a stage with its fields changed -> mAP@100, in a process of its own.

`python -m kit.answers.trial TRIAL.json PID`, started by kit.tune, whose process id PID is.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kit import config, files, launch
from kit.answers import retrieval
from kit.answers.metrics import mean_ap, protocol
from kit.answers.metrics.protocol import Protocol
from kit.data import lists, tables
from kit.features import extract
from kit.nodes.agent import end_with
from kit.rerank.chain import Chain
from kit.training.job import Job, Stage, change

KEEP = ("best", "all", "none")
STOPPED = 75  # exit status of a trial whose time was over; it is not finished


@dataclass(frozen=True)
class Search:
    """What all trials share."""

    job: Job  # the stage that is varied; its `runs` holds the stage it starts from
    folder: Path  # TUNE
    seeds: tuple[int, ...] = (0,)  # a trial is trained with each of them
    query: str = "query"  # list of the queries
    index: str = "index"  # list that is searched
    batch: int = 32  # images at a time at extraction
    keep: str = "best"  # whose weights and features stay: best, all or none
    optimistic: bool = False  # allow training on what is searched

    def __post_init__(self) -> None:
        config.check(self, "search", least={"batch": 1}, choices={"keep": KEEP})
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"search: seeds {self.seeds} are none, or one stands twice"
            )


@dataclass(frozen=True)
class Trial:
    """What the process of one trial needs."""

    search: Search
    stage: Stage  # with its fields changed
    number: int
    processes: int  # one a GPU of its group

    @property
    def folder(self) -> Path:
        return self.search.folder / "trials" / str(self.number)


def score(trial: Trial, seed: int) -> tuple[float, float, Protocol]:
    """Public and private mAP@100 of the stage trained with one seed, by exact search alone.

    What an earlier, interrupted process has finished is kept.
    """
    search, runs = trial.search, trial.folder / str(seed)
    job = replace(search.job, stage=change(trial.stage, seed=seed), runs=runs)
    init = job.stage.init
    if init and not (runs / init).is_symlink():
        runs.mkdir(parents=True, exist_ok=True)
        (runs / init).symlink_to((search.job.runs / init).resolve())
    _launch("kit.training.stage", job.write(), trial.processes)
    for name in (search.query, search.index):
        looks = extract.Job(
            runs=runs,
            models=(job.stage.name,),
            lists=job.lists,
            images=name,
            data=job.data,
            features=runs / "features",
            batch=search.batch,
            workers=job.workers,
        )
        _launch("kit.features.extract", looks.write(), trial.processes)
    names = (search.query, search.index)
    query, index = (lists.load(job.lists, name, ("id",)) for name in names)
    scenes = retrieval.Scenes(runs / "features", query, index)
    chain = Chain({job.stage.name: 1.0})
    solution = tables.read_solution(job.lists / "solution.csv")
    found = mean_ap.evaluate(*scenes.answers(chain), solution)
    told = *names, protocol.of_lists(job.lists), len(found.queries)
    about = protocol.describe(runs / "features", chain, *told)
    return found.public, found.private, about


def _launch(module: str, job: Path, processes: int) -> None:
    """On this machine alone, wherever else its pipeline runs."""
    logs, alone = job.parent / "logs", launch.Place()
    launch.launch(module, [str(job)], processes=processes, logs=logs, place=alone)


def main(arguments: Sequence[str] | None = None) -> None:
    """A trial's file, and the process id of the search that it is to end with."""
    parser = argparse.ArgumentParser(description="One trial; kit.tune starts it.")
    parser.add_argument("trial", type=Path, help="its JSON")
    parser.add_argument("parent", type=int, help="process that it ends with")
    given = parser.parse_args(arguments)
    end_with(given.parent, signal.SIGKILL)
    trial = config.read(Trial, given.trial)
    try:
        found = [score(trial, seed) for seed in trial.search.seeds]
    except launch.Stopped as stopped:
        print(stopped)
        sys.exit(STOPPED)
    scores = [halves for *halves, _ in found]
    told = {"scores": scores, "protocol": str(found[-1][-1])}
    files.write_json(trial.folder / "scores.json", told)


if __name__ == "__main__":
    main()

"""What a submission answers: index images of each query (retrieval), or its landmark (recognition).

The two are told apart here; the notebook asks for one by its name and goes one way for both.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kit.answers import leaks, recognition, retrieval, submission
from kit.answers.metrics import gap, mean_ap, protocol
from kit.answers.metrics.protocol import Protocol
from kit.data import lists, tables
from kit.kaggle.entry import Entry
from kit.plan import INDEX, QUERY, Run
from kit.rerank import chain, recogniser

RETRIEVAL, RECOGNITION = "retrieval", "recognition"


@dataclass(frozen=True)
class Given:
    """What both need beside models and steps."""

    place: Run
    query: str = QUERY  # lists
    index: str = INDEX
    reference: str = ""  # whose labelled images vote; "" for none
    workers: int = 0  # processes that verify; 0: this one
    other_scales: bool = False  # of references; a run that had no time for all
    optimistic: bool = False  # leaks are told, not refused

    def load(self, name: str) -> lists.ImageList:
        return lists.load(self.place.lists, name)

    def voters(self) -> lists.StoredList | None:
        if not self.reference:
            return None
        return lists.find(self.place.lists, self.reference)

    def warning(self, seen: dict[str, str]) -> str:
        """Of a leak."""
        searched = self.load(self.index)
        return leaks.refuse_leaks(self.place.lists, searched, seen, self.optimistic)

    def protocol(self, plan: Any, searched: str, truth: Path, asked: int) -> Protocol:
        """What a score of `asked` queries was measured with; searched: a list."""
        voters = None if searched == self.reference else self.voters()
        said = protocol.of_lists(self.place.lists, truth.name)
        names = self.place.features, plan, self.query, searched
        return protocol.describe(*names, said, asked, voters=voters)


class Retrieval:
    form, shown = submission.FORM, (QUERY, INDEX)  # whose images a competition shows
    steps = ("search", "rerank")  # each writes better answers than the one before

    def __init__(self, given: Given, plan: chain.Chain) -> None:
        """Refuses a leak where there are right answers to be measured by."""
        self.given, self.plan, place = given, plan, given.place
        self.lists = given.load(given.query), given.load(given.index)
        folders = *self.lists, given.voters(), place.data, place.graphs, given.workers
        self.scenes = retrieval.Scenes(
            place.features, *folders, other_scales=given.other_scales
        )
        self.rankings: dict[str, Any] = {}
        self.warning = ""
        if self.truth(place).exists():
            self.warning = given.warning(self.scenes.seen(plan.models))

    @staticmethod
    def load(place: Run) -> chain.Chain:
        """Models and steps."""
        return chain.load(place.chain)

    @staticmethod
    def out(place: Run) -> Path:
        """The answers of a run at home."""
        return place.submission

    @staticmethod
    def truth(place: Run) -> Path:
        """The right answers, if there are any."""
        return place.lists / "solution.csv"

    def write(self, entry: Entry, step: str) -> None:
        """The answers after one of `steps`."""
        chosen = replace(self.plan, steps=()) if step == "search" else self.plan
        query_ids, ranked = self.scenes.answers(chosen)
        entry.write(query_ids, ranked, self.lists[1].ids)
        self.rankings = dict(zip(query_ids, ranked, strict=True))

    def score(self) -> tuple[mean_ap.Score, Protocol]:
        """Of what was written last."""
        truth = self.truth(self.given.place)
        ids, ranked = (
            np.array(each) for each in zip(*self.rankings.items(), strict=True)
        )
        found = mean_ap.evaluate(ids, ranked, tables.read_solution(truth))
        searched, asked = self.given.index, len(found.queries)
        return found, self.given.protocol(self.plan, searched, truth, asked)


class Recognition:
    form, shown = submission.LANDMARKS, (QUERY,)
    steps = ("vote", "recognise", "verify")  # the last reads the references' images

    def __init__(self, given: Given, plan: recogniser.Recogniser) -> None:
        self.given, self.plan, place = given, plan, given.place
        voters, truth = given.voters(), self.truth(place)
        if voters is None:
            raise ValueError("recognition needs references: name their list")
        solution = tables.read_recognition(truth) if truth.exists() else None
        self.recognition = recognition.Recognition(
            *(place.features, given.load(given.query), voters, place.data),
            *(place.lists, solution, given.workers, given.other_scales),
        )
        self.answered: recogniser.Recogniser | None = None
        self.warning = ""
        if truth.exists():
            self.warning = given.warning(self.recognition.scenes.seen(plan.models))

    @staticmethod
    def load(place: Run) -> recogniser.Recogniser:
        return recogniser.load(place.recogniser)

    @staticmethod
    def out(place: Run) -> Path:
        return place.landmarks

    @staticmethod
    def truth(place: Run) -> Path:
        return place.lists / "recognition.csv"

    def write(self, entry: Entry, step: str) -> None:
        """The answers after one of `steps`, where it changes something."""
        chosen = {
            "vote": replace(self.plan, steps=self.plan.steps[:1]),
            "recognise": recogniser.without(self.plan, "inliers"),
            "verify": self.plan,
        }[step]
        if chosen == self.answered:
            return
        self.predictions = self.recognition.predict(chosen)
        entry.write_landmarks(self.predictions, self.recognition.landmarks.values())
        self.answered = chosen

    def score(self) -> tuple[gap.Score, Protocol]:
        """Of what was written last."""
        truth = self.truth(self.given.place)
        found = gap.evaluate(self.predictions, self.recognition.solution)
        searched, asked = self.given.reference, len(found.queries)
        return found, self.given.protocol(self.plan, searched, truth, asked)


TASKS = {RETRIEVAL: Retrieval, RECOGNITION: Recognition}
# whose folders and columns the notebook knows
COMPETITIONS = {
    "landmark-retrieval-2021": RETRIEVAL,
    "landmark-recognition-2021": RECOGNITION,
}


def check_competition(slug: str, task: str) -> None:
    """Refuse a competition that the notebook cannot answer, or not with this task."""
    if COMPETITIONS.get(slug) == task:
        return
    known = ", ".join(f"{name} ({kind})" for name, kind in COMPETITIONS.items())
    raise ValueError(
        f"competition {slug!r} is none of {task}; known: {known}. Another one needs an entry in "
        "kit.kaggle.answering.COMPETITIONS, folders as theirs (test/ and index/ or train/ with "
        "images as a/b/c/abc....jpg) and a sample_submission.csv with their columns"
    )


def task(name: str) -> type[Retrieval] | type[Recognition]:
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[name]

"""Rows of the suite `quality`: what each step of a rerank is worth on real photos.

LANDMARK_DATA names the folder of the photos. Two kinds of features:

    trained      packages, by the last stage of the recipe KIT_RECIPE (toy) in the work folder
                 KIT_DEMO, which scripts/demo.sh or scripts/run_pipeline.py fills
    untrained    landmarks, and packages to choose by: the pretrained network and GeM, at a
                 longest side of 320 pixels

Every parameter is chosen on the public half of packages; trained features are reported on its
private half, untrained ones on landmarks, each landmark counting the same. `published` is a step
with its defaults, `tuned` with what was chosen, `chain` what forward selection found, `pair` a
tuned verified expansion and then a tuned local verification: which pair is best is seen on the
reported photos. `small-places` is the chain of that name, with nothing tuned.

The chain of each row is written to KIT_CHAINS (work/chains) as a chain.json that
`kit.answers.metrics --chain` and the notebooks read; the row names its file.
"""

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import ROOT, Bench, Row

from kit import files
from kit.answers import tuning
from kit.answers.metrics import mean_ap, protocol
from kit.answers.metrics.protocol import Protocol
from kit.answers.retrieval import Scenes
from kit.data import lists, sources, tables
from kit.features import extract
from kit.features.views import Views
from kit.rerank import chain as chains
from kit.rerank import steps
from kit.rerank.chain import Chain
from kit.rerank.steps import STEPS, Step
from kit.training import recipes

SIDE, TRIALS, LEAST = 320, 24, 0.001  # pixels; for each step; gain that a step is worth
LONGEST, WIDEST = 4, 8  # steps of a chain, and those it is made of
VERIFIED = 20  # images of a shortlist that are verified; published: 100, in minutes
GOALS = {"packages": 0.03, "landmarks": 0.06}  # gain of the best chain over search
CHAINS = Path(os.environ.get("KIT_CHAINS") or ROOT / "work" / "chains")
LABELLED = ("landmark_country", "soft_labels", "same_label", "sort_insert") + (
    "category",
    "category_expansion",
)
TRANSDUCTIVE = ("k_reciprocal",)  # other queries are neighbours


@dataclass(frozen=True)
class Photos:
    """Features of one dataset and its answers."""

    scenes: Scenes
    model: str
    solution: Any  # a table of tables.read_solution
    protocol: Protocol
    per_landmark: bool = False
    scores: dict[str, mean_ap.Score] = field(default_factory=dict)

    @property
    def search(self) -> Chain:
        return Chain({self.model: 1.0})

    def score(self, chain: Chain) -> mean_ap.Score:
        told = str(chain)
        if told not in self.scores:
            self.scores[told] = mean_ap.evaluate(
                *self.scenes.answers(chain), self.solution
            )
        return self.scores[told]

    def public(self, chain: Chain) -> float:
        return self.score(chain).public

    def gain(self, chain: Chain) -> mean_ap.Gain:
        """Over search, on the half that nothing is chosen by."""
        pair = self.score(self.search), self.score(chain)
        return mean_ap.gain(*pair, per_landmark=self.per_landmark)

    def value(self, chain: Chain) -> float:
        queries = self.score(chain).queries
        queries = queries[queries["usage"] == "Private"]
        if self.per_landmark:
            return float(queries.groupby("landmark")["ap"].mean().mean())
        return float(queries["ap"].mean())


def trained_rows(bench: Bench) -> Iterator[Row]:
    """Packages: every step, on its private half."""
    work, recipe = Path(os.environ.get("KIT_DEMO", "")), _recipe()
    data = _photos("packages")
    if data is None or not os.environ.get("KIT_DEMO"):
        yield bench.missing(
            "trained", "LANDMARK_DATA or KIT_DEMO names no folder of packages"
        )
        return
    names = ("query", "index", "index_train_holdout")
    found = [lists.load(work / "lists", name) for name in names]
    folder = work / "features" / recipe.name
    scenes = Scenes(folder, *found, data, work / "graph" / recipe.name, _cores())
    solution = tables.read_solution(work / "lists" / "solution.csv")
    model = recipe.stages[-1].name
    about = _protocol(folder, model, work / "lists", solution, found[2])
    photos = Photos(scenes, model, solution, about)
    yield from _table(bench, photos, photos, f"packages, {recipe.name}", "packages", ())


def untrained_rows(bench: Bench) -> Iterator[Row]:
    """Landmarks: every step without labels, by parameters chosen on packages."""
    places = [_photos(name) for name in ("landmarks", "packages")]
    if None in places:
        yield bench.missing("untrained", "LANDMARK_DATA names no folder of photos")
        return
    with tempfile.TemporaryDirectory() as name:
        seen, chosen = (
            _untrained(data, Path(name) / data.name)
            for data in places
            if data is not None
        )
        # nothing is chosen by these photos, so all of their queries report
        whole = seen.solution.assign(usage="Private")
        seen = replace(seen, solution=whole, per_landmark=True)
        yield from _table(
            bench, chosen, seen, "landmarks, untrained", "landmarks", LABELLED
        )


def _table(
    bench: Bench,
    chosen: Photos,
    reported: Photos,
    title: str,
    goal: str,
    without: Sequence[str],
) -> Iterator[Row]:
    """The rows of one dataset; what is chosen is chosen by another, or by its public half."""
    plain = f"{reported.value(reported.search):.4f}"
    yield bench.told(f"{title}: measured with", protocol=str(reported.protocol))
    yield bench.told(f"{title}: search", mAP=plain)
    tuned = []
    for step in _steps(without, 3 if bench.quick else None):
        try:
            better = tuning.tuned(
                chosen.search, step, chosen.public, 2 if bench.quick else TRIALS
            )
        except ModuleNotFoundError as error:
            yield bench.missing(f"{title}: {step}", str(error))
            continue
        tuned.append(better)
        for kind, one in (("published", step), ("tuned", better)):
            yield _told(bench, f"{title}: {kind} {one}", reported, one)
    kinds = {
        " (verified)": [step for step in tuned if hasattr(step, "backend")],
        " (no other query)": [step for step in tuned if not _transductive(step)],
        " (any step)": tuned,
    }
    best = []
    for about, candidates in kinds.items():
        chain = _selected(chosen.search, candidates, chosen.public)
        told = "; ".join(map(str, chain.steps))
        yield _told(bench, f"{title}: chain{about} {told}", reported, *chain.steps)
        best.append(reported.gain(replace(chain, models=reported.search.models)).mean)
    named = chains.NAMED["small-places"]
    try:
        yield _told(bench, f"{title}: small-places", reported, *named)
        best.append(reported.gain(replace(reported.search, steps=named)).mean)
    except ModuleNotFoundError as error:
        yield bench.missing(f"{title}: small-places", str(error))
    for pair in _pairs(tuned):
        told = "; ".join(map(str, pair))
        yield _told(bench, f"{title}: pair {told}", reported, *pair)
        best.append(reported.gain(replace(reported.search, steps=pair)).mean)
    yield bench.row(f"{title}: best chain over search", max(best), GOALS[goal], False)


def _told(bench: Bench, name: str, photos: Photos, *chosen: Step) -> Row:
    """A row, and the file of its chain, named for the row as far as a file's name may be."""
    chain = replace(photos.search, steps=chosen)
    gain = photos.gain(chain)
    short = re.sub("[^0-9A-Za-z]+", "-", name)[:60].strip("-")
    made = files.fingerprint([step.to_dict() for step in chosen])[:8]
    path = chains.save(chain, CHAINS / f"{short}-{made}.json")
    mean = f"{photos.value(chain):.4f}"
    return bench.told(name, mAP=mean, gain=str(gain), chain=str(path))


def _selected(
    chain: Chain, candidates: Sequence[Step], score: Callable[[Chain], float]
) -> Chain:
    """Forward selection: of the WIDEST steps that are best alone the one that adds most, tuned in
    its place, until none adds LEAST or there are LONGEST.
    """

    def alone(step: Step) -> float:
        return score(tuning.with_step(chain, step))

    left, reached = sorted(candidates, key=alone)[-WIDEST:], score(chain)
    while left and len(chain.steps) < LONGEST:
        step = max(left, key=lambda each: score(tuning.with_step(chain, each)))
        step = tuning.tuned(chain, step, score, TRIALS // 2)
        longer = tuning.with_step(chain, step)
        if score(longer) < reached + LEAST:
            return chain
        chain, reached = longer, score(longer)
        left = [each for each in left if each.name != step.name]
    return chain


def _pairs(tuned: Sequence[Step]) -> list[tuple[Step, Step]]:
    """What is verified before the search, with what is verified after it, each as tuned alone."""
    expansions = [step for step in tuned if isinstance(step, steps.VerifiedQe)]
    local = [step for step in tuned if isinstance(step, steps.Local)]
    return list(itertools.product(expansions, local))


def _steps(without: Sequence[str], most: int | None) -> list[Step]:
    """Every step as published, and those that have variants in all of them."""
    found = [STEPS[name]() for name in STEPS if name not in without]
    found = [replace(s, shortlist=VERIFIED) if _verifies(s) else s for s in found]
    more: list[Step] = []
    for step in found:
        if _verifies(step) or isinstance(step, steps.Local):
            more.append(replace(step, backend="xfeat"))
        if isinstance(step, steps.LandmarkCountry):
            more += [
                replace(step, query_tags="k_reciprocal"),
                replace(step, index_tags="average"),
            ]
        if isinstance(step, steps.Whitening):
            more.append(replace(step, dim=64, supervised=False))
    unlabelled = [s for s in more + found if not (without and _learns(s))]
    return sorted(unlabelled, key=lambda s: list(STEPS).index(s.name))[:most]


def _verifies(step: Step) -> bool:
    return isinstance(step, steps.VerifiedQe | steps.VerifiedDba)


def _learns(step: Step) -> bool:
    return isinstance(step, steps.Whitening) and step.supervised


def _transductive(step: Step) -> bool:
    return step.name in TRANSDUCTIVE or getattr(step, "transductive", False)


def _untrained(data: Path, work: Path) -> Photos:
    """The pretrained network's features of queries and index, extracted here."""
    continents = tables.read_continents(ROOT / "datasets_meta" / "continents.csv")
    names = ("query", "index")
    lists.build(
        sources.official(data),
        data,
        work / "lists",
        continents,
        wanted=(*names, "solution"),
    )
    net = _recipe().network("recipe", ROOT / "weights")
    extract.untrained(net, work / "runs" / recipes.UNTRAINED)
    for name in names:
        extract.run(
            extract.Job(
                work / "runs",
                (recipes.UNTRAINED,),
                work / "lists",
                name,
                data,
                work / "features",
                Views(SIDE, "longest"),
                batch=8,
            )
        )
    found = [lists.load(work / "lists", name) for name in names]
    scenes = Scenes(work / "features", *found, data=data, processes=_cores())
    solution = tables.read_solution(work / "lists" / "solution.csv")
    model = recipes.UNTRAINED
    about = _protocol(work / "features", model, work / "lists", solution)
    return Photos(scenes, model, solution, about)


def _protocol(
    features: Path,
    model: str,
    folder: Path,
    solution: Any,
    voters: lists.ImageList | None = None,
) -> Protocol:
    """Of search alone; each row names its own steps."""
    asked = int((solution["usage"] != "Ignored").sum())
    told = "query", "index", protocol.of_lists(folder), asked
    return protocol.describe(features, Chain({model: 1.0}), *told, voters=voters)


def _recipe() -> recipes.Recipe:
    return recipes.get(os.environ.get("KIT_RECIPE", "toy"))


def _photos(name: str) -> Path | None:
    found = ROOT / os.environ.get("LANDMARK_DATA", "none") / name
    return found if found.is_dir() else None


def _cores() -> int:
    return len(os.sched_getaffinity(0))


ROWS = [trained_rows, untrained_rows]

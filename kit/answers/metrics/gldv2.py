"""GLDv2's folder and networks -> mAP@100, GAP and every other definition, with their protocol.

<work>/lists      built unless they are there; again once what decides them has changed
<work>/lists.json their hashes and what decided them, where they were built here
<work>/features   <network>/<list>, extracted unless they are there
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kit import files
from kit.answers import leaks, tags
from kit.answers.metrics import definitions, extraction, gap, mean_ap, protocol
from kit.answers.metrics.extraction import Networks
from kit.answers.recognition import landmarks
from kit.answers.retrieval import Reference, Scenes
from kit.answers.scene import QUERY, Scene
from kit.data import lists, sources, tables
from kit.rerank.chain import Chain

log = logging.getLogger(__name__)

ASKED, SEARCHED, SMALLER = "query", "index", "index_val"
INDEX_IMAGES = 761_757  # of all of GLDv2
RETRIEVAL = "test/retrieval_solution_v2.1.csv"
RECOGNITION = "test/recognition_solution_v2.1.csv"
VOTES = 3

# a scene with references -> id, landmark, confidence of its queries
Predict = Callable[[Scene], pd.DataFrame]


@dataclass(frozen=True)
class Options:
    """What is evaluated, and on which images."""

    data: Path  # in GLDv2's layout
    work: Path  # everything is written under it
    networks: Networks
    chain: Chain | None = None  # that reranks; else search alone
    reference: str = "clean"  # list whose labelled images vote; "": no GAP
    index_ids: Path | None = None  # ids of a competition's smaller index
    continents: Path | None = None  # table of kit.data.tables.read_continents
    optimistic: bool = False  # allow leaks, and print LEAKY beside the numbers
    processes: int = 0  # that verify by local features

    @property
    def lists(self) -> Path:
        return self.work / "lists"

    @property
    def made(self) -> Path:
        return self.work / "lists.json"

    @property
    def index(self) -> str:
        return SMALLER if self.index_ids else SEARCHED


def evaluate(options: Options, predict: Predict | None = None) -> Iterator[str]:
    """Lines to print. predict: who says which landmark a query shows; else the nearest vote."""
    wanted = [ASKED, options.index, *([options.reference] if options.reference else [])]
    truths = [options.data / name for name in (RETRIEVAL, RECOGNITION)]
    if not truths[0].exists():
        raise FileNotFoundError(f"{truths[0]}: no ground truth there")
    if options.reference and not truths[1].exists():
        raise FileNotFoundError(
            f"{truths[1]}: no ground truth of GAP there; name no reference to go without"
        )
    _refuse_no_query(truths[0], tables.read_solution(truths[0]), "images")
    if options.reference:
        found = tables.read_recognition(truths[1])
        _refuse_no_query(truths[1], found, "landmarks")
    _build(options, wanted)
    asked, searched = (lists.load(options.lists, name) for name in wanted[:2])
    _refuse_foreign_answers(truths[0], searched)
    for name in wanted:
        place = options.data, options.work / "features"
        extraction.extracted(options.networks, options.lists, name, *place)
    voters = lists.find(options.lists, options.reference) if options.reference else None
    plan = options.networks.chain(options.chain)
    scenes = Scenes(
        *(options.work / "features", asked, searched, voters, options.data),
        processes=options.processes,
    )
    seen = scenes.seen(plan.models)
    warning = leaks.refuse_leaks(options.lists, searched, seen, options.optimistic)
    yield from _retrieval(options, plan, scenes, warning)
    if voters is not None:
        name = predict or vote(landmarks(voters))
        yield from _recognition(options, plan, scenes, name, warning)


def _refuse_no_query(path: Path, solution: pd.DataFrame, column: str) -> None:
    """Raise ValueError where no query counts: every mean would be NaN."""
    counts = (solution["usage"] != "Ignored") & (solution[column].str.strip() != "")
    if not counts.any():
        raise ValueError(
            f"{path}: no query counts, all {len(solution)} are Ignored or have no {column}"
        )


def _refuse_foreign_answers(path: Path, searched: lists.ImageList) -> None:
    """Raise ValueError where no right answer is in the index, so that nothing can be found."""
    answers = " ".join(tables.read_solution(path)["images"]).split()
    index = set(searched.rows["id"])
    if index.isdisjoint(answers):
        raise ValueError(
            f"{path}: none of its {len(answers)} right answers, such as {answers[0]!r}, is in "
            f"list {searched.name}, whose ids are such as {searched.rows['id'].iloc[0]!r}"
        )


def vote(names: Mapping[int, str], votes: int = VOTES) -> Predict:
    """The landmark with the largest sum of cosines among the nearest references.

    names: landmark of each label. The mean cosine of the votes is the confidence.
    """

    def predict(scene: Scene) -> pd.DataFrame:
        found = tags.predicted(scene, QUERY, votes)
        known = (found.labels >= 0).tolist()
        landmark = [
            names[label] if there else ""
            for label, there in zip(found.labels.tolist(), known, strict=True)
        ]
        sure = found.scores.masked_fill(found.labels < 0, 0.0)
        ids = scene.models[0].query.ids
        columns = {"id": ids, "landmark": landmark, "confidence": sure.double()}
        return pd.DataFrame(columns).astype({"landmark": object})

    return predict


def _build(options: Options, wanted: list[str]) -> None:
    decided = _decided(options)
    if _there(options, wanted, decided):
        return
    log.info("building the lists of %s", options.data)
    continents = options.continents and tables.read_continents(options.continents)
    facts = sources.official(options.data)
    counts = lists.build(
        *(facts, options.data, options.lists, continents),
        index_ids=options.index_ids,
        wanted=wanted,
    )
    hashes = {name: lists.find(options.lists, name).hash for name in counts}
    files.write_json(options.made, {"lists": hashes, "decided": decided})


def _there(options: Options, wanted: list[str], decided: dict[str, str]) -> bool:
    """Whether the lists are there; those that others built are taken as they are."""
    try:
        found = {name: lists.find(options.lists, name).hash for name in wanted}
    except FileNotFoundError:
        return False
    if not options.made.exists():
        return True
    made = files.read_json(options.made)
    same = found.items() <= made["lists"].items()  # else a build was cut short
    return same and made["decided"] == decided


def _decided(options: Options) -> dict[str, str]:
    """Hashes of the small files that decide the lists."""
    data = options.data
    small = sorted([*data.glob("*/*.csv"), *data.glob("train/country/*.json")])
    found = {path.relative_to(data).as_posix(): path for path in small}
    given = {"index ids": options.index_ids, "continents": options.continents}
    found |= {name: path for name, path in given.items() if path}
    return {name: files.sha256(path) for name, path in found.items()}


def _retrieval(
    options: Options, plan: Chain, scenes: Scenes, warning: str
) -> Iterator[str]:
    path = options.data / RETRIEVAL
    solution = tables.read_solution(path)
    answers = scenes.answers(plan)
    score = mean_ap.evaluate(*answers, solution)
    yield f"{score}{warning}"
    yield from (
        f"{line}{warning}"
        for line in definitions.show(definitions.evaluate(*answers, solution)).split(
            "\n"
        )
    )
    told = _protocol(options, plan, path, len(score.queries))
    yield f"measured with: {told}"


def _recognition(
    options: Options, plan: Chain, scenes: Scenes, predict: Predict, warning: str
) -> Iterator[str]:
    path = options.data / RECOGNITION
    score = gap.evaluate(predict(scenes.of(plan.models)), tables.read_recognition(path))
    yield f"{score}{warning}"
    accuracy = definitions.show_halves(*map(score.accuracy.get, ("Private", "Public")))
    yield f"{accuracy}  accuracy: correct / queries that show a landmark{warning}"
    told = _protocol(options, plan, path, len(score.queries), scenes.reference)
    yield f"measured with: {told}"


def _protocol(
    options: Options,
    plan: Chain,
    path: Path,
    asked: int,
    voters: Reference | None = None,
) -> protocol.Protocol:
    return protocol.describe(
        *(options.work / "features", plan, ASKED, options.index),
        *(protocol.file(path), asked),
        whole=INDEX_IMAGES,
        voters=voters,
    )

"""A recipe, a data folder and a work folder -> the steps of the pipeline."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kit.pipeline import Step
from kit.rerank.chain import NAMED
from kit.rerank.steps import build
from kit.training import recipes
from kit.training.job import MACHINE, Job, Stage, change

QUERY, INDEX = "query", "index"
# lists that hold validation's own images, and what stands in for them
HOLDOUTS = {"all": "all_holdout", "index_train": "index_train_holdout"}
VOTERS = "index_train"  # whose labelled images vote, or its stand-in
LISTS, TRAINED = "00_image_lists", "trained"
CLEANED = "full"  # list whose labels are cleaned
CLEANING = {
    "votes": 100,
    "inliers": 1000,
}  # by what; neighbours of an image in its graph


@dataclass(frozen=True)
class Run:
    """What a user says once for the whole pipeline."""

    recipe: str
    data: Path  # folder with the images
    work: Path  # everything is written under it
    layout: str = "gldv2"  # of `data`, see kit.data.sources
    table: str = ""  # the CSV of layout csv
    index_ids: str = ""  # file with the ids of a competition's smaller index
    clean: str = ""  # a file like train_clean.csv, instead of the data's own
    exclusions: str = ""  # file of images that nothing may train on
    weights: Path = Path("weights")  # folder of released ImageNet weights
    pretrained: str = "recipe"  # or other weights to start from, "" for random ones
    num_gpus: int = 1  # of each node
    workers: int = 2
    save_every: int = 50  # steps
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage
    holdout: bool = True  # train on nothing that an offline number is measured on
    machine: dict[str, Any] = field(default_factory=dict)  # of job.MACHINE
    # steps to tune, in their order, and chains of chain.NAMED; the recipe's if None
    rerank: tuple[str, ...] | None = None
    neighbours: int = 0  # of each index and reference image, kept in graphs; 0: none
    recognise: bool = False  # name landmarks, too
    cleaning: str = ""  # write a clean list, too, by one of CLEANING

    def __post_init__(self) -> None:
        for name, least in (
            ("num_gpus", 1),
            ("workers", 0),
            ("save_every", 1),
            ("neighbours", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, not at least {least}"
                )
        if self.cleaning and self.cleaning not in CLEANING:
            raise ValueError(
                f"cleaning: {self.cleaning!r} is not one of {', '.join(CLEANING)}"
            )
        for name in self.rerank or ():
            if name not in NAMED:
                build({"step": name})  # refuses a name that is not there
        if self.layout == "folders" and self.work.is_relative_to(self.data):
            raise ValueError(
                f"work: {self.work} lies in {self.data}, whose folders are classes; "
                "give a folder outside of it"
            )
        for name in self.machine:
            if name not in MACHINE:
                raise ValueError(
                    f"machine: {name!r} is not one of {', '.join(MACHINE)}"
                )

    @cached_property
    def stages(self) -> dict[str, tuple[Stage, dict[str, Any]]]:
        """The recipe's stages as they will be trained, with what was changed in each."""
        recipe = recipes.get(self.recipe)
        for name in self.overrides:
            recipe.stage(name)  # refuses a name that is not there
        return {stage.name: self._changed(stage) for stage in recipe.stages}

    def _changed(self, stage: Stage) -> tuple[Stage, dict[str, Any]]:
        changes = self.overrides.get(stage.name, {})
        if self.holdout and changes.get("images") in HOLDOUTS:
            images = changes["images"]
            raise ValueError(
                f"stage {stage.name}: list {images} holds validation's own images; "
                f"take {HOLDOUTS[images]}, or train on everything"
            )
        if self.holdout and "images" not in changes and stage.images in HOLDOUTS:
            changes = changes | {"images": HOLDOUTS[stage.images]}
        changed = change(stage, **changes)
        places = self.lists, self.data, self.runs
        net = recipes.get(self.recipe).net
        job = Job(changed, net, *places, self.workers, self.save_every, **self.machine)
        job.check_parts(self.num_gpus)
        return changed, changes

    @property
    def reranked(self) -> tuple[str, ...]:
        own = recipes.get(self.recipe).rerank
        return own if self.rerank is None else self.rerank

    @property
    def index(self) -> str:
        return "index_val" if self.index_ids else INDEX

    @property
    def voters(self) -> str:
        return HOLDOUTS[VOTERS] if self.holdout else VOTERS

    @property
    def answers(self) -> Path:
        return self.work / "answers" / self.recipe

    @property
    def folder(self) -> Path:
        """Executed notebooks and their markers; directly under `work`, as outputs must be."""
        return self.work / f"pipeline-{self.recipe.replace('/', '-')}"

    @property
    def calls(self) -> Path:
        """Where node 0 tells the other nodes what it launches."""
        return self.folder / "nodes"

    @property
    def lists(self) -> Path:
        return self.work / "lists"

    @property
    def runs(self) -> Path:
        return self.work / "runs" / self.recipe

    @property
    def features(self) -> Path:
        return self.work / "features" / self.recipe

    @property
    def graphs(self) -> Path:
        return self.work / "graph" / self.recipe

    @property
    def chain(self) -> Path:
        return self.answers / "chain.json"

    @property
    def gains(self) -> Path:
        return self.answers / "gains.csv"

    @property
    def submission(self) -> Path:
        return self.answers / "submission.csv"

    @property
    def cleaned(self) -> Path:
        """What 01 writes: train_clean.csv among others."""
        return self.work / "cleaning" / self.recipe

    @property
    def recogniser(self) -> Path:
        return self.answers / "recognition.json"

    @property
    def recognition_gains(self) -> Path:
        return self.answers / "recognition_gains.csv"

    @property
    def landmarks(self) -> Path:
        return self.answers / "landmarks.csv"

    @property
    def report(self) -> Path:
        return self.answers / "report.html"


def steps(run: Run, notebooks: Path, continents: Path) -> list[Step]:
    """Lists, every stage, features of all of them, tuning, submission; cleaning and recognition if asked.

    Without a holdout what measures is left out, and the untrained network's features, which
    only tuning needs: models that have seen validation's images allow no offline number.
    """
    models = list(run.stages)[::-1]
    shown, trained = (
        [QUERY, run.index],
        [_train(run, each, notebooks) for each in run.stages],
    )
    after = (LISTS, *(step.name for step in trained))
    kept = (run.neighbours, (run.index, run.voters))
    seen = _extract(run, TRAINED, models, [*shown, run.voters], after, notebooks, *kept)
    chain = [_lists(run, notebooks, continents), *trained]
    if run.cleaning:
        chain += _clean(run, models[0], after, notebooks)
    if not run.holdout:
        return [*chain, seen]
    bare = _extract(run, "untrained", [recipes.UNTRAINED], shown, (LISTS,), notebooks)
    return [
        *chain,
        bare,
        seen,
        *_answer(run, models, (bare.name, seen.name), notebooks),
    ]


def seconds(text: str) -> float:
    """8.5h, 30m, 90s or 90 -> seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hms]?)", text)
    value = float(found[1]) * {"h": 3600, "m": 60}.get(found[2], 1) if found else 0.0
    if not value:
        raise ValueError(f"{text!r} is no time to stop after; write 8.5h, 30m or 90s")
    return value


def _lists(run: Run, notebooks: Path, continents: Path) -> Step:
    trained_on = dict.fromkeys(stage.images for stage, _ in run.stages.values())
    wanted = [*trained_on, QUERY, run.index, run.voters]
    wanted += [CLEANED] * bool(run.cleaning)
    decided = {
        "data": str(run.data),
        "layout": run.layout,
        "table": run.table,
        "lists_folder": str(run.lists),
        "continents": str(continents),
        "index_ids": run.index_ids,
        "clean": run.clean,
        "exclusions": run.exclusions,
    }
    first = {"gld_v1_classes": recipes.get(run.recipe).gld_v1_classes}
    return Step(
        LISTS,
        notebooks / "00_image_lists.ipynb",
        decided | first | {"wanted": wanted + _truths(run)},
        outputs=(run.lists,),
        inputs=_inputs(run, continents),
        user_files=(run.data, run.weights, run.weights / run.pretrained),
        # recipes that want different ones of the same lists share them
        shared=decided | (first if (run.data / "gld_v1").is_dir() else {}),
    )


def _truths(run: Run) -> list[str]:
    """What the answers are measured by."""
    if not run.holdout:
        return []
    return ["solution", *(["recognition"] if run.recognise else [])]


def _inputs(run: Run, continents: Path) -> tuple[Path, ...]:
    """The small files that decide the lists: their content counts, not their path."""
    given = (run.table, run.index_ids, run.clean, run.exclusions)
    named = [continents, *(Path(name) for name in given if name)]
    tables = [*run.data.glob("*/*.csv"), *run.data.glob("train/country/*.json")]
    return tuple(named + (sorted(tables) if run.layout == "gldv2" else []))


def _places(run: Run) -> dict[str, Any]:
    return {
        "recipe": run.recipe,
        "data": str(run.data),
        "lists_folder": str(run.lists),
        "runs": str(run.runs),
        "weights": str(run.weights),
    }


def _machine(run: Run) -> dict[str, Any]:
    return {"num_gpus": run.num_gpus, "workers": run.workers}


def _train(run: Run, name: str, notebooks: Path) -> Step:
    stage, changes = run.stages[name]
    folder = run.runs / name
    return Step(
        f"02_train_{name}",
        notebooks / "02_train_stage.ipynb",
        _places(run)
        | {"stage": name, "overrides": changes, "pretrained": run.pretrained},
        (LISTS, *([f"02_train_{stage.init}"] if stage.init else [])),
        (folder, folder / "stage.json"),
        machine=_machine(run) | {"save_every": run.save_every, "machine": run.machine},
    )


def _extract(
    run: Run,
    name: str,
    models: list[str],
    images: list[str],
    after: tuple[str, ...],
    notebooks: Path,
    neighbours: int = 0,
    kept: Sequence[str] = (),  # lists whose neighbours are kept in graphs
) -> Step:
    kept = list(kept) if neighbours else []
    graphs = {
        "graphs_of": kept,
        "neighbours": neighbours,
        "graphs": str(run.graphs),
    }
    stores = [run.features / model / each for model in models for each in images]
    return Step(
        f"03_features_{name}",
        notebooks / "03_extract_features.ipynb",
        _places(run)
        | {"models": models, "images": images, "features": str(run.features)}
        | {"pretrained": run.pretrained}
        | (graphs if kept else {}),
        after,
        (*stores, *(run.graphs / model / each for model in models for each in kept)),
        machine=_machine(run),
    )


def _clean(run: Run, model: str, after: tuple[str, ...], notebooks: Path) -> list[Step]:
    """Features of the list with their graph, by the last stage, and what they say of its labels."""
    kept = CLEANING[run.cleaning], (CLEANED,)
    looked = _extract(run, CLEANED, [model], [CLEANED], after, notebooks, *kept)
    cleaned = Step(
        "01_clean_labels",
        notebooks / "01_clean_labels.ipynb",
        {
            "mode": run.cleaning,
            "images": CLEANED,
            "lists_folder": str(run.lists),
            "features": str(run.features / model),
            "graphs": str(run.graphs / model),
            "data": str(run.data),
            "out": str(run.cleaned),
        },
        (looked.name,),
        (run.cleaned / "train_clean.csv",),
        machine={"workers": run.workers},
    )
    return [looked, cleaned]


def _answer(
    run: Run, models: list[str], after: tuple[str, ...], notebooks: Path
) -> list[Step]:
    shared = {
        "lists_folder": str(run.lists),
        "features": str(run.features),
        "graphs": str(run.graphs),
        "index": run.index,
        "chain_path": str(run.chain),
        "gains_path": str(run.gains),
        "data": str(run.data),
    }
    tuned = Step(
        "04_tune_rerank",
        notebooks / "04_tune_rerank.ipynb",
        shared
        | {
            "models": models,
            "baseline": recipes.UNTRAINED,
            "steps": list(run.reranked),
        },
        after,
        (run.chain, run.gains),
        machine={"workers": run.workers},
    )
    submitted = Step(
        "05_submission",
        notebooks / "05_submission.ipynb",
        {
            "recipe": run.recipe,
            "work": str(run.work),
            "data": str(run.data),
            "index": run.index,
        },
        (tuned.name,),
        (run.submission,),
        machine={"workers": run.workers},
    )
    return [
        tuned,
        submitted,
        *([_recognise(run, models, after, notebooks)] if run.recognise else []),
    ]


def _recognise(
    run: Run, models: list[str], after: tuple[str, ...], notebooks: Path
) -> Step:
    return Step(
        "07_recognition",
        notebooks / "07_recognition.ipynb",
        {
            "models": models,
            "lists_folder": str(run.lists),
            "features": str(run.features),
            "data": str(run.data),
            "index": run.index,
            "reference": run.voters,
            "non_landmarks": run.index,
            "recogniser_path": str(run.recogniser),
            "submission_path": str(run.landmarks),
            "gains_path": str(run.recognition_gains),
        },
        after,
        (run.recogniser, run.landmarks, run.recognition_gains),
        machine={"workers": run.workers},
    )

"""A recipe, a data folder and a work folder -> the steps of the pipeline."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.pipeline import Step
from kit.training import recipes
from kit.training.stage import Stage, change

QUERY, INDEX = "query", "index"
HOLDOUT = "index_train_holdout"  # what votes for an offline number


@dataclass(frozen=True)
class Run:
    """What a user says once for the whole pipeline."""

    recipe: str
    data: Path  # folder with the images
    work: Path  # everything is written under it
    layout: str = "gldv2"  # of `data`, see kit.data.sources
    table: str = ""  # the CSV of layout csv
    index_ids: str = ""  # file with the ids of a competition's smaller index
    num_gpus: int = 1
    workers: int = 2
    save_every: int = 50  # steps
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage

    def __post_init__(self) -> None:
        for name, least in (("num_gpus", 1), ("workers", 0), ("save_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, not at least {least}"
                )

    @property
    def answers(self) -> Path:
        return self.work / "answers" / self.recipe

    @property
    def folder(self) -> Path:
        """Executed notebooks and their markers."""
        return self.work / f"pipeline-{self.recipe}"

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
    def chain(self) -> Path:
        return self.answers / "chain.json"

    @property
    def gains(self) -> Path:
        return self.answers / "gains.csv"

    @property
    def submission(self) -> Path:
        return self.answers / "submission.csv"

    @property
    def report(self) -> Path:
        return self.answers / "report.html"


def steps(run: Run, notebooks: Path, continents: Path) -> list[Step]:
    """Lists, every stage, features of all of them, tuning, submission."""
    recipe = recipes.get(run.recipe)
    for name, fields in run.overrides.items():  # refused here, before anything runs
        change(recipe.stage(name), **fields)
    index = "index_val" if run.index_ids else INDEX
    trained_on = dict.fromkeys(stage.images for stage in recipe.stages)
    wanted = [*trained_on, QUERY, index, HOLDOUT, "solution"]
    lists = Step(
        "00_image_lists",
        notebooks / "00_image_lists.ipynb",
        {
            "data": str(run.data),
            "layout": run.layout,
            "table": run.table,
            "lists_folder": str(run.lists),
            "continents": str(continents),
            "index_ids": run.index_ids,
            "wanted": wanted,
        },
        outputs=(run.lists,),
        inputs=_inputs(run, continents),
    )
    machine = {
        "recipe": run.recipe,
        "data": str(run.data),
        "lists_folder": str(run.lists),
        "runs": str(run.runs),
        "num_gpus": run.num_gpus,
        "workers": run.workers,
    }
    trained = [_train(run, stage, notebooks, machine) for stage in recipe.stages]
    models = [stage.name for stage in reversed(recipe.stages)]
    shown = [QUERY, index]
    extracted = [
        _extract(
            run, "untrained", [recipes.UNTRAINED], shown, [lists], notebooks, machine
        ),
        _extract(
            run,
            "trained",
            models,
            [*shown, HOLDOUT],
            [lists, *trained],
            notebooks,
            machine,
        ),
    ]
    answer = {
        "lists_folder": str(run.lists),
        "features": str(run.features),
        "index": index,
        "chain_path": str(run.chain),
        "gains_path": str(run.gains),
    }
    tuned = Step(
        "04_tune_rerank",
        notebooks / "04_tune_rerank.ipynb",
        answer | {"models": models, "baseline": recipes.UNTRAINED},
        tuple(step.name for step in extracted),
        (run.chain, run.gains),
    )
    submitted = Step(
        "05_submission",
        notebooks / "05_submission.ipynb",
        answer
        | {
            "out": str(run.submission),
            "report_path": str(run.report),
            "runs": str(run.runs),
            "data": str(run.data),
        },
        (tuned.name,),
        (run.submission,),
    )
    return [lists, *trained, *extracted, tuned, submitted]


def _inputs(run: Run, continents: Path) -> tuple[Path, ...]:
    """The small files that decide the lists: their content counts, not their path."""
    named = [continents, *(Path(name) for name in (run.table, run.index_ids) if name)]
    tables = [*run.data.glob("*/*.csv"), *run.data.glob("train/country/*.json")]
    return tuple(named + (sorted(tables) if run.layout == "gldv2" else []))


def _train(run: Run, stage: Stage, notebooks: Path, machine: dict[str, Any]) -> Step:
    folder = run.runs / stage.name
    return Step(
        f"02_train_{stage.name}",
        notebooks / "02_train_stage.ipynb",
        machine
        | {
            "stage": stage.name,
            "save_every": run.save_every,
            "overrides": run.overrides.get(stage.name, {}),
        },
        ("00_image_lists", *([f"02_train_{stage.init}"] if stage.init else [])),
        (folder, folder / "stage.json"),
    )


def _extract(
    run: Run,
    name: str,
    models: list[str],
    images: list[str],
    after: list[Step],
    notebooks: Path,
    machine: dict[str, Any],
) -> Step:
    return Step(
        f"03_features_{name}",
        notebooks / "03_extract_features.ipynb",
        machine | {"models": models, "images": images, "features": str(run.features)},
        tuple(step.name for step in after),
        tuple(run.features / model / each for model in models for each in images),
    )

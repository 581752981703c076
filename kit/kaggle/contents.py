"""A work folder -> what of it a submission needs: chain, weights, references, and how they look.

Recognition takes recognition.json instead of the chain, and perhaps images without a landmark.

Whatever is missing is refused by the step of scripts/run_pipeline.py that makes it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from kit import config, files
from kit.data import lists
from kit.data.inputs import InputSpec
from kit.features import store
from kit.features.store import Features
from kit.features.views import OWN, Views
from kit.kaggle import answering
from kit.kaggle.answering import RECOGNITION, RETRIEVAL
from kit.models import net as nets
from kit.plan import HOLDOUTS, INDEX, LISTS, QUERY, TRAINED, VOTERS, Run
from kit.rerank import chain, recogniser
from kit.rerank.chain import Chain
from kit.rerank.recogniser import Recogniser
from kit.training import recipes

# of datasets
MODELS, REFERENCE, KNOWN, DISTRACTORS = "models", "reference", "known", "distractors"
STORE = ("ids.npy", "vectors.npy", "done.npy", "manifest.json")
GRAPH = ("rows.npy", "scores.npy", "manifest.json")
VIEWS = tuple(each.name for each in fields(Views))


@dataclass(frozen=True)
class Contents:
    """What travels, and what the notebook must know of it."""

    run: Run
    models: tuple[str, ...]
    reference: str  # list that votes; "" where no step asks
    known: str  # list of index images whose features travel, "" for none
    views: Views  # how all of it was looked at
    task: str = RETRIEVAL
    distractors: str = ""  # list of images without a landmark, "" for none

    @property
    def travels(self) -> str:
        """What the list of known images is called in the notebook's work folder.

        There the index is another list, of what the competition mounts.
        """
        return self.known if self.known in ("", self.reference) else KNOWN

    def datasets(self) -> dict[str, dict[Path, Path]]:
        """Each dataset by its folder's name, in the order they are attached.

        Files by their path in the notebook's work folder.
        """
        run, reference = self.run, self.reference
        weights = [
            run.runs / model / name
            for model in self.models
            for name in ("model.safetensors", "model.json")
        ]
        plan = run.recogniser if self.task == RECOGNITION else run.chain
        found = {MODELS: [*weights, plan]}
        named = [name for name in (reference, self.distractors) if name]
        if named:
            found["lists"] = [
                run.lists / f"{name}.{end}" for name in named for end in ("csv", "json")
            ]
        there = {
            folder: {path.relative_to(run.work): path for path in paths}
            for folder, paths in found.items()
        }
        stores = {REFERENCE: (reference, reference)}
        if self.travels == KNOWN:  # else the references' features are those
            stores[KNOWN] = (self.known, KNOWN)
        if self.distractors:
            stores[DISTRACTORS] = (self.distractors, self.distractors)
        for kind, (images, called) in stores.items():
            for model in self.models if images else ():
                folder = f"{kind}-{slug(model)}"
                if folder in there:
                    raise ValueError(
                        f"two models make the dataset {folder}; rename one"
                    )
                place = run.features / model
                there[folder] = {
                    (place / called / name).relative_to(run.work): place / images / name
                    for name in STORE
                }
                graph = run.graphs / model / images
                if kind == REFERENCE and (graph / GRAPH[-1]).exists():
                    there[folder] |= {
                        (graph / name).relative_to(run.work): graph / name
                        for name in GRAPH
                    }
        return there


def slug(text: str) -> str:
    """Small letters, digits and single hyphens, as Kaggle has them in addresses."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def find(
    run: Run, reference: str = "", known: str = "", task: str = RETRIEVAL
) -> Contents:
    """What a submission by the run's chain, or its recogniser, needs.

    reference: list that votes, where a step asks; by default all references there are.
    known: list of index images that need not be looked at again. task: of answering.TASKS.
    """
    recipes.get(run.recipe)  # refuses a name that is not there
    answering.task(task)
    plan = _plan(run, task, known)
    models = tuple(plan.models)
    distractors = _distractors(plan)
    abouts = {model: _weights(run, model) for model in models}
    if reference in (QUERY, INDEX):
        raise ValueError(
            f"list {reference} is what the competition shows; name another that votes"
        )
    if not reference and (task == RECOGNITION or asks_labels(plan)):
        reference = _voters(run, models)
    stores = {
        (model, images): _features(run, model, images, about["hash"])
        for images in dict.fromkeys(filter(None, (reference, known, distractors)))
        or (QUERY,)
        for model, about in abouts.items()
    }
    for name in filter(None, (reference, distractors)):
        path = run.lists / f"{name}.csv"
        if not path.exists():
            raise _missing(path, LISTS)
        images = lists.load(run.lists, name, ("id",))
        for model in models:
            store.expect(stores[model, name], list_hash=images.hash)
    specs = {
        model: config.from_dict(nets.NetConfig, about["config"]).input
        for model, about in abouts.items()
    }
    apart = "" if distractors == reference else distractors  # which travels once
    views = _views(stores, specs)
    return Contents(run, models, reference, known, views, task, apart)


def _plan(run: Run, task: str, known: str) -> Chain | Recogniser:
    """What was decided on at home."""
    if task != RECOGNITION:
        if not run.chain.exists():
            raise _missing(run.chain, "04_tune_rerank")
        return chain.load(run.chain)
    if known:
        raise ValueError(f"recognition searches no index: list {known} need not travel")
    return recogniser.load(run.recogniser)


def _distractors(plan: Chain | Recogniser) -> str:
    """The list of images without a landmark that a recogniser reads, "" for none."""
    step = plan.step("non_landmark") if isinstance(plan, Recogniser) else None
    if step is not None and step.images == QUERY:
        raise ValueError(
            f"step non_landmark reads list {QUERY}, which is what the competition shows; "
            "name another list in 07_recognition"
        )
    return "" if step is None else step.images


def asks_labels(plan: Chain) -> bool:
    """Whether a step lets references vote or learns from their labels."""
    return any(
        hasattr(step, "votes") or getattr(step, "supervised", False)
        for step in plan.steps
    )


def _missing(path: Path, step: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"no {path}; step {step} of scripts/run_pipeline.py makes it"
    )


def _maker(run: Run, model: str) -> str:
    """The step that makes a model's weights."""
    if model == recipes.UNTRAINED:
        return "03_features_untrained"
    if model in run.stages:
        return f"02_train_{model}"
    raise FileNotFoundError(
        f"no {run.runs / model}; model {model} is no stage of recipe "
        f"{run.recipe}, which has {', '.join(run.stages)}"
    )


def _weights(run: Run, model: str) -> dict[str, Any]:
    """What model.json says of weights that are whole."""
    folder = run.runs / model
    for name in ("model.safetensors", "model.json"):
        if not (folder / name).is_file():
            raise _missing(folder / name, _maker(run, model))
    about = nets.describe(folder)
    if files.sha256(folder / "model.safetensors") != about["hash"]:
        raise ValueError(
            f"{folder / 'model.safetensors'} is not the file that model.json describes; "
            f"run step {_maker(run, model)} of scripts/run_pipeline.py again"
        )
    return about


def _voters(run: Run, models: Sequence[str]) -> str:
    """The largest list that votes of which every model has features."""
    choices = (VOTERS, HOLDOUTS[VOTERS])
    for images in choices:
        if all((run.features / it / images / STORE[-1]).exists() for it in models):
            return images
    raise _missing(
        run.features / models[0] / " or ".join(choices), f"03_features_{TRAINED}"
    )


def _features(run: Run, model: str, images: str, model_hash: str) -> Features:
    folder = run.features / model / images
    if not (folder / STORE[-1]).exists():
        raise _missing(folder, f"03_features_{TRAINED}")
    return store.expect(store.load(folder), model_hash=model_hash)


def _views(
    stores: Mapping[tuple[str, str], Features], specs: Mapping[str, InputSpec]
) -> Views:
    """The one way in which all images were looked at.

    stores: by model and list. A store says what came of it for its model; whether a size was
    asked for or is the model's own is found by trying.
    """
    facts = {key: _facts(*key, features) for key, features in stores.items()}
    # a template is named, for the notebook must know that it needs the images' sizes
    own = () if any(spec.template for spec in specs.values()) else (OWN,)
    tried = [
        Views(
            **said
            | {"size": size, "template": template, "scales": tuple(said["scales"])}
        )
        for said in facts.values()
        for size, template in product((0, said["size"]), (*own, said["template"]))
    ]

    def others(views: Views) -> dict[tuple[str, str], list[str]]:
        """What is different about the stores that are not of these views."""
        made = {key: views.facts(specs[key[0]]) for key in facts}
        found = {
            key: [name for name in VIEWS if made[key][name] != each[name]]
            for key, each in facts.items()
        }
        return {key: names for key, names in found.items() if names}

    best = min(tried, key=lambda views: len(others(views)))
    for key, names in others(best).items():
        raise ValueError(
            f"features of {' '.join(key)} were made with other {', '.join(names)} than the "
            "rest; extract all of them in one way"
        )
    return best


def _facts(model: str, images: str, features: Features) -> dict[str, Any]:
    missing = [name for name in VIEWS if name not in features.manifest]
    if missing:
        raise ValueError(
            f"features of {model} {images} do not say their {missing[0]}; extract them again"
        )
    return {name: features.manifest[name] for name in VIEWS}

"""What travels of a work folder -> a build folder, as kit.kaggle.manifest describes it.

build/kit               the kit as a wheel
build/models            weights and the chain
build/lists             the list that votes
build/reference-<model> the features of its images, a dataset a model
build/known-<model>     features of index images that are not looked at again, if asked for
build/distractors-<model>  features of images without a landmark, where recognition reads them
build/wheels            what else Kaggle's image lacks, if asked for
build/model             the networks as a Kaggle model, a folder each
build/submission        the kernel

Weights and features are hard links where the disk allows: they take no second space.
"""

import ast
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import config, files, pipeline
from kit.kaggle import answering, card, check, flat, manifest, wheels
from kit.kaggle.answering import RETRIEVAL
from kit.kaggle.contents import DISTRACTORS, KNOWN, REFERENCE, Contents, slug
from kit.kaggle.runtime import PUBLIC_QUERIES

INJECTED = "injected-parameters"  # papermill's tag, too: it replaces such a cell
USER = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class Order:
    """What a user says about a build."""

    user: str  # on Kaggle, as in addresses
    name: str  # what the datasets' and the kernel's names begin with
    competition: str = "landmark-retrieval-2021"  # slug
    machine_shape: str = "NvidiaTeslaT4"
    hours: float = 9.0  # of a session
    public_queries: int = PUBLIC_QUERIES  # of a commit; others are a hidden rerun's
    wheels: tuple[str, ...] = ()  # packages that Kaggle's image lacks

    def __post_init__(self) -> None:
        if not USER.fullmatch(self.user):
            raise ValueError(
                f"user {self.user!r} is not a name as in Kaggle's addresses: small letters, "
                "digits, hyphens"
            )
        for name in (self.name, self.competition):
            if not name or slug(name) != name:
                raise ValueError(
                    f"{name!r} is not a slug: small letters, digits, single hyphens"
                )
        if self.machine_shape not in check.MACHINES:
            raise ValueError(
                f"machine shape {self.machine_shape!r} is not one of "
                f"{', '.join(check.MACHINES)}"
            )
        if not 0 < self.hours < math.inf:
            raise ValueError(f"{self.hours} hours are no time to work")


def build(
    out: Path, contents: Contents, order: Order, checkout: Path, notebook: Path
) -> Path:
    """Writes the build and checks it; an earlier build there is replaced at the end.

    One build of `out` at a time: a hidden folder beside it is locked, and holds what is unfinished.
    checkout: folder of the kit's sources and the metadata templates.
    """
    answering.check_competition(order.competition, contents.task)
    _refuse_others(out)
    templates = checkout / "datasets_meta" / "kaggle"
    shipped = {
        folder: {flat.name(path): source for path, source in paths.items()}
        for folder, paths in contents.datasets().items()
    }
    folders = ["kit", *shipped, *(["wheels"] if order.wheels else [])]
    about = {folder: _dataset(templates, folder, order) for folder in folders}
    refs = [each["id"] for each in about.values()]
    kernel = _kernel(templates, order, notebook.name, refs)
    source = prepared(notebook, parameters(contents, order, refs))
    place = out.with_name(f".{out.name}.building")
    part, old = place / "part", place / "old"
    with files.lock(place):
        _settle(old, out)  # of a build that was killed
        _refuse_others(out)
        shutil.rmtree(part, ignore_errors=True)
        try:
            for folder, metadata in about.items():
                files.write_json(part / folder / manifest.DATASET, metadata)
            for folder, paths in shipped.items():
                for name, path in paths.items():
                    flat.carry(path, part / folder / name)
            wheels.make(checkout, part / "kit")
            if order.wheels:
                wheels.download(order.wheels, part / "wheels")
            files.write_json(part / manifest.SUBMISSION / manifest.KERNEL, kernel)
            files.write_json(part / manifest.SUBMISSION / notebook.name, source)
            run = contents.run
            card.folder(
                run.runs,
                run.recipe,
                contents.models,
                part / manifest.MODEL,
                user=order.user,
                name=f"{order.name}-embeddings",
                gains=run.gains,
            )
            manifest.write(part, order.competition)
            check.refuse(part)
            if out.exists():
                out.rename(old)
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            _settle(old, out)
    return out


def parameters(contents: Contents, order: Order, refs: Sequence[str]) -> dict[str, Any]:
    """What the submission notebook must be told; refs: owner/slug of what travels."""
    views = config.to_dict(contents.views)
    other = {} if contents.task == RETRIEVAL else {"task": contents.task}
    return {
        "recipe": contents.run.recipe,
        "reference": contents.reference,
        "competition": order.competition,
        "datasets": list(refs),
        "hours": order.hours,
        "public_queries": order.public_queries,
        "known": contents.travels,
        **other,
        **views,
        "scales": list(contents.views.scales),
    }


def told(notebook: Path) -> dict[str, Any]:
    """The parameters that a build injected into a notebook."""
    for cell in files.read_json(notebook)["cells"]:
        if INJECTED in cell["metadata"].get("tags", []):
            lines = ast.parse("".join(cell["source"])).body
            return {it.targets[0].id: ast.literal_eval(it.value) for it in lines}
    return {}


def prepared(notebook: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook with parameters injected as papermill does it; without any results.

    Refuses a parameter that the notebook does not have.
    """
    step = pipeline.Step(notebook.stem, notebook, dict(parameters))
    pipeline.check_parameters(step)
    content = files.read_json(notebook)
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    injected = {
        "cell_type": "code",
        "id": INJECTED,
        "metadata": {"tags": [INJECTED]},
        "source": "\n".join(["# Parameters", *lines]),
    }
    cells = []
    for cell in content["cells"]:
        tags = cell["metadata"].get("tags", [])
        if INJECTED not in tags:
            cells.append(cell)
        if "parameters" in tags:
            cells.append(injected)
    for cell in cells:
        cell["metadata"].pop("papermill", None)
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
    content["metadata"].pop("papermill", None)
    return content | {"cells": cells}


def _dataset(templates: Path, folder: str, order: Order) -> dict[str, Any]:
    """dataset-metadata.json of a folder of the build."""
    kind, _, model = folder.partition("-")
    if kind not in (REFERENCE, KNOWN, DISTRACTORS):
        kind, model = folder, ""
    values = {"user": order.user, "name": order.name, "model": model}
    metadata = _rendered(templates / kind / manifest.DATASET, values)
    title = metadata["title"]
    if len(title) not in check.SLUG:
        raise ValueError(
            f"{folder}: title {title!r} is {len(title)} letters long, and Kaggle takes "
            f"{check.SLUG[0]} to {check.SLUG[-1]}; another --name changes it"
        )
    return metadata


def _kernel(
    templates: Path, order: Order, notebook: str, refs: Sequence[str]
) -> dict[str, Any]:
    values = {
        "user": order.user,
        "name": order.name,
        "competition": order.competition,
        "machine_shape": order.machine_shape,
        "notebook": notebook,
    }
    path = templates / manifest.SUBMISSION / manifest.KERNEL
    return _rendered(path, values) | {"dataset_sources": list(refs)}


def _rendered(template: Path, values: Mapping[str, str]) -> dict[str, Any]:
    """A template's JSON with every {word} in its texts filled in."""

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\{(\w+)\}", lambda found: value_of(found[1]), value)
        if isinstance(value, list):
            return [filled(each) for each in value]
        if isinstance(value, dict):
            return {name: filled(each) for name, each in value.items()}
        return value

    def value_of(word: str) -> str:
        if word not in values:
            raise ValueError(
                f"{template}: unknown placeholder {{{word}}}; known: {', '.join(values)}"
            )
        return values[word]

    return filled(files.read_json(template))


def _refuse_others(out: Path) -> None:
    """What is at `out` is nothing, or a build that can be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        manifest.read(out)
    except (OSError, ValueError):
        raise FileExistsError(
            f"{out} is there and is no build; name another folder"
        ) from None


def _settle(old: Path, out: Path) -> None:
    """The earlier build is gone when there is another, and back when there is none."""
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(out)

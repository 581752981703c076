"""A build and photos -> an input folder as Kaggle would fill it, made of links.

A hidden rerun looks at other images than the public ones: here at half of the queries and half
of the index.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kit import files
from kit.kaggle import manifest
from kit.kaggle.runtime import Mode

LAYOUTS = ("short", "long", "mixed")
QUERY, INDEX, TRAIN = "test", "index", "train"  # folders of a competition
SAMPLE = "sample_submission.csv"


def images(data: Path, folder: str, mode: Mode) -> list[Path]:
    """The photos of a run, by id; a rerun has half of them, by a hash of the id, but all of train."""
    found = sorted((data / folder).glob("?/?/?/*.jpg"), key=lambda path: path.stem)
    if mode is not Mode.RERUN or folder == TRAIN:
        return found
    by_hash = sorted(found, key=lambda path: files.fingerprint(path.stem))
    return sorted(by_hash[: (len(found) + 1) // 2], key=lambda path: path.stem)


def fill(
    inputs: Path,
    build: Path,
    kernel: Mapping[str, Any],
    photos: Mapping[str, list[Path]],
    layout: str,
    columns: tuple[str, str] = ("id", "images"),
) -> None:
    """Links all that the kernel's metadata names where Kaggle would have it.

    Layout short is <slug>; long is competitions/<slug> and datasets/<owner>/<slug>; mixed
    takes turns. photos: of each folder of the competition; columns: of its sample.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    folders = {
        files.read_json(folder / manifest.DATASET)["id"]: folder
        for folder in manifest.datasets(build)
    }
    for number, (kind, name) in enumerate(_sources(kernel)):
        long = layout == "long" or (layout == "mixed" and number % 2 == 0)
        slug = name.rpartition("/")[2]
        place = inputs.joinpath(f"{kind}s", name) if long else inputs / slug
        if place.exists():
            raise ValueError(f"{name}: another source is mounted at {place.name}")
        place.mkdir(parents=True)
        if kind == "competition":
            _show(photos, place, columns)
        elif name not in folders:
            there = ", ".join(folders) or "none"
            raise ValueError(f"dataset {name} is not in {build}; there are {there}")
        else:
            for path in folders[name].iterdir():
                if path.name != manifest.DATASET:  # which the client does not send
                    (place / path.name).symlink_to(path.resolve())


def _sources(kernel: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and name of what is to be mounted; a version is not in a path."""
    for kind in ("kernel", "model"):
        if named := kernel.get(f"{kind}_sources"):
            raise ValueError(f"{kind} {named[0]} is not in the build: not rehearsed")
    if len(kernel["competition_sources"]) != 1:
        raise ValueError(f"{manifest.KERNEL} must name one competition")
    yield "competition", kernel["competition_sources"][0]
    for name in kernel["dataset_sources"]:
        yield "dataset", "/".join(name.split("/")[:2])


def _show(
    photos: Mapping[str, list[Path]], place: Path, columns: tuple[str, str]
) -> None:
    """The competition's folder: links to photos, and a sample with one answer a query.

    Without an index an answer is a landmark, with a score.
    """
    for folder, paths in photos.items():
        (place / folder).mkdir()
        for path in paths:
            own = place.joinpath(folder, *path.parts[-4:])
            own.parent.mkdir(parents=True, exist_ok=True)
            own.symlink_to(path.resolve())
    some = "1 0.1"
    if INDEX in photos:
        some = photos[INDEX][0].stem if photos[INDEX] else ""
    lines = [",".join(columns), *(f"{path.stem},{some}" for path in photos[QUERY])]
    files.write_text(place / SAMPLE, "\n".join(lines) + "\n")

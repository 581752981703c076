"""Verify a whole work folder: `python -m kit.check WORK`.

Reads every file that a manifest or a step's marker has a checksum of. Names each one that is not
what was written, with the step that makes it again; exits with 1 if there is any.
"""

import argparse
import os
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from kit import checksums

MARKER = ".done.json"
# where what is in a work folder comes from, if no step's marker tells
ANSWERS = {
    "chain.json": "04_tune_rerank",
    "gains.csv": "04_tune_rerank",
    "submission.csv": "05_submission",
}
# files that must have a seal, by the first folder of their path
SEALED = {
    "lists": ("*.json",),
    "runs": ("model.json", "stage.json"),
    "features": ("manifest.json", "screen.json"),
    "graph": ("manifest.json",),
    "cleaning": ("manifest.json", "train_clean.json"),
    "hashes": ("manifest.json",),
}
NAMED = ("tars.json", "shards.json")  # wherever they lie; what describes a CSV, too
SKIPPED = ("tensorboard",)


@dataclass
class Report:
    """What was found in a work folder."""

    sizes: dict[Path, int] = field(default_factory=dict)  # bytes of each file read
    unfinished: list[Path] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)  # by file: what and repair


def check_folder(work: Path) -> Report:
    """Read every file with a checksum in `work`, and compare."""
    report = Report()
    paths = sorted(_files_in(work))
    markers = [path for path in paths if path.name.endswith(MARKER)]
    steps = _steps_by_file(work, markers)
    for path in markers:
        _check_marker(work, path, steps, report)
    for path in paths:
        if path.suffix == ".json" and path not in markers:
            _check_manifest(work, path, steps, report)
        if path.name == "state.pt" and path.parent.name == "resume":
            _check_state(work, path, steps, report)
        first = path.relative_to(work).parts[0]
        if first == "lists" and path.suffix == ".csv":
            beside = path.with_suffix(".json")
            if not beside.exists():
                _tell(work, beside, "missing", steps, report)
    return report


def find_step(work: Path, path: Path, steps: dict[Path, str]) -> str:
    """What makes a file of the work folder again: a command, or an option of run_pipeline.py."""
    parts = path.relative_to(work).parts
    if path.stem == "screen":
        return f"python -m kit.features.screen {path.parent}"
    if path.parent.name == "tar_index":
        return f"python -m kit.data.tars {path.parent.parent}"
    if path.suffix == ".tar" or path.name == "shards.json":
        return (
            f"python -m kit.data.shards, into an empty folder instead of {path.parent}"
        )
    if parts[0] == "hashes" or path.stem == "exclusions":
        return "python -m kit.answers.audit"
    return f"--force {steps.get(path) or _step_by_place(parts)}"


def _step_by_place(parts: Sequence[str]) -> str:
    first, name = parts[0], parts[-1]
    if first.startswith("pipeline-"):
        return name.partition(".")[0]
    if first == "answers":
        return ANSWERS.get(name, "07_recognition")
    if first == "features" and "local" in parts:
        return "04_tune_rerank"
    if first in ("features", "graph", "runs") and "untrained" in parts:
        return "03_features_untrained"
    if first in ("features", "graph"):
        return "03_features_full" if "full" in parts else "03_features_trained"
    if first == "runs":
        at = -3 if "resume" in parts else -2
        return f"02_train_{parts[at]}"
    places = {"cleaning": "01_clean_labels", "tune": "08_tune_training"}
    return places.get(first, "00_image_lists")


def _files_in(work: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(work):
        folders[:] = [
            name for name in folders if name[0] != "." and name not in SKIPPED
        ]
        yield from (Path(place, name) for name in names if name[0] != ".")


def _steps_by_file(work: Path, markers: Sequence[Path]) -> dict[Path, str]:
    found = {}
    for path in markers:
        about = checksums.find_manifest(path)
        for name in about.get("outputs", {}):
            found[work / name] = path.name.removesuffix(MARKER)
    return found


def _check_marker(
    work: Path, path: Path, steps: dict[Path, str], report: Report
) -> None:
    about = _read(work, path, steps, report)
    for name, (*_, checksum) in (
        about.get("outputs", {}) | about.get("notebook", {})
    ).items():
        _compare(work, work / name, checksum, steps, report)


def _check_manifest(
    work: Path, path: Path, steps: dict[Path, str], report: Report
) -> None:
    """A JSON file that may be one."""
    first = path.relative_to(work).parts[0]
    must = any(PurePath(path.name).match(form) for form in SEALED.get(first, ()))
    must = must or path.name in NAMED or path.with_suffix(".csv").exists()
    if not must and f'"{checksums.SEAL}"'.encode() not in _tail(path):
        return
    about = _read(work, path, steps, report)
    if not about:
        return
    if about.get("complete") is False:
        report.unfinished.append(path)
        return
    if checksums.CHECKSUMS not in about:
        _tell(work, path, "has no checksums", steps, report)
    for name, checksum in about.get(checksums.CHECKSUMS, {}).items():
        _compare(work, path.parent / name, checksum, steps, report)
    arrays = {path.parent / name for name in ("ids.npy", "vectors.npy")}
    there = all(each.is_file() for each in arrays)
    if "unreadable" in about and there and not arrays & report.problems.keys():
        _check_zeros(work, path, about, steps, report)


def _check_zeros(
    work: Path, path: Path, about: dict[str, Any], steps: dict[Path, str], to: Report
) -> None:
    """Rows of zeros are exactly the images that could not be read."""
    vectors, ids = (
        checksums.open_array(path.parent / name, "")
        for name in ("vectors.npy", "ids.npy")
    )
    starts = range(0, len(vectors), 16_384)
    zero = [~vectors[start : start + 16_384].any(axis=1) for start in starts]
    lost = ids[np.concatenate([np.zeros(0, bool), *zero])].tolist()
    if lost != about["unreadable"]:
        what = (
            f"{len(lost)} rows of zeros, {len(about['unreadable'])} unreadable images"
        )
        _tell(work, path.parent / "vectors.npy", what, steps, to)


def _check_state(
    work: Path, path: Path, steps: dict[Path, str], report: Report
) -> None:
    """Of an unfinished stage: an archive with checksums of its own."""
    report.sizes[path] = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        damaged = str(error)
    if damaged:
        _tell(work, path, f"damaged ({damaged})", steps, report)


def _read(
    work: Path, path: Path, steps: dict[Path, str], report: Report
) -> dict[str, Any]:
    report.sizes[path] = path.stat().st_size
    try:
        return checksums.read_manifest(path, "")
    except checksums.Damaged:
        _tell(work, path, "damaged, changed by hand, or without a seal", steps, report)
        return {}


def _compare(
    work: Path, path: Path, checksum: str, steps: dict[Path, str], report: Report
) -> None:
    if path in report.problems:
        return
    if not path.is_file():
        _tell(work, path, "missing", steps, report)
        return
    report.sizes[path] = path.stat().st_size
    if checksums.compute_checksum(path) != checksum:
        _tell(work, path, "damaged, or of something else", steps, report)


def _tell(
    work: Path, path: Path, what: str, steps: dict[Path, str], report: Report
) -> None:
    repair = find_step(work, path, steps)
    report.problems.setdefault(path, f"{what}; make it again: {repair}")


def _tail(path: Path) -> bytes:
    """The end of a file, where a seal stands."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 256))
        return file.read()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Verify every file of a work folder by its checksum."
    )
    parser.add_argument("work", type=Path, help="as the pipeline's --work")
    work = parser.parse_args(arguments).work.resolve()
    if not work.is_dir():
        sys.exit(f"{work}: no such folder")
    began = time.monotonic()
    report = check_folder(work)
    if not report.sizes:
        sys.exit(f"{work}: nothing in it has a checksum; give the pipeline's --work")
    for path, told in sorted(report.problems.items()):
        print(f"{path.relative_to(work)}: {told}")
    seconds = time.monotonic() - began
    size = sum(report.sizes.values()) / 1e6
    counts = f"{len(report.sizes)} files, {size:.1f} MB, {seconds:.1f} s"
    if report.unfinished:
        counts += f"; {len(report.unfinished)} unfinished"
    if report.problems:
        sys.exit(f"{work}: {len(report.problems)} bad of {counts}")
    print(f"{work}: good, {counts}")


if __name__ == "__main__":
    main()

"""The build folder: what is published, with the size and hash of every part.

build/
  manifest.json            {"competition": slug, "parts": [{"path", "size", "sha256"}, ...]}
  <any name>/              one Kaggle dataset: a flat folder of files, and
    dataset-metadata.json    its id, title and licence, which Kaggle's client reads
    parts.json               {"parts": [...]} of this folder; it travels in the dataset
  model/                   one Kaggle model, as kit.kaggle.card writes it: a folder a variation,
    <variation>/parts.json   with its parts
  submission/              the kernel: kernel-metadata.json and its notebook

Paths in a manifest are relative to its own folder. Kaggle lists names and sizes but no hashes,
so `parts.json` is how a later publish learns whether a dataset is already there. A version of a
dataset replaces all its files and none is carried over: what changes seldom is its own dataset.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import files
from kit.text import in_a_line

MANIFEST, PARTS = "manifest.json", "parts.json"
DATASET, KERNEL = "dataset-metadata.json", "kernel-metadata.json"
MODEL_METADATA, VARIATION = "model-metadata.json", "model-instance-metadata.json"
HASH = re.compile(r"[0-9a-f]{64}")
LETTERS = (
    200  # bytes of a file's name: disks take 255, and a part of a download has more
)
SUBMISSION, MODEL = "submission", "model"


@dataclass(frozen=True)
class Part:
    path: str  # with slashes, relative to the manifest's folder
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    competition: str  # slug, such as landmark-retrieval-2021
    parts: tuple[Part, ...]  # every file of the build but the manifest


def write(build: Path, competition: str) -> Path:
    """Writes parts.json of each dataset and variation, then manifest.json; a build's last step."""
    own = (PARTS, DATASET, VARIATION)
    for folder in (*datasets(build), *variations(build)):
        kept = (path for path in folder.iterdir() if path.name not in own)
        _write_parts(folder, kept, folder / PARTS, {})
    everything = (path for path in build.rglob("*") if path != build / MANIFEST)
    head = {"competition": competition}
    return _write_parts(build, everything, build / MANIFEST, head)


def read(build: Path) -> Manifest:
    value = _read(build / MANIFEST)
    if not value.get("competition"):
        raise ValueError(f"{build / MANIFEST}: names no competition")
    return Manifest(str(value["competition"]), _parts(value, build / MANIFEST))


def read_parts(path: Path) -> tuple[Part, ...]:
    """The parts that a dataset's parts.json lists; not itself, nor the metadata."""
    return _parts(_read(path), path)


def find_fault(name: Any) -> str:
    """Why a name from elsewhere cannot be a file inside a folder; "" where it can."""
    if not isinstance(name, str):
        return "is not text"
    if not name.isprintable():
        return "holds a letter that cannot be shown"
    pieces = name.split("/")
    if any(piece in ("", ".", "..") for piece in pieces):
        return "is empty, absolute, or leads elsewhere"
    if max(len(piece.encode()) for piece in pieces) > LETTERS:
        return f"is longer than {LETTERS} bytes"
    return ""


def datasets(build: Path) -> list[Path]:
    """The folders that become datasets, by name."""
    if not build.is_dir():
        raise FileNotFoundError(
            f"no build in {build}; run scripts/build_kaggle.py first"
        )
    folders = (path for path in build.iterdir() if path.is_dir())
    return sorted(path for path in folders if path.name not in (SUBMISSION, MODEL))


def variations(build: Path) -> list[Path]:
    """The folders that become variations of the build's model, by name; none where it has none."""
    there = (build / MODEL).glob("*")
    return sorted(path for path in there if path.is_dir())


def table(build: Path) -> str:
    """Files and megabytes of every folder of the build, and in all."""
    sizes: dict[str, list[int]] = {}
    for part in read(build).parts:
        sizes.setdefault(part.path.rpartition("/")[0] or ".", []).append(part.size)
    rows = [(name, len(held), sum(held)) for name, held in sorted(sizes.items())]
    rows.append(("in all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'folder':{width}}  files        MB"]
    lines += [f"{name:{width}}  {n:5}  {size / 1e6:8.1f}" for name, n, size in rows]
    return "\n".join(lines)


def _write_parts(
    folder: Path, paths: Iterable[Path], to: Path, head: dict[str, Any]
) -> Path:
    parts = [
        dataclasses.asdict(
            Part(
                path.relative_to(folder).as_posix(),
                path.stat().st_size,
                files.sha256(path),
            )
        )
        for path in sorted(paths)
        if path.is_file()
    ]
    return files.write_json(to, head | {"parts": parts})


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; run scripts/build_kaggle.py again")
    value = files.read_json(path)
    return value if isinstance(value, dict) else {}


def _parts(value: dict[str, Any], path: Path) -> tuple[Part, ...]:
    listed = value.get("parts")
    if not isinstance(listed, list):
        raise ValueError(f"{path}: not a list of parts")  # noqa: TRY004 (of a file)
    parts: dict[str, Part] = {}
    for number, it in enumerate(listed, 1):
        say = f"{path}: part {number}"
        try:
            part = Part(it["path"], it["size"], it["sha256"])
        except (KeyError, TypeError):
            raise ValueError(f"{say}: has no path, size and sha256") from None
        if fault := find_fault(part.path):
            raise ValueError(f"{say}: path {in_a_line(repr(part.path))} {fault}")
        if type(part.size) is not int or part.size < 0:
            size = in_a_line(repr(part.size))
            raise ValueError(f"{say}, {part.path}: size {size} is no number of bytes")
        if not isinstance(part.sha256, str) or not HASH.fullmatch(part.sha256):
            found = in_a_line(repr(part.sha256))
            raise ValueError(f"{say}, {part.path}: sha256 {found} is no SHA-256")
        if part.path in parts:
            raise ValueError(f"{say}: path {part.path!r} stands there twice")
        parts[part.path] = part
    return tuple(parts.values())
